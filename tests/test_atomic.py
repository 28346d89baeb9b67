"""Files are the old one or the new one, never half of one."""

import errno
import os
import subprocess
import sys
import textwrap

import pytest

from minipeft import atomic
from minipeft.atomic import write_all_atomically, write_atomically


def test_bytes_and_functions_are_written_and_nothing_stays_beside(tmp_path):
    write_atomically(tmp_path / "deep" / "a", b"one")
    write_atomically(str(tmp_path / "deep" / "b"), lambda path: path.write_bytes(b"two"))
    assert (tmp_path / "deep" / "a").read_bytes() == b"one"
    assert (tmp_path / "deep" / "b").read_bytes() == b"two"
    assert sorted(os.listdir(tmp_path / "deep")) == ["a", "b"]


def test_a_full_disk_leaves_the_old_file_whole(tmp_path):
    """/dev/full accepts an open and refuses every byte, as a full disk does."""
    path = tmp_path / "model"
    path.write_bytes(b"old")

    def onto_a_full_disk(beside):
        beside.write_bytes(b"ne")  # the first bytes still fit
        with open("/dev/full", "wb") as full:
            full.write(b"w")

    with pytest.raises(OSError) as failure:
        write_atomically(path, onto_a_full_disk)
    assert failure.value.errno == errno.ENOSPC
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["model"]


def test_no_file_is_renamed_before_all_are_written(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    a.write_bytes(b"old a")
    b.write_bytes(b"old b")

    def fails(beside):
        raise OSError(errno.ENOSPC, "disk full")

    with pytest.raises(OSError, match="disk full"):
        write_all_atomically({a: b"new a", b: fails})
    assert (a.read_bytes(), b.read_bytes()) == (b"old a", b"old b")
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_a_kill_in_the_middle_leaves_the_old_file_whole(tmp_path):
    path = tmp_path / "model"
    path.write_bytes(b"old")
    program = f"""
        import os, signal
        from minipeft.atomic import write_atomically
        def half(beside):
            beside.write_bytes(b"half of the new")
            os.kill(os.getpid(), signal.SIGKILL)
        write_atomically({str(path)!r}, half)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=False)
    assert done.returncode == -9
    assert path.read_bytes() == b"old"


def test_content_is_on_disk_before_the_rename(tmp_path, monkeypatch):
    """A rename that outlives a power cut while the content does not would leave an empty file."""
    happened = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(atomic.os, "fsync", lambda f: (happened.append("fsync"), fsync(f))[1])
    monkeypatch.setattr(
        atomic.os, "replace", lambda a, b: (happened.append("rename"), replace(a, b))[1]
    )
    write_atomically(tmp_path / "a", b"one")
    write_atomically(tmp_path / "b", lambda path: path.write_bytes(b"two"))
    assert happened == ["fsync", "rename", "fsync"] * 2
