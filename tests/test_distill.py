"""The specification of minipeft/distill.py: the command, and the measurement behind the picture."""

import copy
import dataclasses
import json
import statistics
from pathlib import Path

import pytest
import torch

from minipeft import GPT, cli, distill, prune_heads, prune_neurons, town
from minipeft.checkpoint import fingerprint
from minipeft.compressed.importance import gate_importance
from minipeft.compressed.structured_pruning import dense_widths, parameter_count, widths
from minipeft.compressed.teachers import ExactTeacher, NetworkTeacher
from minipeft.dataset import Example, collate, encode_all
from minipeft.distill import Options

SHORT = {"documents": 12, "steps": 3, "batch_size": 4, "device": "cpu"}
RESULTS = Path(__file__).parents[1] / "data" / "results" / "distillation"


@pytest.fixture(scope="module", autouse=True)
def few_held_out():
    """Ten documents tell as much here as four hundred."""
    some = [Example(completion=text) for text in town.held_out()[:10]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distill, "held_out", lambda: some)
        yield


@pytest.fixture(scope="module")
def base():
    return town.load_base()


def flags(folder, **options):
    pairs = {"out": folder, **SHORT, **options}
    named = [(f"--{name.replace('_', '-')}", str(value)) for name, value in pairs.items()]
    return ["distill", *(word for pair in named for word in pair)]


@pytest.mark.parametrize("labels", ("teacher", "generated", "exact", "hard"))
def test_every_kind_of_label_makes_a_student_that_opens(labels, tmp_path, capsys, base):
    assert cli.main(flags(tmp_path, labels=labels)) == 0
    printed = capsys.readouterr().out
    student = GPT.from_pretrained(tmp_path / "student")
    assert len(student.blocks) == 2 and student.config.d_model == base[0].config.d_model
    count = sum(p.numel() for p in student.parameters())
    assert f"{count:,}" in printed and "the teacher" in printed


def test_a_narrower_student_goes_without_the_teacher_s_least_important_neurons(base):
    """By hand: gates in the teacher, on 128 texts, in the two layers that are taken over."""
    teacher, tokenizer = base
    examples = distill.town_examples(0, 130)
    student = distill.student_of(Options(neurons=0.25), teacher, tokenizer, examples)
    rows = encode_all(examples[:128], tokenizer, teacher)
    batches = [collate(rows[i : i + 64]) for i in (0, 64)]
    for block, m, scores in zip(student.blocks, (0, 3), per_row(teacher, batches)):
        keep = sorted(scores.argsort(stable=True)[128:].tolist())  # of 512
        assert torch.equal(block.mlp.up.weight, teacher.blocks[m].mlp.up.weight[keep])
        assert torch.equal(block.mlp.down.weight, teacher.blocks[m].mlp.down.weight[:, keep])
        assert torch.equal(block.attn.q.weight, teacher.blocks[m].attn.q.weight)
    whole = distill.student_of(Options(), teacher, tokenizer, examples)
    assert whole.blocks[1].mlp.up.out_features == 512


def per_row(teacher, batches):
    """Importances of the neurons of layers 0 and 3."""
    scores = gate_importance(teacher, batches, "neurons")
    return scores[0], scores[3]


def test_layers_are_matched_where_asked(tmp_path, capsys):
    options = {"hidden": 1.0, "cosine": 1.0, "attention": 1.0, "alpha": 0.5, "temperature": 2.0}
    assert cli.main(flags(tmp_path, layers=3, **options)) == 0
    assert len(GPT.from_pretrained(tmp_path / "student").blocks) == 3
    first, *_ = (tmp_path / "log.jsonl").read_text().splitlines()
    assert cli.main(flags(tmp_path / "plain", layers=3, alpha=0.5, temperature=2.0)) == 0
    other, *_ = (tmp_path / "plain" / "log.jsonl").read_text().splitlines()
    assert json.loads(first)["loss"] > json.loads(other)["loss"]
    capsys.readouterr()


def test_a_stopped_run_resumed_gives_the_same_student(tmp_path, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    cli.main(flags(whole))
    cli.main(flags(parts, checkpoint_every=1))
    saved = "student/model.safetensors"
    assert cli.main(flags(parts, checkpoint_every=1, resume=True)) == 0
    assert (whole / saved).read_bytes() == (parts / saved).read_bytes()
    capsys.readouterr()


def test_a_run_is_resumed_with_the_lecture_it_was_stopped_in(tmp_path, capsys):
    """A checkpoint tells neither the labels nor the temperature; going on with others would be a
    run that nobody asked for."""
    cli.main(flags(tmp_path, checkpoint_every=1, temperature=2.0))
    again = {"checkpoint_every": 1, "resume": True}
    assert cli.main(flags(tmp_path, **again)) == 1
    assert "cannot be resumed: temperature was 2.0 and is 1.0" in capsys.readouterr().err
    assert cli.main(flags(tmp_path, **again, labels="hard")) == 1
    assert "labels was teacher and is hard" in capsys.readouterr().err
    assert cli.main(flags(tmp_path, **again, temperature=2.0)) == 0
    assert cli.main(flags(tmp_path, checkpoint_every=1)) == 0  # the next run in this folder
    assert cli.main(flags(tmp_path, **again)) == 0
    capsys.readouterr()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"layers": 9}, "9 layers"),
        ({"neurons": 1.5}, "neurons=1.5"),
        ({"alpha": 2.0}, "alpha=2"),
        ({"temperature": 0}, "temperature=0"),
    ],
)
def test_bad_options_are_answered_in_one_line(options, words, tmp_path, capsys):
    assert cli.main(flags(tmp_path, **options)) == 1
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"labels": "hard", "temperature": 2.0}, "temperature=2.0 means nothing with labels=hard"),
        ({"labels": "exact", "hidden": 1.0}, "hidden=1.0 means nothing with labels=exact"),
        ({"labels": "generated", "alpha": 0.5}, "it is of labels=teacher or exact"),
        ({"labels": "hard", "reverse": True}, "reverse=True"),
    ],
)
def test_an_option_that_these_labels_do_not_use_is_named(options, words, tmp_path, capsys):
    assert cli.main(flags(tmp_path / "out", **options)) == 1
    assert words in capsys.readouterr().err and not (tmp_path / "out").exists()
    distill.check_uses(Options(labels="exact", alpha=0.5))


def test_a_pruned_teacher_has_students(tmp_path, capsys, base):
    teacher, tokenizer = base
    small = prune_neurons(prune_heads(copy.deepcopy(teacher), {0: [1]}), {3: range(500)})
    small.save_pretrained(tmp_path / "teacher")
    tokenizer.save(tmp_path / "teacher")
    options = {"teacher": tmp_path / "teacher", "hidden": 1.0, "attention": 1.0}
    assert cli.main(flags(tmp_path / "out", **options)) == 0
    student = GPT.from_pretrained(tmp_path / "out" / "student")
    assert [w["n_head"] for w in widths(student)] == [3, 4]
    assert [w["d_ff"] for w in widths(student)] == [512, 12]
    capsys.readouterr()


@pytest.fixture
def users_file(tmp_path):
    path = tmp_path / "mine.jsonl"
    rows = [{"prompt": f"Ada {n}", "completion": f" has {n} ."} for n in range(8)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_a_user_s_file_is_learned_and_a_part_of_it_held_out(users_file, tmp_path, capsys):
    options = Options(data=users_file)
    examples, test = distill.corpus(options)
    assert len(examples) == 7 and len(test) == 1 and test[0] not in examples
    assert cli.main(flags(tmp_path / "run", data=users_file)) == 0
    capsys.readouterr()


def test_nobody_knows_the_truth_about_a_user_s_file(users_file, tmp_path, capsys):
    assert cli.main(flags(tmp_path, data=users_file, labels="exact")) == 1
    assert "nobody knows" in capsys.readouterr().err


def test_the_teacher_answers_a_user_s_prompts(users_file, base, monkeypatch):
    """Beams of the teacher's, so the same each time; the prompt is given and not learned."""
    monkeypatch.setattr(distill, "TOGETHER", 2)
    teacher, tokenizer = base
    options = Options(data=users_file, labels="generated")
    examples = distill.corpus(options)[0][:3]
    short = dataclasses.replace(teacher.config, context_length=24)
    monkeypatch.setattr(teacher, "config", short)  # answers of at most a few tokens
    rows = distill.generated(options, teacher, tokenizer, examples)
    asked = [[tokenizer.eot, *tokenizer.encode(x.prompt)] for x in examples]
    assert [r.ids[: len(p)] for r, p in zip(rows, asked)] == asked
    assert all(r.labels[: len(p) - 1] == [-100] * (len(p) - 1) for r, p in zip(rows, asked))
    again = distill.generated(dataclasses.replace(options, seed=5), teacher, tokenizer, examples)
    assert again == rows


def test_sampled_documents_all_differ(base, monkeypatch):
    monkeypatch.setattr(distill, "TOGETHER", 3)
    teacher, tokenizer = base
    options = Options(labels="generated", documents=7)
    examples = distill.town_examples(0, 7)
    rows = distill.generated(options, teacher, tokenizer, examples)
    assert len({tuple(r.ids) for r in rows}) == len(rows) == 7
    assert all(r.labels[-1] == tokenizer.eot and r.count == len(r.ids) for r in rows)


def test_lessons_are_what_their_labels_say(base):
    teacher, tokenizer = base
    examples = distill.town_examples(0, 3)
    data = encode_all(examples, tokenizer)
    for labels, kind in (
        ("hard", type(None)),
        ("teacher", NetworkTeacher),
        ("exact", ExactTeacher),
    ):
        found, loss_fn = distill.lesson(Options(labels=labels), teacher, tokenizer, examples)
        assert found == data and isinstance(loss_fn, kind)


def test_the_exact_tables_give_the_documents_their_true_probability(base):
    """The product of the labels' probabilities is P(document), computed without any table."""
    tokenizer = base[1]
    examples = distill.town_examples(0, 4)
    for row, table, x in zip(
        encode_all(examples, tokenizer), distill.exact_tables(tokenizer, examples), examples
    ):
        p = table.to_dense()[torch.arange(len(row.labels)), torch.tensor(row.labels)]
        wanted = town.log_prob(town.mix(), x.completion)
        # float32 probabilities, some thirty of them: 30 x 6e-8, and 40 nats in all
        assert p.double().log().sum().item() == pytest.approx(wanted, rel=1e-5)


def test_documents_are_new_to_the_base_and_different_for_each_seed():
    first, second = (distill.town_examples(seed, 5) for seed in (0, 1))
    trained_on = town.pretraining_documents(0, 5)
    assert first != second and [x.completion for x in first] != trained_on
    assert first == distill.town_examples(0, 5)


# -- the measurement


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(folder, results) of one seed, three steps an arm."""
    folder = tmp_path_factory.mktemp("study")
    return folder, distill.study(folder, Options(**SHORT), seeds=(0,), say=lambda _: None)


def test_a_study_runs_each_arm_once_and_goes_on_where_it_was(finished, monkeypatch):
    folder, results = finished
    assert [c["arm"] for c in results["cells"]] == list(distill.ARMS)
    curves = [c["curve"] for c in results["cells"]]
    assert len({tuple(c[0]) for c in curves}) == 1, "all arms start from the same student"
    assert len({c[-1][1] for c in curves}) == 3
    monkeypatch.setattr(distill, "train", None)  # nothing is trained a second time
    again = distill.study(folder, Options(**SHORT), seeds=(0,), say=None)
    assert again == json.loads((folder / "results.json").read_text())
    assert (folder / "curves.png").stat().st_size > 1000


def test_a_folder_belongs_to_one_study(finished):
    folder, _ = finished
    with pytest.raises(ValueError, match="steps"):
        distill.study(folder, Options(**SHORT | {"steps": 4}), seeds=(0,))


# -- the committed result


@pytest.fixture(scope="module")
def committed():
    return json.loads((RESULTS / "results.json").read_text())


def ends(results, arm):
    return [c["nats"] for c in sorted(results["cells"], key=lambda c: c["seed"]) if c["arm"] == arm]


def test_committed_soft_labels_beat_hard_ones_and_the_truth_beats_a_network(committed):
    hard, trained, perfect = (ends(committed, arm) for arm in distill.ARMS)
    assert len(hard) == len(trained) == len(perfect) == 3
    means = [statistics.mean(values) for values in (perfect, trained, hard)]
    assert committed["best"] < means[0] < means[1] < means[2]
    assert all(max(p, t) < h for p, t, h in zip(perfect, trained, hard)), "in every seed"
    assert 0 < sum(p < t for p, t in zip(perfect, trained)) < 3, "in the mean, not in each seed"


def test_the_committed_result_is_about_the_shipped_base(committed, base):
    assert committed["plan"]["teacher"] == fingerprint(base[0]), "run: python -m minipeft.distill"


def test_the_committed_student_is_at_most_half_its_teacher(committed, base):
    sizes, plan = committed["parameters"], committed["plan"]
    assert sizes["teacher"] == sum(p.numel() for p in base[0].parameters())
    assert plan["layers"] * 2 == len(base[0].blocks)
    widths = dense_widths(dataclasses.replace(base[0].config, n_layer=2))
    narrow = [w | {"d_ff": int(w["d_ff"] * (1 - plan["neurons"]))} for w in widths]
    assert sizes["student"] == parameter_count(base[0].config, narrow)  # (Structured 3)
    assert 0.49 < sizes["student"] / sizes["teacher"] <= 0.5


def test_the_committed_table_and_alt_text_are_made_from_the_results(committed, tmp_path):
    distill.publish(committed, tmp_path)
    for name in ("table.md", "pictures.json"):
        assert (tmp_path / name).read_text() == (RESULTS / name).read_text()
    assert (RESULTS / "curves.png").exists()
