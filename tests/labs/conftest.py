"""What the tests of the labs share: one server that has imported torch, for all of them."""

import pytest

from minipeft import labs
from minipeft.labs.engine import watch
from minipeft.labs.engine.grade import Grader


class Kept:
    """A starter that a Grader does not close."""

    def __init__(self, real):
        self.start, self.ended = real.start, real.ended

    def close(self):
        pass


@pytest.fixture(scope="session")
def server():
    real = watch.starter(("triton",) if has("triton") else ())
    yield Kept(real)
    real.close()


@pytest.fixture(scope="session")
def graded(server, tmp_path_factory):
    """graded(lab, {file: text}, seed=None) -> its Grade."""

    def grade(lab, files, seed=None, out=None):
        lab = labs.load(lab) if isinstance(lab, str) else lab
        folder = tmp_path_factory.mktemp("submission")
        for name, text in files.items():
            (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        with Grader(lab, seed, server) as grader:
            return grader.grade(folder, out, "somebody")

    return grade


def has(module):
    """Whether a module is installed."""
    import importlib.util

    return importlib.util.find_spec(module) is not None
