"""Planted bugs. Each file here lists the mistakes students make in one source file; the runner
plants them one at a time and the tests named beside them must fail. README.md says how.
"""

from __future__ import annotations

import ast
import importlib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Mutant:
    """One bug: in `file` (from the repository's root) `find`, which must occur exactly once,
    becomes `replace`.

    why: why somebody writes it. invariant: what must then fail. hangs: set where the bug makes a
    test run for ever, so that running out of time counts as found.
    """

    name: str
    file: str
    find: str
    replace: str
    why: str
    invariant: str
    hangs: bool = False

    def plant(self, source):
        """The source with the bug in it. Raises ValueError when it cannot be planted."""
        times = source.count(self.find)
        if times != 1:
            raise ValueError(f"find occurs {times} times in {self.file}, not once: {self.find!r}")
        mutated = source.replace(self.find, self.replace)
        try:
            changed = meaning(mutated) != meaning(source)
        except SyntaxError as error:
            raise ValueError(f"the mutated {self.file} is not Python: {error}") from None
        if not changed:
            raise ValueError(f"only comments or docstrings of {self.file} change")
        return mutated


def meaning(source):
    """The syntax tree without docstrings, as text: equal for sources that do the same."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            value = body[0].value
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                body[0] = ast.Pass()
    return ast.dump(tree)


def names():
    """Every list of mutants there is, sorted."""
    here = Path(__file__).parent
    return sorted(p.stem for p in here.glob("*.py") if not p.stem.startswith("_"))


def load(name):
    """(mutants, tests) of one list. Raises ValueError when it does not exist or lacks either."""
    if name not in names():
        raise ValueError(f"no mutants for {name!r}; there are {', '.join(names())}")
    module = importlib.import_module(f"{__name__}.{name}")
    return list(module.MUTANTS), list(module.TESTS)
