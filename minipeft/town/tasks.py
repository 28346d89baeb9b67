r"""Seven things to adapt the base to, each with the best result that is possible.

A task recombines what pre-training taught (words, formats, copying) into something the base was
never asked: no task needs a token that pre-training did not show. `TASKS[name]` has the examples
and these numbers:

    floor       nats a document the true distribution of the answers needs on the test set (Town 3)
    best        the same optimum in the task's metric
    unadapted   the metric of a perfect model of the pre-training mix: it pays -ln P(kind) and
                -ln P(no tail) on a text whose kind it has to guess; None where the mix gives the
                task's format no probability at all
    chance      the metric of guessing among the possible answers

All seven are text; mood and slot tagging have names for a `Head` besides (`labels`).

Footguns
- Nats of an unseen format are huge (65 to 175) before the first step, so a share of the distance in
  nats says 99 % for
  everyone: use exact match or accuracy for all tasks but the dialect.
- 64 to 96 questions give a score +-4 to 6 points; `train(seed)` changes what is learned from, the
  test stays.
"""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from minipeft.dataset import Example
from minipeft.town import documents, grammar
from minipeft.town.documents import DIALECT, FACT_FORMS, MOODS, NEW_TEMPLATES, of
from minipeft.town.world import ATTRIBUTES, FIELDS, build_world

WORLD = build_world()
NONE = "none"  # the tag of a word that fills no slot
NEW_SEPARATORS = ("=", ",")  # both known, never as a pair
NEW_ORDER = ("what", "where", "who", "when", "did")
MOOD_QUESTION = " It was a good day ?"
MOOD_ANSWERS = {"good": "yes", "bad": "no"}


@dataclass(frozen=True)
class Task:
    """One task. `metric` names an entry of evaluation.METRICS, `steps` how long to train at batch
    16.

    random_starts: how far training moves half of its batches, as TrainingConfig says. Facts need
    it: with names always at the same places in two forms, what is learned is bound to these places,
    and a third form, with the name elsewhere, does not find it.
    labels: names of the classes (or, `per_token`, of the tags) for a Head; () where the task is
    text alone.
    """

    name: str
    format: str
    metric: str
    steps: int
    chance: float | None
    floor_from: str
    make: Callable[[str, int], list[Example]]
    optimum: Callable[[list[Example]], dict]
    also: Callable[[], dict] = dict
    random_starts: int = 0
    labels: tuple[str, ...] = ()
    per_token: bool = False

    def train(self, seed: int = 0) -> list[Example]:
        """What to learn from; another seed draws other examples where the task has more than it
        gives at once."""
        return self.make("train", seed)

    def validation(self) -> list[Example]:
        """For choosing a learning rate or when to stop; never part of the test."""
        return self.make("validation", 0)

    def test(self) -> list[Example]:
        """What results are reported on, always the same."""
        return self.make("test", 0)

    def besides(self) -> dict[str, tuple[str, list[Example]]]:
        """Further questions worth asking: {name: (metric, examples)}."""
        return self.also()

    @property
    def floor(self) -> float | None:
        """Nats a document of the optimum on the test set."""
        return _optimum(self.name)["floor"]

    @property
    def best(self) -> float | None:
        """The optimum's score in the task's metric on the test set."""
        return _optimum(self.name)["best"]

    @property
    def unadapted(self) -> float | None:
        """The score of a perfect model of the mix that was not adapted, None where it is not
        defined."""
        return _optimum(self.name)["unadapted"]


@cache
def _optimum(name):
    task = TASKS[name]
    return {"unadapted": None} | task.optimum(task.test())


def _certain(_):
    """One right answer: nothing to pay, everything right."""
    return {"floor": 0.0, "best": 1.0}


def _rng(name, split, seed):
    return random.Random(f"{name}/{split}/{seed}")


SIZES = {"train": 2000, "validation": 200, "test": 500}


# -- Home, dialect, mood


def mix():
    """The pre-training mix as a document kind."""
    return of(WORLD, documents.mix)


@cache
def _home():
    kind, rng = of(WORLD, documents.story_with_tail), _rng("home", "test", 0)
    return tuple(Example(completion=grammar.sample(kind, rng)) for _ in range(SIZES["test"]))


def home_documents() -> list[Example]:
    """Held-out stories as pre-training writes them: what adaptation may forget."""
    return list(_home())


@cache
def home_floor() -> float:
    """Nats a home document of a perfect model of the mix, which has to find out that it reads a
    story."""
    return grammar.nats(mix(), [x.completion for x in _home()])


def dialect(split, seed):
    kind, rng = of(WORLD, documents.story, style=DIALECT), _rng("dialect", split, seed)
    return [Example(completion=grammar.sample(kind, rng)) for _ in range(SIZES[split])]


def dialect_optimum(examples):
    texts = [x.completion for x in examples]
    floor = grammar.nats(of(WORLD, documents.story, style=DIALECT), texts)
    return {"floor": floor, "best": floor, "unadapted": grammar.nats(mix(), texts)}


def mood(split, seed):
    rng = _rng("mood", split, seed)
    return [_mood_example(rng, MOODS[int(rng.random() * 2)]) for _ in range(SIZES[split])]


def _mood_example(rng, mood):
    text = grammar.sample(of(WORLD, documents.story, mood=mood), rng)
    answer = MOOD_ANSWERS[mood]
    return Example(text + MOOD_QUESTION, f" {answer} .", label=answer)


def mood_posterior(text: str) -> dict[str, float]:
    """P(mood | story) for both moods: what the perfect reader knows."""
    joint = {m: math.exp(grammar.log_prob(of(WORLD, documents.story, mood=m), text)) for m in MOODS}
    total = sum(joint.values())
    if total == 0:
        raise ValueError(f"{text!r} is no story of Tiny Town")
    return {m: p / total for m, p in joint.items()}


def mood_optimum(examples):
    """Bayes: the cross-entropy of the posterior, and how often its larger side is right."""
    right, nats = 0, []
    for x in examples:
        posterior = mood_posterior(x.prompt.removesuffix(MOOD_QUESTION))
        p = next(posterior[m] for m in MOODS if MOOD_ANSWERS[m] == x.label)
        right += p > 0.5
        nats.append(-math.log(p))
    return {"floor": math.fsum(nats) / len(nats), "best": right / len(examples)}


# -- Facts

ALL_FACTS = [(p.name, a, p.facts[a]) for p in WORLD.residents for a in ATTRIBUTES]
GUESS = sum(1 / len(WORLD.values[a]) for a in ATTRIBUTES) / len(ATTRIBUTES)


@cache
def new_fact_list(draw="world") -> tuple[tuple[str, str, str], ...]:
    """(name, attribute, value) for every visitor: 96 facts that pre-training never told. Another
    `draw` gives other facts, to choose settings on.
    """
    rng = _rng("new facts", draw, 0)
    values = WORLD.values
    return tuple(
        (name, a, values[a][int(rng.random() * len(values[a]))])
        for name in WORLD.visitors
        for a in ATTRIBUTES
    )


def ask(fact, form: str) -> Example:
    """The fact (name, attribute, value) asked in one of FACT_FORMS."""
    name, attribute, value = fact
    prompt, answer = FACT_FORMS[form]
    return Example(
        prompt.format(attribute=attribute, name=name), " " + answer.format(value=value), label=value
    )


def new_facts(split, seed, draw="world"):
    """Learned in two forms, tested in the third. Validation asks in a learned form."""
    forms = {"train": ("question", "key"), "validation": ("question",), "test": ("what is",)}[split]
    examples = [ask(fact, form) for form in forms for fact in new_fact_list(draw)]
    if split == "train":
        _rng("new facts", split, seed).shuffle(examples)
    return examples


def new_facts_besides():
    """Efficacy: the questions as learned. Locality: what the base knew, in the form of the test."""
    return {
        "as_learned": ("exact", [ask(fact, "question") for fact in new_fact_list()]),
        "old_facts": ("exact", [ask(fact, "what is") for fact in ALL_FACTS]),
    }


def question_answering(split, seed):
    """ "Ada , town ?" about residents: a new way to ask for what the base knows. Half of them are
    never trained on."""
    names = [p.name for p in WORLD.residents]
    group = {
        "test": names[::2],
        "validation": names[1::8],
        "train": [n for n in names[1::2] if n not in names[1::8]],
    }
    examples = [
        Example(f"{name} , {attribute} ?", f" {value} .", label=value)
        for name, attribute, value in ALL_FACTS
        if name in group[split]
    ]
    if split == "train":
        _rng("question answering", split, seed).shuffle(examples)
    return examples


# -- Events: tagging, table-to-text, restyling


def slot_tagging(split, seed):
    """A sentence, then the slot of each word. In every other one somebody bears the name of a
    place, which pre-training never showed: the word alone does not tell."""
    rng = _rng("slot tagging", split, seed)
    return [_tagged(rng) for _ in range(SIZES[split])]


def _tagged(rng):
    def kind(choose, say):
        names = choose((WORLD.places, WORLD.names))
        event = {"who": choose(names)}
        # no document of pre-training begins with a place, so these sentences do not either
        plain = documents.TEMPLATES["plain"] if names is WORLD.places else None
        template.append(documents.any_template(choose, besides=plain))
        documents.sentence(choose, say, WORLD, event, template[0])

    template = []
    text = grammar.sample(kind, rng)
    slots = [w if w in FIELDS else NONE for w in template[0].split()]
    completion = "".join(" -" if s == NONE else f" {s}" for s in slots)
    return Example(f"{text} Table :", completion, tags=(*slots, "", "", *slots))


def table_to_text(split, seed):
    """A record with separators never seen as a pair, into a sentence in a template never seen."""

    def kind(choose, say):
        event = {}
        documents.record(choose, say, WORLD, event, NEW_SEPARATORS, NEW_ORDER)
        say("Text", ":")
        documents.sentence(choose, say, WORLD, event, NEW_TEMPLATES["table_to_text"])

    return _events("table to text", split, seed, kind, " Text :", "table_to_text")


def restyling(split, seed):
    """A sentence in any known template, into one never seen."""

    def kind(choose, say):
        event = {}
        documents.sentence(choose, say, WORLD, event, documents.any_template(choose))
        say("In", "other", "words", ":")
        documents.sentence(choose, say, WORLD, event, NEW_TEMPLATES["restyling"])

    return _events("restyling", split, seed, kind, " In other words :", "restyling")


def _events(name, split, seed, kind, separator, template):
    rng = _rng(name, split, seed)
    texts = [grammar.sample(kind, rng) for _ in range(SIZES[split])]
    return [split_at(text, separator, NEW_TEMPLATES[template]) for text in texts]


def split_at(text: str, separator: str, template: str | None = None) -> Example:
    """The text as an example whose prompt ends with the separator; the answer's slots are tagged if
    its template is given."""
    prompt, completion = text.split(separator)
    prompt += separator
    if template is None:
        return Example(prompt, completion)
    slots = [w if w in FIELDS else "" for w in template.split()]
    return Example(prompt, completion, tags=(*[""] * len(prompt.split()), *slots))


# -- The registry

BAYES = "posterior of the hidden mood, by summing all derivations of the story"
ONE_ANSWER = "0: one answer is right"

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            name="dialect",
            format="stories with other weights; loss on the whole document",
            metric="nats",
            steps=300,
            chance=None,
            floor_from="mean -ln P(text), both moods summed",
            make=dialect,
            optimum=dialect_optimum,
        ),
        Task(
            name="mood",
            format="`STORY It was a good day ?` then `yes .` or `no .`",
            metric="accuracy",
            steps=300,
            chance=0.5,
            floor_from=BAYES,
            make=mood,
            optimum=mood_optimum,
            labels=("yes", "no"),
        ),
        Task(
            name="new_facts",
            format="96 facts about visitors, learned in two forms, asked in a third",
            metric="exact",
            steps=1000,
            random_starts=16,
            chance=GUESS,
            floor_from=ONE_ANSWER,
            make=new_facts,
            optimum=_certain,
            also=new_facts_besides,
        ),
        Task(
            name="question_answering",
            format="`Ada , town ?` then `Alder .`, other residents than trained on",
            metric="exact",
            steps=300,
            chance=GUESS,
            floor_from=ONE_ANSWER,
            make=question_answering,
            optimum=_certain,
        ),
        Task(
            name="slot_tagging",
            format="`SENTENCE Table :` then the slot of each word, `-` for none",
            metric="slots",
            steps=300,
            chance=1 / (len(FIELDS) + 1),
            floor_from=ONE_ANSWER,
            make=slot_tagging,
            optimum=_certain,
            labels=(*FIELDS, NONE),
            per_token=True,
        ),
        Task(
            name="table_to_text",
            format="a record with new separators, `Text :`, a sentence in a new template",
            metric="exact",
            steps=300,
            chance=None,
            floor_from=ONE_ANSWER,
            make=table_to_text,
            optimum=_certain,
            also=lambda: {"slots": ("slots", table_to_text("test", 0))},
        ),
        Task(
            name="restyling",
            format="a sentence, `In other words :`, the same in a new template",
            metric="exact",
            steps=300,
            chance=None,
            floor_from=ONE_ANSWER,
            make=restyling,
            optimum=_certain,
            also=lambda: {"slots": ("slots", restyling("test", 0))},
        ),
    )
}


def describe() -> str:
    """The table of tasks as Markdown, from the registry: the README's own."""
    head = "task|format|metric|steps|floor, nats a document|how|best|perfect, not adapted"
    head += "|chance|head"
    rows = ["| " + head.replace("|", " | ") + " |", "|" + "---|" * 10]
    for t in TASKS.values():
        numbers = [_shown(v) for v in (t.floor, t.best, t.unadapted, t.chance)]
        head = "no" if not t.labels else "per word" if t.per_token else "per document"
        steps = f"{t.steps}" + (f", moved by 0 .. {t.random_starts}" if t.random_starts else "")
        cells = (t.name, t.format, t.metric, steps, numbers[0], t.floor_from, *numbers[1:], head)
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows) + "\n"


def _shown(value):
    return "-" if value is None else f"{value:.3f}"
