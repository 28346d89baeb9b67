"""The house style, as far as a program can tell."""

from __future__ import annotations

import ast
import importlib.util
import io
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

from minipeft.technique import WHERE

ROOT = Path(__file__).parents[1]
PACKAGE = sorted((ROOT / "minipeft").rglob("*.py"))
PYTHON = PACKAGE + sorted((ROOT / "tests").rglob("*.py")) + sorted((ROOT / "chapters").glob("*.py"))
TECHNIQUES = sorted({Path(importlib.util.find_spec(m).origin) for m in WHERE.values()})
CODE_LINES = 160  # about 150
FUNCTION_LINES = 45


def named(paths):
    return [pytest.param(p, id=str(p.relative_to(ROOT))) for p in paths]


def ruff(*arguments):
    done = subprocess.run(
        [sys.executable, "-m", "ruff", *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_ruff_finds_nothing():
    ruff("check", "--no-cache", ".")


def test_ruff_would_format_nothing():
    ruff("format", "--no-cache", "--check", ".")


def code_lines(source):
    """How many lines hold code: not blank, not a comment, not a docstring."""
    docstrings = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            docstrings |= set(range(node.lineno, node.end_lineno + 1))
    skip = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in skip and token.string:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - docstrings)


def test_code_lines_are_counted_without_prose():
    prose = '"""A.\n\nB.\n"""\n\n# c\n'
    source = prose + 'x = 1  # d\n\n\ndef f():\n    """E."""\n    return (\n        x\n    )\n'
    assert code_lines(source) == 5


@pytest.mark.parametrize("path", named(TECHNIQUES))
def test_a_technique_file_is_short(path):
    assert code_lines(path.read_text()) <= CODE_LINES


@pytest.mark.parametrize("path", named(PACKAGE))
def test_functions_are_short(path):
    """Lines of a function without its docstring."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            first = node.body[0]
            prose = first.end_lineno - first.lineno + 1 if ast.get_docstring(node) else 0
            length = node.end_lineno - node.lineno + 1 - prose
            assert length <= FUNCTION_LINES, f"{node.name} has {length} lines"


@pytest.mark.parametrize("path", named(TECHNIQUES))
def test_a_header_has_its_parts_in_order(path):
    """Title, equations, trained parameters, start, reductions, differences, footguns."""
    header = ast.get_docstring(ast.parse(path.read_text()))
    flat = " ".join(header.split())
    parts = ["rained param", "Reduces to", "How this differs", "Footguns"]
    if path.name == "full.py":
        parts[0] = "trains V D + C D"  # two techniques, two sentences
    places = [flat.find(part) for part in parts]
    assert -1 not in places, f"missing: {[p for p, at in zip(parts, places) if at < 0]}"
    assert places == sorted(places)
    assert re.search(r"^ {2,}\(\w[\w -]* \d+\)", header, re.M), "no numbered equation"
    assert header.splitlines()[0].strip()


@pytest.mark.parametrize("path", named(PYTHON))
def test_docstrings_with_a_backslash_are_raw(path):
    r"""Otherwise \alpha is a bell and \beta a backspace."""
    source = path.read_text()
    tree, lines = ast.parse(source), source.splitlines()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            continue
        if ast.get_docstring(node) is None:
            continue
        first = node.body[0]
        text = "\n".join(lines[first.lineno - 1 : first.end_lineno])
        if "\\" in text:
            assert text.lstrip().startswith('r"'), f"line {first.lineno}: not a raw string"


@pytest.mark.parametrize("path", named(PACKAGE))
def test_public_functions_say_what_they_do(path):
    """Every public function and class at the top of a module has a docstring."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node) or len(node.body) == 1 or short(node), node.name


def short(node):
    """A few lines that say it themselves."""
    return node.end_lineno - node.lineno < 15


def tracked_files():
    """Files of the repository that hold text."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    names = listed.stdout.splitlines() if listed.returncode == 0 else []
    paths = [ROOT / name for name in names] or PYTHON  # an unpacked archive has no git
    endings = {".py", ".md", ".toml", ".txt", ".json", ".yml", ".yaml", ".cfg", ""}
    return [p for p in paths if p.suffix in endings and p.is_file() and p.stat().st_size < 2**20]


def test_no_machine_s_paths_and_no_registry_s_hosts():
    homes = re.compile(r"(?<![\w.])/(?:home|Users|root|work|mnt)/[a-z]")
    hosts = re.compile(r"\b(?:py" + r"pi\.org|python" + r"hosted|ana" + r"conda\.org|np" + r"mjs)")
    found = [
        f"{path.relative_to(ROOT)}: {match[0]}"
        for path in tracked_files()
        for pattern in (homes, hosts)
        for match in pattern.finditer(path.read_text(errors="replace"))
    ]
    assert not found, found


def test_importing_the_package_touches_no_heavy_library():
    code = (
        "import sys, minipeft; "
        "print([m for m in ('triton', 'transformers', 'peft', 'matplotlib', 'bitsandbytes', "
        "'tyro') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
