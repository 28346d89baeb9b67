"""The specification of minipeft/cli.py: what a person types, and what comes back."""

import dataclasses
import json
import re
import subprocess
import sys

import pytest

from minipeft import GPT, BitFit, cli
from minipeft.checkpoint import save_adapter
from minipeft.technique import WHERE, technique_class
from minipeft.town import TASKS, base_folder

SHORT = ["--steps", "2", "--device", "cpu", "--eval-every", "2"]


def run(capsys, *arguments):
    """(exit status, standard output, standard error) of a command."""
    try:
        status = cli.main([str(a) for a in arguments])
    except SystemExit as stop:  # tyro's way of refusing a flag
        status = stop.code
    out, err = capsys.readouterr()
    return status, out, err


def test_without_a_command_the_list_is_printed(capsys):
    status, out, _ = run(capsys)
    assert status == 0
    for name in cli.COMMANDS:
        assert name in out
    assert max(map(len, out.splitlines())) <= 80


def test_a_misspelt_command_names_the_nearest_and_exits_with_2(capsys):
    status, _, err = run(capsys, "generat")
    assert status == 2 and "did you mean 'generate'" in err


def test_a_misspelt_flag_names_the_nearest_and_exits_with_2(capsys):
    status, out, err = run(capsys, "finetune", "lora", "--rnk", "3")
    assert status == 2 and "--rank" in out + err


def test_every_field_of_a_technique_is_a_flag(capsys):
    status, out, _ = run(capsys, "finetune", "lora", "--help")
    assert status == 0
    for flag in ("--rank", "--alpha", "--targets", "--task", "--resume"):
        assert flag in out


def test_every_technique_can_be_asked_for_help(capsys):
    for name in WHERE:
        status, out, _ = run(capsys, "finetune", name.lower(), "--help")
        assert status == 0 and "--learning-rate" in out, name


@pytest.mark.parametrize("name", WHERE)
def test_every_field_of_a_technique_is_explained(name):
    kind = technique_class(name)
    texts = cli.field_help(kind)
    missing = [f.name for f in dataclasses.fields(kind) if len(texts.get(f.name, "")) < 8]
    assert not missing, f"the docstring of {name} lacks `name: text` lines for {missing}"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["finetune", "lroa"], "lroa"),
        (["finetune", "lora", "--task", "mod"], "did you mean 'mood'"),
        (["finetune", "lora", "--rank", "0", *SHORT], "rank=0"),
        (["finetune", "lora", "--rank", "129", *SHORT], "rank=129"),
        (["finetune", "lora", "--targets", "qq", *SHORT], "qq"),
        (["finetune", "lora", "--device", "cuda"], "cuda"),
        (["generate", "--base", "nowhere"], "nowhere"),
        (["generate", "--temperature", "-1"], "temperature=-1"),
        (["generate", "--max-new-tokens", "1000"], "1000"),
        (["evaluate", "--adapter", "nowhere"], "nowhere"),
        (["merge", "--out", "x"], "--adapter"),
        (["compare", "--tasks", "mod"], "mod"),
        (["bench", "--names", "nothing"], "nothing"),
    ],
)
def test_bad_input_is_answered_in_one_line_and_not_with_a_traceback(
    capsys, tmp_path, arguments, words, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    status, _, err = run(capsys, *arguments)
    assert status == 1 and words in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.txt", b"", "empty"),
        ("latin.txt", b"caf\xe9", "offset 3"),
        ("bad.jsonl", b'{"text": "a"}\n{"text": \n', "line 2"),
        ("keys.jsonl", b'{"body": "a"}\n', "body"),
    ],
)
def test_bad_files_are_named_with_the_place(capsys, tmp_path, name, content, words):
    path = tmp_path / name
    path.write_bytes(content)
    status, _, err = run(capsys, "finetune", "lora", "--data", path, "--out", tmp_path, *SHORT)
    assert status == 1 and words in err


def test_finetune_evaluate_generate_merge_one_after_the_other(capsys, tmp_path):
    out = tmp_path / "run"
    status, printed, _ = run(capsys, "finetune", "lora", "--rank", "4", "--out", out, *SHORT)
    assert status == 0 and "8,192 of" in printed and "best possible" in printed
    assert (out / "log.jsonl").exists() and (out / "config.json").exists()
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"

    status, printed, _ = run(capsys, "evaluate", "--adapter", out / "adapter")
    assert status == 0 and "home stories" in printed

    flags = ["--max-new-tokens", "5", "--seed", "1", "--prompt", "Ada"]
    status, first, _ = run(capsys, "generate", "--adapter", out / "adapter", *flags)
    assert status == 0 and first.startswith("Ada")
    assert run(capsys, "generate", "--adapter", out / "adapter", *flags)[1] == first

    model = tmp_path / "merged"
    assert run(capsys, "merge", "--adapter", out / "adapter", "--out", model)[0] == 0
    merged_text = run(capsys, "generate", "--base", model, *flags, "--temperature", "0")[1]
    adapted = run(capsys, "generate", "--adapter", out / "adapter", *flags, "--temperature", "0")
    assert merged_text == adapted[1]


def test_a_users_file_trains(capsys, tmp_path):
    data = tmp_path / "mine.jsonl"
    rows = [{"prompt": f"Ada {n} ?", "completion": " yes ."} for n in range(20)]
    data.write_text("\n".join(map(json.dumps, rows)))
    out = tmp_path / "run"
    status, printed, _ = run(capsys, "finetune", "bitfit", "--data", data, "--out", out, *SHORT)
    assert status == 0 and "nats on the test set" in printed


def test_a_users_file_sorted_by_label_is_tested_on_every_label(tmp_path):
    data = tmp_path / "sorted.jsonl"
    rows = [{"text": f"Ada {n}", "label": "ab"[n >= 20]} for n in range(40)]
    data.write_text("\n".join(map(json.dumps, rows)))
    found = cli.material(None, data, head=True)
    assert [x.label for x in found.test] == ["a", "a", "b", "b"]
    assert len(found.train) == 36 and not set(found.train) & set(found.test)
    data.write_text(json.dumps(rows[0]))
    assert len(cli.material(None, data).train) == len(cli.material(None, data).test) == 1


def test_two_adapters_of_one_name_are_put_on_together(capsys, tmp_path):
    """Every fine-tuning calls its adapter `adapter`."""
    folders = [tmp_path / run / "adapter" for run in ("first", "second")]
    for folder in folders:
        save_adapter(BitFit().attach(GPT.from_pretrained(base_folder())), folder)
    model, _ = cli.open_adapted(None, folders)
    assert [a.name for a in model.attachments] == [str(folder) for folder in folders]


def test_no_step_at_all_is_an_error_not_the_tasks_own_number(capsys, tmp_path):
    status, _, err = run(capsys, "finetune", "bitfit", "--steps", "0", "--out", tmp_path)
    assert status == 1 and "steps=0 must be positive" in err


def test_a_head_classifies_and_its_file_stands_beside_the_adapters(capsys, tmp_path):
    out = tmp_path / "run"
    flags = ["--task", "mood", "--head", "True"]
    status, printed, _ = run(capsys, "finetune", "lora", *flags, "--out", out, *SHORT)
    assert status == 0 and "accuracy of the head" in printed
    after = re.search(r"before, ([0-9.]+) after", printed)[1]
    status, printed, _ = run(capsys, "evaluate", "--adapter", out / "head", out / "adapter", *flags)
    assert status == 0 and f"accuracy of the head: {after}" in printed


def test_a_head_needs_labels(capsys, tmp_path):
    flags = ["--task", "dialect", "--head", "True", "--out", tmp_path]
    status, _, err = run(capsys, "finetune", "lora", *flags)
    assert status == 1 and "labels" in err


def test_a_finished_run_resumed_changes_nothing(capsys, tmp_path):
    out = tmp_path / "run"
    flags = ["finetune", "bitfit", "--out", out, "--checkpoint-every", "1", *SHORT]
    assert run(capsys, *flags)[0] == 0
    before = (out / "adapter" / "adapter_model.safetensors").read_bytes()
    assert run(capsys, *flags, "--resume", "True")[0] == 0
    assert (out / "adapter" / "adapter_model.safetensors").read_bytes() == before


def test_the_program_runs_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "minipeft", "--help"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and "finetune" in done.stdout


@pytest.mark.parametrize("task", ["new_facts", "restyling"])
def test_a_task_is_trained_as_it_says(task):
    found = cli.material(task, None)
    assert found.steps == TASKS[task].steps and found.random_starts == TASKS[task].random_starts
