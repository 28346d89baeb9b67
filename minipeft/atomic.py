r"""Files that are either the old one or the new one, never half of one.

Everything is first written beside its place and flushed to the disk; only then is it renamed,
which the operating system does in one step. A full disk, an exception or a kill before the rename
leaves the old file whole. A kill leaves `NAME.tmp.PID` behind (checkpoint.py may read it).

Footguns: a rename without fsync may survive a power cut while the content does not; a temporary
file on another disk cannot be renamed into place; mkstemp makes files only their owner can read.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path


def write_atomically(path, content):
    """Write `content` (bytes, or a function that fills the file at the path it is given) to `path`.

    Missing parent folders are made. Raises OSError when the disk is full or the place cannot be
    written; the old file is then as it was and no temporary file stays.
    """
    write_all_atomically({path: content})


def write_json(path, content):
    """`write_atomically` of what JSON can hold, a line for each value."""
    write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())


def write_all_atomically(files):
    """`write_atomically` for {path: content}; all files are on disk before the first is renamed."""
    temporary = {}
    try:
        for path, content in files.items():
            path = Path(path)
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary[path] = path.with_name(f"{path.name}.tmp.{os.getpid()}")
            fill(temporary[path], content)
        rename_all(temporary)
    finally:
        for beside in temporary.values():
            beside.unlink(missing_ok=True)


def rename_all(temporary):
    """Rename {path: file beside it}, in order; if one cannot be, put back those that were."""
    old, done = {}, []
    try:
        for path, beside in temporary.items():
            if len(temporary) > 1 and path.exists():
                old[path] = path.with_name(f"{path.name}.old.{os.getpid()}")
                shutil.copy2(path, old[path])
            os.replace(beside, path)
            done.append(path)
            flush_folder(path.parent)
    except BaseException:
        for path in done:
            path.unlink()
            if path in old:
                old[path].rename(path)
        raise
    finally:
        for backup in old.values():
            backup.unlink(missing_ok=True)


def fill(path, content):
    """Write `content` to `path` and wait until the disk has it."""
    if callable(content):
        content(path)
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
        return
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def flush_folder(folder):
    """Make the rename itself durable; where folders cannot be opened (Windows) it already is."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
