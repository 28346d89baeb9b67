r"""Build the notebooks: chapters/NN_name.py (py:percent) -> executed chapters/NN_name.ipynb.

    python chapters/build.py                all of them
    python chapters/build.py 09 10          those whose names begin so
    python chapters/build.py --prose 09     take over changed prose, and run nothing

The notebook is committed with its outputs, because readers open it on the web. Two builds on one
machine give the same bytes, but for cells tagged `timing`: cell ids are counted, execution times
are dropped, one thread computes, hashes are not random. A cell that raises or writes to stderr
stops the build, and the notebook on disk stays as it was.

No network: the kernel is spoken to through files (ipc) where the system has them.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
TIMEOUT = 900  # seconds a cell
QUIET = {  # for the kernel
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "PYTHONHASHSEED": "0",
    "PYDEVD_DISABLE_FILE_VALIDATION": "1",
    "JUPYTER_PLATFORM_DIRS": "1",
    "HF_HUB_OFFLINE": "1",
}
METADATA = {
    "kernelspec": {
        "display_name": "Python 3",
        "language": "python",
        "name": "python3",
    },
    "language_info": {"name": "python"},
}


def sources():
    """The chapters' scripts, in order."""
    return sorted(HERE.glob("[0-9][0-9]_*.py"))


def read_source(path):
    """The script as a notebook without outputs, its cells called cell-000, cell-001, ..."""
    import jupytext

    notebook = jupytext.read(path, fmt="py:percent")
    notebook.metadata.clear()
    notebook.metadata.update(METADATA)
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number:03d}"
        cell["metadata"] = {
            k: v for k, v in cell["metadata"].items() if k == "tags"
        }
    return notebook


def execute(notebook):
    """Run the notebook in a kernel of its own, in the folder of the chapters."""
    from nbclient import NotebookClient

    client = NotebookClient(
        notebook,
        timeout=TIMEOUT,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(HERE)}},
        extra_arguments=["--HistoryManager.hist_file=:memory:"],
    )
    with tempfile.TemporaryDirectory() as sockets:
        manager = client.create_kernel_manager()
        if os.name == "posix":
            manager.transport, manager.ip = "ipc", str(Path(sockets, "k"))
        client.execute(env=os.environ | QUIET)
    notebook.metadata.clear()
    notebook.metadata.update(METADATA)
    return notebook


def complaints(notebook):
    """What a notebook that is shown to people must not hold: errors, and writing to stderr."""
    found = []
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            if output.output_type == "error":
                found.append(f"{cell['id']}: {output.ename}: {output.evalue}")
            elif output.get("name") == "stderr":
                found.append(f"{cell['id']}: stderr: {output.text.strip()}")
    return found


def text_of(notebook):
    """The notebook's file, as text."""
    import nbformat

    return nbformat.writes(notebook, version=4) + "\n"


def build(path, prose=False):
    """Execute one chapter (or, for `prose`, reuse its outputs) and write its notebook. Returns the
    seconds it took.
    """
    began = time.perf_counter()
    notebook = read_source(path)
    target = path.with_suffix(".ipynb")
    notebook = (
        with_outputs_of(notebook, target) if prose else execute(notebook)
    )
    wrong = complaints(notebook)
    if wrong:
        raise SystemExit(f"{path.name}: " + "\n".join(wrong))
    temporary = target.with_suffix(".ipynb.tmp")
    temporary.write_text(text_of(notebook), encoding="utf-8", newline="\n")
    os.replace(temporary, target)
    return time.perf_counter() - began


def with_outputs_of(notebook, target):
    """The notebook with the outputs that the one on disk has, if its code is the very same."""
    import nbformat

    old = nbformat.reads(target.read_text(encoding="utf-8"), as_version=4)
    run = [cell for cell in old.cells if cell.cell_type == "code"]
    new = [cell for cell in notebook.cells if cell.cell_type == "code"]
    if [cell.source for cell in run] != [cell.source for cell in new]:
        raise SystemExit(
            f"{target.name}: its code changed; build it without --prose"
        )
    for cell, before in zip(new, run):
        cell.outputs, cell.execution_count = (
            before.outputs,
            before.execution_count,
        )
    return notebook


def main(arguments):
    prose = "--prose" in arguments
    beginnings = tuple(a for a in arguments if a != "--prose")
    chosen = [
        p for p in sources() if not beginnings or p.name.startswith(beginnings)
    ]
    if not chosen:
        raise SystemExit(f"no chapter begins with {' or '.join(beginnings)}")
    for path in chosen:
        print(f"{path.stem:40} {build(path, prose):5.0f} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
