"""What a run writes and says."""

import io
import json
import sys

import pytest

from minipeft import LoRA
from minipeft.dataset import Encoded
from minipeft.run_log import kept_lines
from minipeft.training import TrainingConfig, train
from tests.tiny import tiny_model

DATA = [Encoded([1, 2, 3], [2, 3, 4]), Encoded([5], [6])]


def fit(folder=None, **options):
    settings = {"steps": 5, "batch_size": 2, "device": "cpu", "log_every": 2}
    settings |= {k: options.pop(k) for k in ("checkpoint_every",) if k in options}
    model = LoRA(rank=2).attach(tiny_model())
    return train(model, DATA, TrainingConfig(**settings), folder=folder, **options)


def test_the_log_has_a_line_for_every_step(tmp_path):
    result = fit(tmp_path, show=False)
    lines = [json.loads(x) for x in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [x["loss"] for x in lines] == result.losses
    assert [x["tokens"] for x in lines] == [4, 8, 12, 16, 20]
    keys = {"step", "loss", "learning_rate", "gradient_norm", "tokens", "seconds"}
    assert all(set(x) == keys for x in lines)


def test_the_config_says_what_was_trained_and_how(tmp_path):
    fit(tmp_path, show=False)
    found = json.loads((tmp_path / "config.json").read_text())
    assert found["training"]["steps"] == 5
    assert found["model"]["d_model"] == 32
    (technique,) = found["techniques"]
    assert (technique["type"], technique["settings"]["rank"]) == ("LoRA", 2)
    assert found["trained_parameters"] == 2 * 2 * (
        2 * 32 + 2 * 32
    )  # layers x (q, v) x r (in + out)
    assert (found["device"], found["processes"], found["examples"]) == ("cpu", 1, 2)


def test_plain_lines_where_there_is_no_terminal(capsys):
    fit(evaluate=lambda m: {"nats": 3.0}, floor=2.5)
    lines = capsys.readouterr().out.splitlines()
    assert [x.split()[1] for x in lines[:3]] == ["2/5", "4/5", "5/5"]
    assert lines[3] == "evaluation after step 5: nats 3.0000  (best possible 2.5000)"
    assert len(lines) == 4


def test_a_terminal_gets_a_bar(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setenv("TERM", "xterm-256color")
    fit(evaluate=lambda m: 1.0)
    shown = sys.stdout.getvalue()
    assert "step 5/5" in shown
    assert "\x1b[" in shown  # drawn in place, not line by line
    assert "evaluation after step 5" in shown


def test_nothing_is_said_when_asked_not_to(capsys):
    fit(show=False)
    assert capsys.readouterr() == ("", "")


def test_resuming_drops_the_lines_after_the_checkpoint(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    assert kept_lines(path, 2) == ['{"step": 1}\n', '{"step": 2}\n']
    assert kept_lines(tmp_path / "absent", 2) == []


def test_a_killed_and_resumed_run_logs_every_step_once(tmp_path):
    def kill(model, step, steps):
        if step == 4:
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        fit(tmp_path, show=False, after_step=[kill], checkpoint_every=2)
    fit(tmp_path, show=False, resume=True, checkpoint_every=2)
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(x)["step"] for x in lines] == [1, 2, 3, 4, 5]


def test_a_new_run_starts_a_new_log(tmp_path):
    for _ in range(2):
        fit(tmp_path, show=False)
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 5
