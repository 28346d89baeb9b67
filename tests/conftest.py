"""Shared by all tests: one thread, so that equal means equal in every bit, a fixed seed for each
test, and hypothesis without deadlines and without surprises.
"""

import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests import interpreter, tiny

interpreter.settle()  # before anything else imports Triton
torch.set_num_threads(1)
# A job in the background of a shell is started with Ctrl-C ignored; tests of Ctrl-C need it.
signal.signal(signal.SIGINT, signal.default_int_handler)
settings.register_profile(
    "minipeft",
    deadline=None,  # a shared machine is not a stopwatch
    derandomize=True,  # the same examples on every run
    max_examples=30,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("minipeft")


@pytest.fixture(autouse=True)
def fixed_seed():
    """Every test starts from the same random state, in whichever order tests run."""
    torch.manual_seed(0)


@pytest.fixture
def config():
    return tiny.CONFIG


@pytest.fixture
def model():
    """The tiny model in float64."""
    return tiny.tiny_model()


@pytest.fixture
def model32():
    return tiny.tiny_model(dtype=torch.float32)


@pytest.fixture
def ids():
    """(3, 11) token ids."""
    return tiny.tiny_ids()
