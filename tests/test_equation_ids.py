"""Every equation in a file's header carries an id, `(LoRA 3)`; the code that computes it and a
test that checks it carry the same id.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path

import pytest

from minipeft.technique import WHERE

ROOT = Path(__file__).parents[1]
ID = re.compile(r"\(([A-Z][A-Za-z0-9]*(?:[ -][A-Za-z0-9]+)* \d+)\)")
MODULES = sorted(set(WHERE.values()))


def header_and_body(path):
    """(the module's docstring, everything else)"""
    source = path.read_text()
    node = ast.parse(source).body[0]
    lines = source.splitlines()
    return "\n".join(lines[: node.end_lineno]), "\n".join(lines[node.end_lineno :])


def source_files():
    """Every file of the package whose header defines equations."""
    for path in sorted((ROOT / "minipeft").rglob("*.py")):
        if path.read_text().startswith(('r"""', '"""')):
            header = header_and_body(path)[0]
            if defined(header):
                yield pytest.param(path, id=str(path.relative_to(ROOT / "minipeft")))


def defined(header):
    """Ids at the beginning of an indented line: the equations themselves, not mentions."""
    return [m[1] for m in re.finditer(rf"^ {{2,}}{ID.pattern}", header, re.M)]


TESTED = set(ID.findall("\n".join(p.read_text() for p in (ROOT / "tests").rglob("test_*.py"))))


@pytest.mark.parametrize("path", list(source_files()))
def test_every_equation_is_computed_and_tested(path):
    header, body = header_and_body(path)
    ids = defined(header)
    assert len(set(ids)) == len(ids), "an id stands for two equations"
    here = set(ID.findall(body))
    assert not set(ids) - here, f"no line of code says that it computes {set(ids) - here}"
    assert not set(ids) - TESTED, f"no test mentions {set(ids) - TESTED}"


@pytest.mark.parametrize("path", list(source_files()))
def test_code_mentions_only_equations_that_exist(path):
    header, body = header_and_body(path)
    families = {name.rpartition(" ")[0] for name in defined(header)}
    mentioned = {i for i in ID.findall(body) if i.rpartition(" ")[0] in families}
    assert not mentioned - set(defined(header)), "an id without its equation"


@pytest.mark.parametrize("module", MODULES)
def test_every_technique_file_has_equations(module):
    path = Path(importlib.util.find_spec(module).origin)
    assert defined(header_and_body(path)[0]), f"{path.name} has no numbered equation"


def test_no_two_files_share_an_id():
    owners = {}
    for parameter in source_files():
        (path,) = parameter.values
        for name in defined(header_and_body(path)[0]):
            assert owners.setdefault(name, path) == path, f"({name}) is defined twice"


def test_the_pattern_reads_ids():
    assert ID.findall("(LoRA 3) (Prefix 12) (P-tuning v2 1) (see 3) (1)") == [
        "LoRA 3",
        "Prefix 12",
        "P-tuning v2 1",
    ]
    assert defined("    (LoRA 3)   W' = W\nas (LoRA 3) says") == ["LoRA 3"]
