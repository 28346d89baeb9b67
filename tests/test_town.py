"""What the town promises: probabilities that are exact, documents that follow them, tasks whose
optimum is known.
"""

import json
import math
import random
from collections import Counter
from functools import partial

import pytest
import torch

from minipeft import town
from minipeft.dataset import encode_all, encode_all_for_head, token_tags
from minipeft.tokenizer import Tokenizer
from minipeft.town import base, build, documents, grammar, tasks
from minipeft.town.documents import DIALECT, HOME, KINDS, of
from minipeft.town.world import ATTRIBUTES, FIELDS, tiny_world

TINY = tiny_world()
FACTS_OF_ADA = {"job": "painter", "town": "Oak", "pet": "horse", "drink": "cider"}
STORIES = {
    "home": of(TINY, documents.story),
    "dialect": of(TINY, documents.story, style=DIALECT),
    "with tail": of(TINY, documents.story_with_tail),
}


def toy(choose, say):
    """Two hidden coins and a word said aloud; small enough for sums by hand."""
    coin = choose((1, 2), (1, 3))
    say("start")
    choose(("a", "b"), (coin, 1), aloud=True)
    if choose((True, False), (2, 1)):
        say("more")


# P(a | coin 1) = 1/2 and P(a | coin 2) = 2/3, so P(a) = 1/4 1/2 + 3/4 2/3 = 5/8
TOY = {
    "start a more": 5 / 8 * 2 / 3,
    "start a": 5 / 8 / 3,
    "start b more": 3 / 8 * 2 / 3,
    "start b": 3 / 8 / 3,
}


# -- grammar


def test_town_1_sums_over_all_derivations():  # (Town 1)
    for text, p in TOY.items():
        # a sum of four products of doubles
        assert math.isclose(math.exp(grammar.log_prob(toy, text)), p, rel_tol=1e-14)


def test_town_1_gives_other_texts_no_probability():  # (Town 1)
    for text in ("", "start", "start c", "start a more more", "start a mor", "a"):
        assert grammar.log_prob(toy, text) == -math.inf


def test_town_2_is_the_ratio_of_what_begins_so():  # (Town 2)
    rows = grammar.next_words(toy, "start b more")
    assert rows[0] == {"start": 1.0}
    assert rows[1] == pytest.approx({"a": 5 / 8, "b": 3 / 8}, rel=1e-14)
    assert rows[2] == pytest.approx({"more": 2 / 3, grammar.END: 1 / 3}, rel=1e-14)
    assert rows[3] == {grammar.END: 1.0}


def test_town_2_refuses_what_cannot_be_written():  # (Town 2)
    with pytest.raises(ValueError, match="begins with 'start c'"):
        grammar.next_words(toy, "start c more")


def test_town_3_is_the_mean_over_documents():
    texts = ["start a", "start b more", "start a"]
    expected = -sum(math.log(TOY[t]) for t in texts) / 3
    assert math.isclose(grammar.nats(toy, texts), expected, rel_tol=1e-14)  # (Town 3)
    with pytest.raises(ValueError, match="no texts"):
        grammar.nats(toy, [])


def test_enumeration_finds_every_document():
    assert grammar.enumerate_documents(toy) == pytest.approx(TOY, rel=1e-14)


def test_sampling_follows_the_probabilities():
    rng = random.Random(1)
    n = 20_000
    counts = Counter(grammar.sample(toy, rng) for _ in range(n))
    assert set(counts) == set(TOY)
    for text, p in TOY.items():
        assert abs(counts[text] - n * p) < 4 * math.sqrt(n * p * (1 - p))


def test_a_weight_of_zero_is_never_drawn():
    def never(choose, say):
        say(choose(("a", "b", "c"), (0, 1, 0)))

    rng = random.Random(0)
    assert {grammar.sample(never, rng) for _ in range(200)} == {"b"}
    assert grammar.enumerate_documents(never) == {"b": 1.0}


# -- documents


@pytest.mark.parametrize("kind", [*STORIES, "text_to_record", "restyling", "facts"])
def test_every_kind_of_a_tiny_world_sums_to_one(kind):
    found = grammar.enumerate_documents(STORIES.get(kind) or of(TINY, KINDS[kind]))
    assert math.isclose(math.fsum(found.values()), 1, rel_tol=1e-12)  # thousands of terms
    rng = random.Random(5)
    for text in rng.sample(sorted(found), 25):
        scored = grammar.log_prob(STORIES.get(kind) or of(TINY, KINDS[kind]), text)
        assert math.isclose(math.exp(scored), found[text], rel_tol=1e-12)


@pytest.mark.parametrize("kind", list(STORIES))
def test_stories_come_as_often_as_they_should(kind):
    n, rng = 10_000, random.Random(7)
    probabilities = grammar.enumerate_documents(STORIES[kind])
    counts = Counter(grammar.sample(STORIES[kind], rng) for _ in range(n))
    assert set(counts) <= set(probabilities)
    # 4 sigma for each of the 40 likeliest: one false alarm in 400 seeds, and this seed is fixed
    for text in sorted(probabilities, key=probabilities.get)[-40:]:
        p = probabilities[text]
        assert abs(counts[text] - n * p) < 4 * math.sqrt(n * p * (1 - p))


@pytest.mark.parametrize("name", ["record_to_text", "text_to_record", "restyling", "question"])
def test_the_score_of_a_sample_is_the_product_of_its_choices(name):
    # a kind without hidden choices has one derivation, whose product can be kept on the side
    kind, rng = KINDS[name], random.Random(2)
    for _ in range(20):
        products = []
        text = grammar.sample(partial(tell, kind, products), rng)
        scored = grammar.log_prob(of(tasks.WORLD, kind), text)
        assert math.isclose(scored, sum(products), rel_tol=1e-12)


def tell(kind, products, choose, say):
    def counted(options, weights=None, aloud=False):
        chosen = choose(options, weights, aloud)
        weights = weights or [1] * len(options)
        products.append(math.log(weights[options.index(chosen)] / sum(weights)))
        return chosen

    kind(counted, say, tasks.WORLD)


def test_the_mix_is_the_weighted_sum_of_its_kinds():
    total = sum(documents.SHARES.values())
    for kind, function in KINDS.items():
        for text in base.held_out(kind)[:5]:
            p = sum(
                documents.SHARES[k] / total * math.exp(grammar.log_prob(of(tasks.WORLD, f), text))
                for k, f in KINDS.items()
            )
            assert math.isclose(grammar.log_prob(town.mix(), text), math.log(p), rel_tol=1e-12)
            assert grammar.log_prob(of(tasks.WORLD, function), text) > -math.inf


def test_the_mood_is_hidden_and_even():
    text = "Ada found a bright lamp . She felt dark ."
    given = {m: grammar.log_prob(of(TINY, documents.story, mood=m), text) for m in documents.MOODS}
    both = math.log(sum(0.5 * math.exp(x) for x in given.values()))
    assert math.isclose(grammar.log_prob(of(TINY, documents.story), text), both, rel_tol=1e-13)
    # 12 % and 97 % for a bad day, 88 % and 3 % for a good one
    odds = math.exp(given["bad"] - given["good"])
    assert math.isclose(odds, (0.12 * 0.97) / (0.88 * 0.03), rel_tol=1e-12)


def test_a_dialect_story_can_be_written_at_home():
    texts = [x.completion for x in tasks.TASKS["dialect"].test()[:100]]
    assert grammar.nats(of(tasks.WORLD, documents.story, style=HOME), texts) < 40
    assert grammar.nats(of(tasks.WORLD, documents.story, style=DIALECT), texts) < 20


def test_the_tail_says_the_storys_mood():
    said = Counter()
    for text in base.held_out("story"):
        if " Mood : " in text:
            head, mood = text.removesuffix(" .").split(" Mood : ")
            posterior = tasks.mood_posterior(head)
            said[posterior[mood] > 0.5] += 1
    assert said[True] > 0.9 * sum(said.values()) > 50


def test_stories_tell_the_residents_facts():
    facts = {p.name: p for p in tasks.WORLD.residents}
    lives = [t for t in base.held_out("story") if " lives in " in t]
    for text in lives:
        name = next(w for w in text.split() if w in facts)
        assert f"{facts[name].pronoun} lives in {facts[name].facts['town']} ." in text
    assert len(lives) > 10


def test_copies_are_copies():
    for text in base.held_out("record_to_text"):
        table, sentence = text.split(" Text : ")
        words = table.split()
        values = [words[i + 2] for i, w in enumerate(words) if w in FIELDS and i % 4 == 0]
        assert len(values) == 5 and all(v in sentence.split() for v in values)


def test_questions_are_answered_from_the_document():
    for text in base.held_out("question"):
        body, *questions = text.split(" Question : ")
        asked = [q.removesuffix(" .").split(" ? ") for q in questions]
        assert len({key for key, _ in asked}) == 2
        for key, answer in asked:
            assert answer in body.split() and answer in tasks.WORLD.record_values(key)


def test_yes_and_no_are_true():
    town_of = {p.name: p.facts for p in tasks.WORLD.residents}
    checked = 0
    for text in base.held_out("facts"):
        words = text.split()
        if words[0] == "Is":
            truth = town_of[words[4]][words[2]] == words[5]
            assert words[7] == ("yes" if truth else "no")
            checked += 1
    assert checked > 40


def test_the_world_is_the_same_everywhere():
    world = tasks.WORLD
    assert len(world.residents) == 32 and len(set(world.names)) == 56
    assert not set(world.places) & set(world.names)
    assert world.resident("Ada").facts == FACTS_OF_ADA
    assert town.build_world(1).residents != world.residents
    with pytest.raises(KeyError):
        world.resident("Florence")


# -- tasks


@pytest.mark.parametrize("name", list(tasks.TASKS))
def test_task_examples_are_fixed_by_split_and_seed(name):
    task = tasks.TASKS[name]
    assert task.train(3) == task.train(3) != task.train(4)
    assert task.test() == task.test() and task.validation() == task.validation()
    seen = {(x.prompt, x.completion) for x in [*task.train(0), *task.validation()]}
    repeated = sum((x.prompt, x.completion) in seen for x in task.test())
    assert repeated <= 0.02 * len(task.test())  # a short story may come twice by chance
    assert len(task.test()) >= 64


@pytest.mark.parametrize("name", list(tasks.TASKS))
def test_every_word_of_a_task_is_one_token(name):
    tokenizer = Tokenizer.load(town.base_folder())
    for x in tasks.TASKS[name].test():
        assert len(tokenizer.encode(x.prompt + x.completion)) == len(
            (x.prompt + x.completion).split()
        )
        assert x.completion.startswith(" ") == bool(x.prompt)


@pytest.mark.parametrize("name", list(tasks.TASKS))
def test_tags_and_labels_fit_the_data_set(name):
    task, tokenizer = tasks.TASKS[name], Tokenizer.load(town.base_folder())
    examples = task.test()[:20]
    encode_all(examples, tokenizer)
    if task.labels:
        encode_all_for_head(examples, tokenizer, task.labels, task.per_token)
    for x in examples:
        if x.tags:
            words = (x.prompt + x.completion).split()
            for word, tag in zip(words, token_tags(x, tokenizer), strict=True):
                known = tag in FIELDS and word != tag
                namesake = tag == "who" and word in tasks.WORLD.places  # a person named as a place
                assert not known or namesake or word in tasks.WORLD.record_values(tag)


def test_dialect_floor_and_unadapted_are_those_of_the_generator():
    task = tasks.TASKS["dialect"]
    texts = [x.completion for x in task.test()]
    own = of(tasks.WORLD, documents.story, style=DIALECT)
    floor = -sum(grammar.log_prob(own, t) for t in texts) / len(texts)
    assert math.isclose(task.floor, floor, rel_tol=1e-12) and task.best == task.floor
    # a perfect model of the mix pays the shift, and -ln(share of stories) - ln(share without tail)
    home = grammar.nats(of(tasks.WORLD, documents.story), texts)
    assert math.isclose(task.unadapted, home - math.log(0.24) - math.log(0.4), rel_tol=1e-9)
    assert task.unadapted - task.floor > 6


def test_bayes_is_as_good_as_its_posterior_says():
    task = tasks.TASKS["mood"]
    examples = task.test()
    sides = [
        max(tasks.mood_posterior(x.prompt.removesuffix(tasks.MOOD_QUESTION)).values())
        for x in examples
    ]
    expected = sum(sides) / len(sides)
    sigma = math.sqrt(sum(p * (1 - p) for p in sides)) / len(sides)
    assert abs(task.best - expected) < 4 * sigma
    entropy = sum(-p * math.log(p) - (1 - p) * math.log1p(-p) for p in sides) / len(sides)
    assert abs(task.floor - entropy) < 0.05  # 500 stories; a right sign error would give 2 nats
    assert 0.93 < task.best < 0.99


def test_mood_answers_are_the_stories_moods():
    for x in tasks.TASKS["mood"].train(0)[:200]:
        assert x.label == x.completion.split()[0]
    share = sum(x.label == "yes" for x in tasks.TASKS["mood"].train(0)) / 2000
    assert abs(share - 0.5) < 4 * 0.5 / math.sqrt(2000)


def test_the_posterior_refuses_what_is_no_story():
    with pytest.raises(ValueError, match="no story"):
        tasks.mood_posterior("Ada found a lamp .")


def test_new_facts_are_learned_in_two_forms_and_asked_in_a_third():
    task = tasks.TASKS["new_facts"]
    learned = Counter(x.prompt.split()[0] for x in task.train(0))
    assert learned["Question"] == 96 and sum(learned.values()) == 192
    assert {x.prompt.split()[0] for x in task.test()} == {"What"}
    facts = {(n, a): v for n, a, v in tasks.new_fact_list()}
    assert set(facts) == {(n, a) for n in tasks.WORLD.visitors for a in ATTRIBUTES}
    for x in [*task.train(0), *task.test()]:
        attribute = next(a for a in ATTRIBUTES if a in x.prompt.split())
        name = next(n for n in tasks.WORLD.visitors if n in x.prompt.split())
        assert x.completion == f" {facts[name, attribute]} ."


def test_no_form_of_a_new_fact_has_the_name_where_another_has_it():
    """Why training moves them: what is bound to a place is no answer in the third form."""
    task = tasks.TASKS["new_facts"]
    places, visitors = {}, tasks.WORLD.visitors
    for x in [*task.train(0), *task.test()]:
        words = x.prompt.split()
        form = words[0] if words[0] in ("Question", "What") else "key"
        places.setdefault(form, set()).add(next(n for n, w in enumerate(words) if w in visitors))
    assert [len(found) for found in places.values()] == [1, 1, 1]
    assert len(set.union(*places.values())) == 3
    assert task.random_starts >= max(set.union(*places.values()))


def test_new_facts_ask_beside_for_efficacy_and_locality():
    besides = tasks.TASKS["new_facts"].besides()
    assert set(besides) == {"as_learned", "old_facts"}
    learned = {x.prompt for x in tasks.TASKS["new_facts"].train(0)}
    assert {x.prompt for x in besides["as_learned"][1]} <= learned
    for x in besides["old_facts"][1]:
        name, attribute = x.prompt.split()[5], x.prompt.split()[3]
        assert x.completion == f" {tasks.WORLD.resident(name).facts[attribute]} ."


def test_question_answering_tests_other_residents():
    task = tasks.TASKS["question_answering"]
    groups = [
        {x.prompt.split()[0] for x in s} for s in (task.train(), task.validation(), task.test())
    ]
    assert [len(g) for g in groups] == [12, 4, 16]
    assert not (groups[0] & groups[1] or groups[0] & groups[2] or groups[1] & groups[2])
    for x in task.test():
        name, _, attribute, _ = x.prompt.split()
        assert x.completion == f" {tasks.WORLD.resident(name).facts[attribute]} ."


def test_a_word_alone_does_not_tell_its_slot():
    roles = Counter()
    for x in tasks.TASKS["slot_tagging"].test():
        for word, tag in zip(x.prompt.split(), x.tags, strict=False):
            if word in tasks.WORLD.places:
                roles[tag] += 1
    assert roles["who"] > 200 and roles["where"] == 500 and set(roles) == {"who", "where"}


def test_slot_tags_and_the_text_answer_agree():
    for x in tasks.TASKS["slot_tagging"].test()[:50]:
        words = x.prompt.split()
        answer = [tasks.NONE if w == "-" else w for w in x.completion.split()]
        assert answer == list(x.tags[: len(words) - 2]) == list(x.tags[len(words) :])


@pytest.mark.parametrize("name", ["table_to_text", "restyling"])
def test_new_templates_say_what_the_prompt_says(name):
    task = tasks.TASKS[name]
    for x in task.test()[:100]:
        answer = x.completion.split()
        values = [w for w, t in zip((x.prompt + x.completion).split(), x.tags) if t]
        assert len(values) == 5 and all(v in x.prompt.split() for v in values)
        assert documents.NEW_TEMPLATES[name].split()[0] == answer[0]
    assert task.besides()["slots"][0] == "slots"


def test_formats_of_the_tasks_are_not_in_the_mix():
    for name in ("table_to_text", "restyling", "slot_tagging", "question_answering"):
        for x in tasks.TASKS[name].test()[:10]:
            assert grammar.log_prob(town.mix(), x.prompt + x.completion) == -math.inf


def test_an_answer_by_guessing_is_right_as_often_as_chance_says():
    sizes = [len(tasks.WORLD.values[a]) for a in ATTRIBUTES]
    assert math.isclose(tasks.TASKS["new_facts"].chance, sum(1 / n for n in sizes) / 4)
    assert math.isclose(tasks.TASKS["slot_tagging"].chance, 1 / 6)


def test_describe_has_a_row_for_every_task():
    lines = town.describe().splitlines()
    assert len(lines) == 2 + len(tasks.TASKS) and len({line.count("|") for line in lines}) == 1
    row = next(line for line in lines if line.startswith("| dialect "))
    assert f"{tasks.TASKS['dialect'].floor:.3f}" in row
    assert f"{tasks.TASKS['dialect'].unadapted:.3f}" in row
    assert f"| {tasks.TASKS['dialect'].steps} |" in row
    moved = next(line for line in lines if line.startswith("| new_facts "))
    task = tasks.TASKS["new_facts"]
    assert f"| {task.steps}, moved by 0 .. {task.random_starts} |" in moved


# -- the teacher


def test_soft_labels_are_the_exact_distribution_in_place():
    tokenizer = Tokenizer.load(town.base_folder())
    text = base.held_out("story")[0]
    table = town.soft_labels(tokenizer, town.mix(), text)
    labels = [*tokenizer.encode(text), tokenizer.eot]
    assert table.shape == (len(labels), tokenizer.vocab_size)
    # a thousand float32 numbers that sum to 1
    torch.testing.assert_close(table.sum(1), torch.ones(len(labels)), atol=1e-5, rtol=0)
    surprise = -table[range(len(labels)), labels].double().log().sum().item()
    assert math.isclose(surprise, -grammar.log_prob(town.mix(), text), rel_tol=1e-5)  # float32


def test_soft_labels_need_words_that_are_tokens():
    with pytest.raises(ValueError, match="is 5 tokens"):
        town.soft_labels(Tokenizer({bytes([b]): b for b in range(256)}), toy, "start a")


# -- the folder


def test_shipped_floors_are_those_of_the_generator():
    shipped = json.loads((town.data_folder() / "floors.json").read_text())
    assert shipped == build.floors()


def test_the_shipped_vocabulary_is_the_one_the_recipe_gives():
    texts = town.pretraining_documents(0, base.VOCABULARY_DOCUMENTS)
    assert base.train_tokenizer(texts).ranks == Tokenizer.load(town.base_folder()).ranks


def test_a_missing_data_folder_is_an_error_that_helps(monkeypatch, tmp_path):
    monkeypatch.setattr(build, "PACKAGE", tmp_path / "minipeft")
    with pytest.raises(FileNotFoundError, match="minipeft pretrain"):
        town.data_folder()


def test_data_is_found_inside_a_wheel_too(monkeypatch, tmp_path):
    inside = tmp_path / "minipeft" / "_data"
    (inside / "base").mkdir(parents=True)
    (inside / "base" / "tokenizer.tiktoken").write_text("")
    monkeypatch.setattr(build, "PACKAGE", tmp_path / "minipeft")
    assert town.data_folder() == inside and town.base_folder() == inside / "base"


def test_one_call_makes_the_whole_folder(monkeypatch, tmp_path):
    texts = base.pretraining_documents(0, 300)
    monkeypatch.setattr(base, "pretraining_documents", lambda seed: texts)
    measured = {"mix": 1.23456}
    monkeypatch.setattr(base, "measure", lambda model, tokenizer: measured)
    monkeypatch.setattr(build, "floors", lambda: {"mix": 1.0})
    folder = town.build_data(tmp_path / "new", steps=2, show=False)
    names = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert names == {
        "floors.json",
        "base.json",
        "base/config.json",
        "base/model.safetensors",
        "base/tokenizer.tiktoken",
    }
    assert json.loads((folder / "base.json").read_text()) == {"mix": 1.2346}
    again = town.build_data(tmp_path / "again", steps=2, show=False)
    for name in names:
        assert (folder / name).read_bytes() == (again / name).read_bytes()
