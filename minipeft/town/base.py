r"""The pre-trained base: the data it learns from, the recipe, and the measurements it has to pass.

The recipe, and what each part is for:

    915,000 parameters        4 layers, width 128, context 128: adapting it takes seconds
    one document a row        a floor is about whole documents; a random crop changes the optimum
    random start positions    half the batches begin at 0, the others anywhere up to 48, so that
                              virtual tokens in front move the text to positions the base knows
    sinusoids, then training  the position table starts where "three further on" is one rotation
                              everywhere, so the shifted starts are learned sooner
    tokens N(0, 0.04^2)       with a tied head, larger rows tell words apart from the first step
    batches of like length    8 batches at a time are sorted by length, for little padding; each
                              document weighs the same, or the short ones would count more

Footgun: reading moods and copying by key arrive as jumps, late. A base that stopped before them
looks fine in nats and cannot be adapted to anything by the small techniques; hence `measure`, and
tests/test_base.py on the shipped base.
"""

import math
import random
from dataclasses import replace
from functools import cache

import torch

from minipeft.cross_entropy import IGNORE
from minipeft.dataset import Example, encode_all
from minipeft.dispatch import forced
from minipeft.evaluation import METRICS, evaluate_nats, slot_accuracy
from minipeft.gpt import GPT, GPTConfig
from minipeft.tokenizer import Tokenizer, train_bpe
from minipeft.town import documents, grammar, tasks
from minipeft.town.documents import KINDS, of
from minipeft.training import TrainingConfig, train

DOCUMENTS = 200_000
VOCABULARY_DOCUMENTS = 20_000
STEPS = 14_000
HELD_OUT = 400  # documents of a measurement


def pretraining_documents(seed: int = 0, count: int = DOCUMENTS) -> list[str]:
    """The first `count` documents of the pre-training mix."""
    rng, kind = random.Random(f"pretraining/{seed}"), tasks.mix()
    return [grammar.sample(kind, rng) for _ in range(count)]


def train_tokenizer(texts) -> Tokenizer:
    """Merges until every word is one token and no pair is left."""
    return Tokenizer(train_bpe(texts[:VOCABULARY_DOCUMENTS], vocab_size=4096))


def new_base(vocab_size: int, seed: int = 0) -> GPT:
    """The untrained base, initialised as this file's header says."""
    torch.manual_seed(seed)
    model = GPT(
        GPTConfig(vocab_size=vocab_size, context_length=128, n_layer=4, n_head=4, d_model=128)
    )
    with torch.no_grad():
        model.embed.token.weight.normal_(0, 0.04)
        model.embed.position.weight.copy_(0.05 * sinusoids(*model.embed.position.weight.shape))
    return model


def sinusoids(length: int, width: int) -> torch.Tensor:
    """(length, width): sin and cos of t / 10000^(i / (width/2)) in turn (Vaswani et al. 2017,
    arXiv:1706.03762)."""
    places, pairs = torch.arange(length)[:, None], torch.arange(width // 2)
    angles = places / 10000 ** (pairs / (width // 2))
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(1)


def recipe(steps: int = STEPS, seed: int = 0) -> TrainingConfig:
    """How the base is trained: 14,000 steps of 32 documents."""
    return TrainingConfig(
        steps=steps,
        batch_size=32,
        learning_rate=3e-3,
        schedule="cosine",
        warmup=100 / steps if steps > 100 else 0.1,
        min_lr_ratio=0.03,
        betas=(0.9, 0.95),
        weight_decay=0.01,
        seed=seed,
        pool=8,
        random_starts=48,
        precision="float32",
        device="cpu",  # the same bits on every machine of a kind
    )


def pretrain(texts, tokenizer, steps=STEPS, seed: int = 0, show=True, evaluate=None) -> GPT:
    """Train the base on the texts. About a quarter of an hour on one core.

    The definitions run, none of their faster twins: a twin's last bits may be others, and the base
    must come out the same when a twin is added.

    evaluate(model): called every 1,000 steps; it changes nothing.
    """
    data = encode_all([Example(completion=text) for text in texts], tokenizer)
    model = new_base(tokenizer.vocab_size, seed)
    config = recipe(steps, seed)
    if evaluate is not None:
        config = replace(config, eval_every=1000)
    average = sum(row.count for row in data) / len(data)
    loss = document_loss(average)
    with forced("off"):
        train(model, data, config, loss_fn=loss, evaluate=evaluate, show=show)
    return model.eval()


def document_loss(average: float):
    """A loss in which every document weighs the same: a batch's nats over rows times the average
    number of labels. The mean over a batch's own labels would weigh short documents more, because
    batches are of like length, and the base would believe that they come more often."""

    def loss(model, batch):
        labels = (batch.labels != IGNORE).sum()
        mean = model.loss(batch.ids, batch.labels, start=batch.start)
        return mean * labels / (len(batch.ids) * average)

    return loss


# -- Measurements


@cache
def held_out(kind: str | None = None, count: int = HELD_OUT) -> tuple[str, ...]:
    """Documents of one kind (None: the mix) that pre-training has not drawn."""
    rng = random.Random(f"held out/{kind}")
    document = tasks.mix() if kind is None else of(tasks.WORLD, KINDS[kind])
    return tuple(grammar.sample(document, rng) for _ in range(count))


@cache
def mix_floor(kind: str | None = None) -> float:
    """Nats of a held-out document for a perfect model of the mix."""
    return grammar.nats(tasks.mix(), held_out(kind))


def measure(model, tokenizer) -> dict[str, float]:
    """What the base can do, next to the best possible: one flat table, the same that data/base.json
    holds."""
    whole = {kind: [Example(completion=t) for t in held_out(kind)] for kind in (None, *KINDS)}
    found = {"mix": METRICS["nats"](model, whole[None], tokenizer), "mix floor": mix_floor()}
    for kind in KINDS:
        found[f"{kind}"] = METRICS["nats"](model, whole[kind], tokenizer)
        found[f"{kind} floor"] = mix_floor(kind)
    found["mix at start 16"] = evaluate_nats(model, whole[None], tokenizer, start=16).per_document
    found |= measure_copying(model, tokenizer)
    found |= measure_mood(model, tokenizer)
    found["facts exact"] = METRICS["exact"](
        model,
        [tasks.ask(f, form) for f in tasks.ALL_FACTS for form in documents.FACT_FORMS],
        tokenizer,
    )
    home = tasks.home_documents()
    found |= {"home": METRICS["nats"](model, home, tokenizer), "home floor": tasks.home_floor()}
    dialect = tasks.TASKS["dialect"]
    found |= {
        "dialect": METRICS["nats"](model, dialect.test(), tokenizer),
        "dialect floor": dialect.floor,
    }
    return found


def measure_copying(model, tokenizer) -> dict[str, float]:
    """Table-to-text in nats and slot by slot, and answers that stand in the document."""
    texts = [t.partition(" Text :") for t in held_out("record_to_text")]
    written = [Example(a + b, c, tags=_slots(a + b, c)) for a, b, c in texts]
    asked = [_last_question(t) for t in held_out("question")]
    found = {
        "table to text": METRICS["nats"](model, written, tokenizer),
        "table to text floor": math.log(len(documents.TEMPLATES)),
        "in-context answers": METRICS["exact"](model, asked, tokenizer),
    }
    slots = slot_accuracy(model, written, tokenizer)
    return found | {f"slot {name}": slots[name] for name in sorted(slots)}


def _last_question(text):
    prompt, separator, answer = text.rpartition(" ?")
    return Example(prompt + separator, answer)


def _slots(prompt, completion):
    """Tags of the answer's words: the slot whose value the record gives, where copying alone can
    know the word.

    The first word of a sentence tells the template as well; it is tagged only where it is no free
    choice.
    """
    words = prompt.split()
    values = {words[i + 2]: w for i, w in enumerate(words) if w in tasks.FIELDS}
    answer = completion.split()
    tags = ["" if i == 0 else values.get(w, "") for i, w in enumerate(answer)]
    return (*[""] * len(words), *tags)


def measure_mood(model, tokenizer) -> dict[str, float]:
    """Reading the mood off a story in the words of pre-training, against Bayes on the same
    stories."""
    examples = tasks.TASKS["mood"].test()
    moods = {answer: mood for mood, answer in tasks.MOOD_ANSWERS.items()}
    said = [
        Example(x.prompt.removesuffix(tasks.MOOD_QUESTION) + " Mood :", f" {moods[x.label]} .")
        for x in examples
    ]
    return {
        "mood read-out": METRICS["accuracy"](model, said, tokenizer),
        "mood Bayes": tasks.TASKS["mood"].best,
    }
