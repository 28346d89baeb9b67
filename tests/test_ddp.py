"""Two processes under torchrun, gloo on a CPU, against one process with the same batch.

Each of the two has half the rows: one process with twice the batch of each. Both are real runs of
tests/ddp_worker.py; float32, so sums in another order differ by about 1e-7 of their size.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]


def launch(out, *launcher):
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "tests.ddp_worker", str(out)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(folder of one process's results, folder of two processes' results)."""
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    folders, started = [], []
    for launcher in ((), torchrun):
        folders.append(tmp_path_factory.mktemp("run"))
        started.append(launch(folders[-1], *launcher))
    try:
        for process in started:
            said, _ = process.communicate(timeout=90)
            assert process.returncode == 0, said
    finally:
        for process in started:
            process.terminate()  # nothing happens to one that is done
        for process in started:
            process.wait(timeout=60)  # torchrun gives its processes 30 s, then kills them
    return folders


def read(folder, name, rank=0):
    return json.loads((folder / f"{name}.{rank}.json").read_text())


@pytest.mark.parametrize("name", ["full", "lora", "head"])
def test_two_processes_with_half_the_batch_equal_one_with_the_whole(runs, name):
    one, two = runs
    expected, found = read(one, name), read(two, name)
    assert len(found["losses"]) == 4
    assert found["losses"] == pytest.approx(expected["losses"], rel=2e-6)
    assert found["tokens"] == expected["tokens"]
    tensors, others = (load_file(f / f"{name}.safetensors") for f in runs)
    for key in tensors:
        # AdamW divides by the gradient's own size, so where it is 1e-6 an error of 1e-8 shows as
        # 1 % of the 1e-2 the step is long
        assert (tensors[key] - others[key]).abs().max() < 5e-4, key


@pytest.mark.parametrize("name", ["full", "lora", "head", "whole"])
def test_both_processes_report_the_loss_of_the_whole_batch(runs, name):
    assert read(runs[1], name, 0)["losses"] == read(runs[1], name, 1)["losses"]


def test_only_the_first_process_evaluates(runs):
    assert read(runs[1], "head", 0)["evaluations"] == [[4, {"rank": 0}]]
    assert read(runs[1], "head", 1)["evaluations"] == []


def test_a_loss_that_is_not_finite_in_one_process_stops_both(runs):
    for rank in range(2):
        assert read(runs[1], "poison", rank)["problem"].startswith("step 2: the loss is nan")


def test_ctrl_c_in_one_process_stops_both_and_resuming_gives_the_same_bits(runs):
    two = runs[1]
    steps = [len(read(two, "stopped", rank)["losses"]) for rank in range(2)]
    assert steps[0] == steps[1] < 4
    assert all(read(two, "stopped", rank)["interrupted"] for rank in range(2))
    for rank in range(2):
        assert read(two, "resumed", rank)["losses"] == read(two, "whole", rank)["losses"]
    whole, resumed = (load_file(two / f"{name}.safetensors") for name in ("whole", "resumed"))
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_each_process_drops_out_differently(runs):
    """With equal masks on both halves the losses would still agree with each other, never with
    one process.
    """
    one, two = runs
    assert read(one, "whole")["losses"] != pytest.approx(read(two, "whole")["losses"], rel=1e-4)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="only Linux lists its threads")
def test_no_thread_of_the_group_outlives_it(runs):
    """One that holds a tensor while the interpreter ends aborts the process."""
    for rank in range(2):
        assert not [name for name in read(runs[1], "threads", rank) if "gloo" in name]
