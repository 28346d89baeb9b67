"""`python -m minipeft.labs.engine.fingerprints [labs]`: measure which invariants each bug fails.

Writes fingerprints.json, by which hints are chosen. Says where two bugs fail the same invariants
and have different hints: then the invariants are too coarse, or it is one misunderstanding.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from minipeft import labs
from minipeft.labs.engine.grade import Grader, write_json
from minipeft.labs.engine.lab import FINGERPRINTS


def measure(lab):
    """{bug: sorted names of the invariants that fail}."""
    found = {}
    with Grader(lab, seed=0) as grader, tempfile.TemporaryDirectory() as scratch:
        for bug in lab.bugs:
            for name, text in lab.planted(bug).items():
                Path(scratch, name).write_text(text, encoding="utf-8")
            grade = grader.grade(scratch)
            found[bug.name] = sorted(grade.failing)
    return found


def confusions(lab, found):
    """Pairs of bugs that cannot be told apart and have different hints, and bugs not found."""
    said = [f"{lab.name}: {name!r} fails nothing" for name, failing in found.items() if not failing]
    seen = {}
    for bug in lab.bugs:
        other = seen.setdefault(tuple(found[bug.name]), bug)
        if found[bug.name] and other.hint != bug.hint:
            said.append(f"{lab.name}: {bug.name!r} looks like {other.name!r}: {found[bug.name]}")
    return said


def main(names):
    """Measure these labs, or all; returns 1 when something is confused."""
    measured = json.loads(FINGERPRINTS.read_text()) if FINGERPRINTS.exists() else {}
    chosen = [labs.load(name) for name in names or labs.names()]
    wrong = []
    for lab in chosen:
        if lab.kind == "write":
            measured[lab.name] = measure(lab)
            wrong += confusions(lab, measured[lab.name])
    write_json(FINGERPRINTS, {name: measured[name] for name in sorted(measured)})
    print("\n".join(wrong) or "every bug is told apart")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
