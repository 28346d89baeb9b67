r"""The chapters as a site: `make book`, then open build/book/index.html.

The notebooks as they are, executed and committed; nothing runs here. A page is one file without a
script and without anything from elsewhere: formulas become MathML, which browsers draw by
themselves, pictures are inside, so it works from a folder, a stick, or behind a closed door.
"""

from __future__ import annotations

import html
import re
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
TARGET = HERE.parent / "build" / "book"
MATH = re.compile(
    r"\$\$(?P<block>.+?)\$\$|(?<![\\$\w])\$(?P<inline>[^$\s](?:[^$]*?[^$\s])?)\$",
    re.S,
)
CODE = re.compile(r"(```.*?```|`[^`]*`)", re.S)
IDS = re.compile(r"\([A-Z][\w\s-]{1,20}\s\d+\)")  # (Hard prompt 1)
PLAIN = {  # what the converter does not know
    r"\arg\max": r"\operatorname{argmax}",
    r"\Big\lfloor": r"\lfloor",
    r"\Big\rfloor": r"\rfloor",
}
CLOSING = (
    r"\)|\]|&#x00029;|&#x0005D;|&#x0007D;|&#x0007C;|&#x02016;"  # ) ] } | ||
)
THIN = (  # LaTeX sets ln apart from its neighbours, unless a bracket follows
    (r"([\w})])\s*\\(ln|log)\b", r"\1\,\\\2"),
    (r"\\(ln|log)((?:_\w)?)\s*(?=\w|\\[^bl])", r"\\\1\2\,"),
)
# A minus behind a sign is one itself, infinity is a number, double bars do not
# grow, a prime is high enough as it is, and a word is a name: text would count as
# space, and take the space around a sign away.
SIGNS = (
    (
        rf"(<mo[^>]*>(?!{CLOSING})[^<]*</mo>)<mo>&#x02212;",
        r'\1<mo form="prefix">&#x02212;',
    ),
    (r"<mo>&#x0221E;</mo>", "<mi>&#x0221E;</mi>"),
    (
        r"<mo>&#x02016;</mo>",
        '<mo fence="false" stretchy="false">&#x02016;</mo>',
    ),
    (r"<mtext>([A-Za-z-]{2,})</mtext>", r"<mi>\1</mi>"),
    (
        r"<msup>(<mi>[^<]*</mi>)<mi>&#x02032;</mi></msup>",
        r"<mrow>\1<mo lspace='0' rspace='0'>&#x02032;</mo></mrow>",
    ),
)
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title} - minipeft</title>
<link rel="stylesheet" href="book.css">
</head>
<body>
<nav aria-label="Chapters"><p>minipeft</p><ol>{links}</ol></nav>
<main>{body}<footer>{turn}</footer></main>
</body>
</html>
"""
STYLE = """
:root { --ink: #1b1b1b; --soft: #5a5a5a; --line: #dcdcdc; --accent: #0072b2; --code: #f6f6f4; }
* { box-sizing: border-box; }
body { margin: 0; display: flex; color: var(--ink); background: #fff;
  font: 17px/1.6 Georgia, "Noto Serif", "Noto Serif CJK SC", serif; }
nav { flex: 0 0 17rem; height: 100vh; position: sticky; top: 0; overflow-y: auto;
  padding: 1.5rem 1.2rem; border-right: 1px solid var(--line);
  font: 14px/1.45 system-ui, "Noto Sans", sans-serif; }
nav p { font-weight: 600; font-size: 1.15rem; margin: 0 0 .8rem; }
nav ol { list-style: none; padding: 0; margin: 0; }
nav li { break-inside: avoid; }
nav a { display: block; padding: .22rem 0; color: var(--soft); text-decoration: none; }
nav a:hover, nav a[aria-current] { color: var(--accent); }
nav a[aria-current] { font-weight: 600; }
main { flex: 1 1 auto; min-width: 0; max-width: 58rem; margin: 0 auto; padding: 2rem 2rem 5rem; }
.prose > :not(table, math) { max-width: 46rem; }
h1, h2 { line-height: 1.25; font-family: system-ui, "Noto Sans", sans-serif; }
h1 { font-size: 1.9rem; margin: .5rem 0 1.5rem; }
h2 { font-size: 1.3rem; margin: 2.6rem 0 .8rem; }
a { color: var(--accent); }
pre, code { font-family: ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; }
pre { font-size: 13px; line-height: 1.45; overflow-x: auto; margin: 0; }
:not(pre) > code { font-size: .88em; background: var(--code); padding: .08em .3em; }
.input { background: var(--code); border-left: 3px solid var(--accent); padding: .7rem .9rem;
  margin: 1.2rem 0 .4rem; }
.output { padding: .4rem .9rem; margin: 0 0 1.2rem; border-left: 3px solid var(--line); }
.output pre { white-space: pre-wrap; }
.highlight { background: transparent; }
img { max-width: 100%; height: auto; }
math { font-family: "STIX Two Math", "Latin Modern Math", "Cambria Math", "XITS Math",
  "Libertinus Math", "TeX Gyre Pagella Math", "DejaVu Math TeX Gyre", "Noto Sans Math", math;
  font-size: 1.08em; }
math[display="block"] { margin: 1rem 0; overflow-x: auto; overflow-y: hidden; max-width: 100%; }
table { border-collapse: collapse; font-size: .92em; margin: 1rem 0; display: block;
  overflow-x: auto; }
th, td { text-align: left; padding: .25rem 1.1rem .25rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; }
footer { margin-top: 4rem; display: flex; justify-content: space-between; gap: 2rem;
  border-top: 1px solid var(--line); padding-top: 1rem; }
a.anchor-link { display: none; }
@media (max-width: 60rem) {
  body { display: block; }
  nav { position: static; height: auto; border-right: 0; border-bottom: 1px solid var(--line); }
  nav ol { columns: 2; }
  main { padding: 1rem 1rem 4rem; }
}
@media print { nav, footer { display: none; } }
"""


def mathml(latex, block):
    """The formula as MathML. Raises ValueError naming what it cannot say."""
    from latex2mathml.converter import convert

    for known, plain in PLAIN.items():
        latex = latex.replace(known, plain)
    for known, spaced in THIN:
        latex = re.sub(known, spaced, latex)
    written = convert(latex.strip(), display="block" if block else "inline")
    for known, right in SIGNS:
        written = re.sub(known, right, written)
    left = re.search(r"\\[A-Za-z]+", re.sub(r"<[^>]*>", "", written))
    if left:
        raise ValueError(
            f"{left[0]} in {latex!r} is unknown; add it to PLAIN in book.py"
        )
    return written.replace("\n", " ")


def with_mathml(markdown):
    """Markdown whose formulas are MathML, and whose equations' ids no line breaks; what stands in
    `code` is left alone.
    """

    def one(match):
        return mathml(
            match["block"] or match["inline"], match["block"] is not None
        )

    def whole(match):
        return "\N{NO-BREAK SPACE}".join(match[0].split())

    pieces = CODE.split(markdown)
    return "".join(
        p if CODE.fullmatch(p) else IDS.sub(whole, MATH.sub(one, p))
        for p in pieces
    )


def prose(markdown):
    """Markdown as HTML. A link to a chapter leads to its page; one to a file of the repository,
    which is not part of the site, is its words alone.
    """
    from nbconvert.filters.markdown_mistune import markdown2html_mistune

    linked = re.sub(
        r"\]\((\d\d_\w+)\.(?:ipynb|py)\)", r"](\1.html)", with_mathml(markdown)
    )
    return markdown2html_mistune(
        re.sub(r"\[([^]]+)\]\(\.\./[^)]*\)", r"\1", linked)
    )


def highlighted(source):
    """Python source as HTML."""
    from pygments import highlight
    from pygments.formatters import HtmlFormatter
    from pygments.lexers import PythonLexer

    return highlight(source, PythonLexer(), HtmlFormatter())


def shown(output):
    """An output as HTML. Raises ValueError for a kind that chapters do not have."""
    if output.output_type == "stream":
        return f"<pre>{html.escape(output.text)}</pre>"
    data = output.get("data", {})
    if "image/png" in data:
        about = output.metadata["image/png"]
        picture = "".join(data["image/png"].split())
        alt = html.escape(about["alt"], quote=True)
        return f'<img width="{about["width"]}" alt="{alt}" src="data:image/png;base64,{picture}">'
    if "text/markdown" in data:
        return prose(data["text/markdown"])
    if "text/plain" in data:
        return f"<pre>{html.escape(data['text/plain'])}</pre>"
    raise ValueError(f"an output of {list(data)} has no place in a page")


def body_of(notebook):
    """The cells, one below the other."""
    parts = []
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            parts.append(f'<div class="prose">{prose(cell.source)}</div>')
            continue
        parts.append(f'<div class="input">{highlighted(cell.source)}</div>')
        parts += [
            f'<div class="output">{shown(output)}</div>'
            for output in cell.outputs
        ]
    return "\n".join(parts)


def title_of(notebook):
    """Its first line, without the mark."""
    return notebook.cells[0].source.splitlines()[0].lstrip("# ")


def link(name, text, current=False):
    mark = ' aria-current="page"' if current else ""
    return f'<a href="{name}.html"{mark}>{html.escape(text)}</a>'


def make_book(target=TARGET, folder=HERE):
    """Write the site to `target` (removed first). Returns its first page."""
    import nbformat
    from pygments.formatters import HtmlFormatter

    notebooks = {
        path.stem: nbformat.reads(
            path.read_text(encoding="utf-8"), as_version=4
        )
        for path in sorted(folder.glob("[0-9][0-9]_*.ipynb"))
    }
    titles = {name: title_of(notebook) for name, notebook in notebooks.items()}
    names = list(titles)
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    colours = HtmlFormatter(style="friendly").get_style_defs(".highlight")
    (target / "book.css").write_text(colours + STYLE, encoding="utf-8")
    for n, name in enumerate(names):
        before, after = names[n - 1 : n], names[n + 1 : n + 2]
        turn = "".join(link(one, titles[one]) for one in (*before, *after))
        page = PAGE.format(
            title=html.escape(titles[name]),
            links="".join(
                f"<li>{link(one, titles[one], one == name)}</li>"
                for one in names
            ),
            body=body_of(notebooks[name]),
            turn=turn,
        )
        (target / f"{name}.html").write_text(page, encoding="utf-8")
    shutil.copy(target / f"{names[0]}.html", target / "index.html")
    return target / "index.html"


if __name__ == "__main__":
    print(make_book(*map(Path, sys.argv[1:2])))
