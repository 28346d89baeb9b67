"""The chapters of even number run from top to bottom (two files, so that two processes share)."""

import pytest

from tests.chapters.running import SCRIPTS, named, run_fast


@pytest.mark.parametrize("path", named(p for p in SCRIPTS if int(p.name[:2]) % 2 == 0))
def test_the_chapter_runs_without_a_word_on_stderr(path, monkeypatch, capfd):
    assert "blank" in run_fast(path, monkeypatch, capfd), "no exercise waits for an answer"
