"""Labs: assignments made from the library's own files, and graded by the invariants they keep.

Each file in this folder is one lab; README.md says how to write one, INSTRUCTOR.md how to teach
with them. `minipeft lab list | make | check | hint | grade` is the command.
"""

from __future__ import annotations

import difflib
import importlib
from pathlib import Path


def names():
    """Every lab there is, sorted; those that look for a bug come last."""
    here = Path(__file__).parent
    found = [p.stem for p in here.glob("*.py") if not p.stem.startswith("_")]
    return sorted(found, key=lambda name: (name.startswith("bug_"), name))


def load(name):
    """The Lab or BugLab called `name`. Raises ValueError with the names there are."""
    plain = name.replace("-", "_").lower()
    if plain not in names():
        near = difflib.get_close_matches(plain, names(), 1)
        said = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(names())}"
        raise ValueError(f"no lab {name!r}; {said}")
    lab = importlib.import_module(f"{__name__}.{plain}").LAB
    lab.name = plain
    return lab
