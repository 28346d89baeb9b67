"""`python -m minipeft`."""

import sys

from minipeft.cli import main

sys.exit(main())
