"""Run a chapter's script in the fast mode, in this process."""

from __future__ import annotations

import os
import runpy
import sys
import time
import warnings
from pathlib import Path
from unittest import mock

import pytest

from tests.interpreter import INTERPRETED

ROOT = Path(__file__).resolve().parents[2]
CHAPTERS = ROOT / "chapters"
SCRIPTS = sorted(CHAPTERS.glob("[0-9][0-9]_*.py"))
SECONDS = 30  # of processor time; ten is the aim, and a slow machine is no bug


def named(paths):
    return [pytest.param(path, id=path.stem) for path in paths]


def fresh_kit(monkeypatch):
    """`import kit` reads the environment again and finds the chapters' folder."""
    monkeypatch.syspath_prepend(str(CHAPTERS))
    for name in [n for n in sys.modules if n == "kit" or n.split(".")[0] == "exercises"]:
        monkeypatch.delitem(sys.modules, name)


def run_fast(path, monkeypatch, capfd):
    """What the chapter prints. Fails on an exception, a warning, anything on stderr."""
    if path.name.startswith("20") and not INTERPRETED:
        pytest.skip("kernels are interpreted where Triton is installed and no GPU is at hand")
    monkeypatch.setenv("MINIPEFT_FAST", "1")
    monkeypatch.chdir(path.parent)
    fresh_kit(monkeypatch)
    capfd.readouterr()
    began = time.process_time()
    with warnings.catch_warnings(record=True) as caught, mock.patch.dict(os.environ):
        warnings.simplefilter("default")
        # what numpy says of torch's tensors, whoever hands one to the other
        warnings.filterwarnings("ignore", "__array__ implementation doesn't accept a copy")
        runpy.run_path(str(path), run_name="__main__")
    took = time.process_time() - began
    written = capfd.readouterr()
    assert not caught, [str(w.message) for w in caught]
    assert written.err == ""
    assert took < SECONDS, f"{path.stem} takes {took:.0f} s in the fast mode"
    return written.out
