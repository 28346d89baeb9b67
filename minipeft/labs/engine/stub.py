"""What is handed out: the reference with the bodies of some functions taken out.

Signature, docstring and everything around stay, to the letter; a body becomes
`raise NotImplementedError("exercise: LoRALinear.forward")`. No marker in the library says where.
"""

from __future__ import annotations

import ast

EXERCISE = "exercise: "


def functions(source):
    """{"f" or "Class.f": its node} of everything a lab can blank."""
    found = {}
    for node in ast.parse(source).body:
        members = node.body if isinstance(node, ast.ClassDef) else []
        pairs = [(node, "")] + [(member, f"{node.name}.") for member in members]
        found |= {p + n.name: n for n, p in pairs if isinstance(n, ast.FunctionDef)}
    return found


def blank(source, names):
    """The source with these functions emptied. Raises ValueError naming one that is not there."""
    known, lines = functions(source), source.splitlines(keepends=True)
    missing = [name for name in names if name not in known]
    if missing:
        raise ValueError(
            f"there is no function {missing[0]} to blank; there are {', '.join(known)}"
        )
    for name in sorted(names, key=lambda name: -known[name].lineno):  # from the bottom up
        first, last = body_lines(known[name])
        indent = " " * known[name].body[0].col_offset
        lines[first - 1 : last] = [f'{indent}raise NotImplementedError("{EXERCISE}{name}")\n']
    return "".join(lines)


def body_lines(node):
    """First and last line of a function's body, its docstring left out."""
    first = node.body[0]
    if ast.get_docstring(node) is not None:
        start = node.body[1].lineno if len(node.body) > 1 else first.end_lineno + 1
        return min(start, first.end_lineno + 1), node.end_lineno
    return first.lineno, node.end_lineno


def statements(source, names):
    """What `blank` takes out, one string a simple statement, written in one way."""
    known, found = functions(source), []
    for name in names:
        for node in ast.walk(ast.Module(known[name].body, [])):
            prose = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            if isinstance(node, ast.Assign | ast.AugAssign | ast.Return | ast.Expr) and not prose:
                found.append(ast.unparse(node))
    return found
