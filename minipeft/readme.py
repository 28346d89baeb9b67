"""The README's tables, made from committed results: `python -m minipeft.readme` writes them in.

A block stands between `<!-- name -->` and `<!-- /name -->`. A test checks that the README holds
what this file makes of data/, so no number in it can be older than its results file.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from minipeft import bench, compare, facts_study, longer_study, orders_study, prune_study
from minipeft.town import data_folder, describe


def blocks():
    """{block name: Markdown}; a block whose results file is missing says so."""
    makers = {
        "demo": lambda: comparison("demo"),
        "tasks": describe,
        "all": lambda: comparison("all"),
        "facts": facts,
        "longer": longer,
        "orders": orders,
        "fusion": lambda: study("fusion"),
        "placement": lambda: comparison("placement"),
        "t_few": lambda: dated_study("t_few"),
        "pruning": pruning,
        "distillation": lambda: dated_study("distillation"),
        "quantisation": quantisation,
        "bench": benchmarks,
        "proof": proof,
    }
    return {name: attempt(make) for name, make in makers.items()}


def attempt(make):
    try:
        return make()
    except FileNotFoundError as missing:
        return f"(not measured yet: no {Path(missing.filename).name})"


def comparison(name):
    """Tables and pictures of a committed comparison."""
    folder = data_folder() / "results" / name
    results = json.loads((folder / "results.json").read_text())
    parts = [compare.markdown(*table) for table in compare.all_tables(results)]
    alts = json.loads((folder / "pictures.json").read_text())
    parts += [f"![{alt}](data/results/{name}/{file})" for file, alt in alts.items()]
    return "\n\n".join([*parts, provenance(results)])


def study(name):
    """The table and the pictures of a committed study."""
    folder = data_folder() / "results" / name
    alts = json.loads((folder / "pictures.json").read_text())
    pictures = [f"![{alt}](data/results/{name}/{file})" for file, alt in alts.items()]
    return "\n\n".join([(folder / "table.md").read_text().strip(), *pictures])


def pruning():
    """What the ways of pruning cost, and the pipeline to a small model step by step."""
    path = data_folder() / "results" / "pruning" / "shrink.json"
    pipeline = compare.markdown(*prune_study.shrink_table(json.loads(path.read_text())))
    return f"{dated_study('pruning')}\n\n{pipeline}"


def dated_study(name):
    """A study's table, and where its numbers come from."""
    path = data_folder() / "results" / name / "results.json"
    return f"{study(name)}\n\n{provenance(json.loads(path.read_text()))}"


def orders():
    """Which orders that papers report hold here, seed by seed."""
    path = data_folder() / "results" / "orders" / "results.json"
    results = json.loads(path.read_text())
    return compare.markdown(*orders_study.verdict_table(orders_study.verdicts(results)))


def facts():
    """The new facts before and after their training was chosen anew, and what was tried."""
    folder = data_folder() / "results" / "new_facts"
    names = ("choice", "results", "before")
    choice, results, before = (json.loads((folder / f"{n}.json").read_text()) for n in names)
    return f"{facts_study.report(choice, results, before)}\n\n{provenance(results)}"


def longer():
    """What three times the steps, another start and another rate do for what hardly learns."""
    results = longer_study.committed("longer")
    told = longer_study.report(results, longer_study.committed("all"))
    return f"{told}\n\n{provenance(results)}"


def quantisation():
    """The pictures and tables of the quantisers' comparisons, headings as bold lines."""
    folder = data_folder() / "results" / "quantisation"
    text = (folder / "README.md").read_text().strip()
    text = re.sub(r"(?m)^# (.*)$", r"**\1**", text)
    return re.sub(r"\]\((\w+\.png)\)", r"](data/results/quantisation/\1)", text)


def provenance(results):
    """Where numbers come from: date, processor, versions."""
    facts = results["machine"]
    versions = ", ".join(f"{p} {facts[p]}" for p in ("torch", "transformers", "peft") if p in facts)
    return (
        f"Measured {results['date']} on {facts['processor']} ({facts['system']}), "
        f"{facts['threads']} thread, Python {facts['python']}, {versions}."
    )


def benchmarks():
    """The tables of bench.py from the files of its benchmarks, the picture, and where from."""
    folder, parts, sources = data_folder() / "benchmarks", [], {}
    for device in bench.SUFFIX:
        for title, names in bench.TABLES.items():
            contents = bench.stored(folder, names, device)
            if contents:
                parts += [f"**{title}{' (cuda)' if device == 'cuda' else ''}**", ratios(contents)]
            sources |= {measured_where(content): None for content in contents}
    if not parts:
        raise FileNotFoundError(2, "no results", "benchmarks/*.json")
    alts = json.loads((folder / "pictures.json").read_text())
    pictures = [f"![{alt}](data/benchmarks/{file})" for file, alt in alts.items()]
    return "\n\n".join([*parts, *pictures, *sources])


def ratios(contents):
    """One table of results: our time over theirs, and how much of ours is unavoidable."""
    head = ["what", "against", "ours / theirs", "p20 .. p80", "ours, ms", "floor", "besides"]
    lines = [f"| {' | '.join(head)} |", "|---|---|---:|---:|---:|---:|---|"]
    for content in contents:
        for r in content["results"]:
            besides = ", ".join(f"{k} {bench.figure(v)}" for k, v in r["extra"].items())
            spread = f"{r['low']:.2f} .. {r['high']:.2f}" if r["low"] < r["high"] else ""
            floor = f"{r['floor'] / r['ours']:.0%}" if r["floor"] else ""
            what, ours = f"{r['name']} ({r['note']})", bench.figure(1000 * r["ours"])
            row = [what, r["peer"], f"**{r['ratio']:.2f}**", spread, ours, floor, besides]
            lines.append(f"| {' | '.join(row)} |")
    lines += [f"\nLeft out: {c['benchmark']}, {c['left_out']}." for c in contents if c["left_out"]]
    return "\n".join(lines)


def measured_where(content):
    """Date, machine and versions of a benchmark, the rates of its floors, and whether on a GPU."""
    rates, gpu = content["rates"], content["gpu"]
    without = {"none here": "No GPU was there", "not measured": "The GPU was not measured"}
    return (
        f"{provenance(content)} The floor is the share of our time in which this machine moves "
        f"each byte once ({rates['bandwidth'] / 1e9:.1f} GB/s, copying) and does each operation "
        f"once ({rates['operations'] / 1e9:,.0f} GFLOP/s, multiplying matrices), whichever takes "
        f"longer; both rates were measured in the same run. "
        + (f"{without[gpu]}: nothing is said about GPUs." if gpu in without else f"GPU: {gpu}.")
    )


def proof():
    """The mutation score, in all and file by file."""
    score = json.loads((data_folder() / "mutants.json").read_text())
    files = ", ".join(f"{n} {f['killed']}/{f['planted']}" for n, f in score["files"].items())
    return (
        f"{score['killed']} of {score['planted']} planted bugs are caught by the tests "
        f"(`make mutants`; `data/mutants.json` names the test that caught each): {files}."
    )


def filled(text, made):
    """The README's text with every block replaced."""
    for name, content in made.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        text = re.sub(pattern, lambda m, c=content: f"{m[1]}{c}\n{m[2]}", text, flags=re.DOTALL)
    return text


if __name__ == "__main__":
    path = Path(__file__).parent.parent / "README.md"
    path.write_text(filled(path.read_text(), blocks()))
