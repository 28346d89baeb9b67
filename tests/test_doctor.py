"""The specification of minipeft/doctor.py."""

import io
import json

import pytest
import torch
from rich.console import Console

from minipeft import dispatch, doctor


def test_the_cpu_computes_attention_right_in_float32_and_float64():
    for dtype in (torch.float64, torch.float32):
        verdict, error = doctor.self_test("cpu", dtype)
        assert verdict == "ok" and error <= doctor.TOLERANCE[dtype]


def test_a_wrong_core_is_called_wrong(monkeypatch):
    class Wrong:
        def __call__(self, q, k, v):
            return (q @ k.transpose(-1, -2)).softmax(-1) @ v  # no scale, no mask

    monkeypatch.setattr(doctor, "AttentionCore", Wrong)
    assert doctor.self_test("cpu", torch.float32)[0] == "WRONG"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_missing_device_is_reported_and_not_raised():
    verdict, error = doctor.self_test("cuda", torch.float32)
    assert verdict.startswith("not available") and error is None


def test_the_report_names_versions_devices_and_speed():
    out = io.StringIO()
    healthy = doctor.doctor(Console(file=out, width=100))
    text = out.getvalue()
    assert healthy
    for word in ("torch", torch.__version__, "cpu", "bfloat16", "steps a second", "Triton"):
        assert word in text
    for word in ("lora_function", "in use", "09_lora"):
        assert word in text


def test_every_twin_is_listed_with_a_reason():
    listed = doctor.twins()
    assert len(listed) == len(dispatch.TWINS) > 10
    why = {(name, twin): reason for name, twin, reason in listed}
    lora = "low_rank.lora.lora_linear"
    assert why[lora, "low_rank.lora_function"].startswith("in use on cpu")
    assert why[lora, "low_rank.lora_function"].endswith("measured to be faster")
    tables = why["quantized.nf4.dequantize_blocks", "quantized.nf4_tables"]
    assert tables.startswith("in use on cpu") and "measured" not in tables
    if not torch.cuda.is_available():
        assert why[lora, "kernels.lora"] == "runs on cuda, which this machine has not"
    with dispatch.forced("off"):
        assert {why for *_, why in doctor.twins()} == {"MINIPEFT_FAST_PATH=off"}


@pytest.mark.parametrize("width", [80, 120])
def test_no_name_of_a_twin_is_broken(width):
    """80 columns is a terminal as it opens: the folders go, and what is left stands whole."""
    out = io.StringIO()
    console = Console(file=out, width=width)
    for table in doctor.twin_tables(width):
        console.print(table)
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    rows = {tuple(cell.strip() for cell in x.split("│")[1:3]) for x in lines if "│" in x}
    for name, twin, _ in doctor.twins():
        shown = name if width == 120 else ".".join(name.split(".")[-2:])
        assert (shown, twin) in rows


def test_twins_stand_below_their_reason_and_those_in_use_come_first(monkeypatch):
    found = [("a.f", "t", "runs on x"), ("b.g", "u", "in use on y"), ("c.h", "v", "runs on x")]
    monkeypatch.setattr(doctor, "twins", lambda: found)
    first, second = doctor.twin_tables(80)
    assert "in use on y" in first.title and list(first.columns[0].cells) == ["b.g"]
    assert "runs on x" in second.title and list(second.columns[1].cells) == ["t", "v"]


def test_a_chapter_s_time_is_read_from_its_notebook(tmp_path):
    def cell(tags, text):
        outputs = [{"text": [text, "seconds on a core   48\n"]}]
        return {"metadata": {"tags": tags}, "outputs": outputs}

    notebook = {"cells": [{"metadata": {}}, cell(["timing"], "machine\n")]}
    (tmp_path / "07_seven.ipynb").write_text(json.dumps(notebook))
    untimed = {"cells": [cell([], "not the cost\n")]}
    (tmp_path / "08_eight.ipynb").write_text(json.dumps(untimed))
    assert doctor.chapter_seconds(tmp_path) == {"07_seven": 48}


def test_measuring_the_speed_leaves_the_threads_as_they_were():
    before = torch.get_num_threads()
    assert doctor.steps_per_second(0.01) > 0
    assert torch.get_num_threads() == before
