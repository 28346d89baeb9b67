r"""Who and what there is in Tiny Town: residents with facts, visitors without, and the words
documents are made of.

Every word is one token of our tokenizer, so nats a word and nats a token are the same thing. Places
bear names that people could have too; a task makes use of it (tasks.slot_tagging).
"""

import random
from dataclasses import dataclass, field
from functools import cached_property

ATTRIBUTES = ("job", "town", "pet", "drink")
FIELDS = ("who", "did", "what", "when", "where")


@dataclass(frozen=True)
class Person:
    """A resident; `facts` maps job, town, pet and drink to this person's."""

    name: str
    pronoun: str
    facts: dict[str, str] = field(hash=False)


@dataclass(frozen=True)
class World:
    """The words of a town. `good` and `bad` are adjectives, `values` the possible facts of each
    attribute."""

    residents: tuple[Person, ...]
    visitors: tuple[str, ...]
    good: tuple[str, ...]
    bad: tuple[str, ...]
    verbs: tuple[str, ...]
    things: tuple[str, ...]
    times: tuple[str, ...]
    days: tuple[str, ...]
    places: tuple[str, ...]
    values: dict[str, tuple[str, ...]] = field(hash=False)

    @cached_property
    def resident_names(self) -> tuple[str, ...]:
        return tuple(p.name for p in self.residents)

    @cached_property
    def _by_name(self) -> dict[str, Person]:
        return {p.name: p for p in self.residents}

    def resident(self, name: str) -> Person:
        """The resident of this name; KeyError for visitors and strangers."""
        return self._by_name[name]

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Everybody who can appear in a record."""
        return self.resident_names + self.visitors

    def record_values(self, key: str) -> tuple[str, ...]:
        """What the field `key` of a record (who, did, what, when, where) can hold."""
        return {
            "who": self.names,
            "did": self.verbs,
            "what": self.things,
            "when": self.days,
            "where": self.places,
        }[key]


VALUES = {
    "job": (
        "baker",
        "farmer",
        "miller",
        "tailor",
        "nurse",
        "teacher",
        "sailor",
        "painter",
        "smith",
        "clerk",
    ),
    "town": ("Alder", "Birch", "Cedar", "Elm", "Hazel", "Maple", "Oak", "Rowan"),
    "pet": ("cat", "dog", "goat", "hen", "horse", "parrot"),
    "drink": ("tea", "milk", "cider", "coffee", "juice", "cocoa"),
}


def _names(*lines):
    return tuple(name for line in lines for name in line.split())


WOMEN = _names("Ada Bea Cora Dora Edith Flora Greta Hilda Ida Jane Kate Lena Mona Nora Olga Paula")
MEN = _names("Adam Ben Carl David Emil Frank George Hugo Ivan Jack Karl Leo Max Ned Otto Paul")
VISITORS = _names(
    "Arno Boris Clara Diana Elsa Fritz Gina Heidi Iris Jonas Klaus Lisa Marta Nils Oskar Petra",
    "Rosa Simon Thea Uwe Viola Wanda Yara Anton",
)
PLACES = _names("Florence Chester Lincoln Sydney Austin Dallas Charlotte Victoria")


def build_world(seed: int = 0) -> World:
    """The town every number of this project is about: 32 residents with facts drawn by `seed`, 24
    visitors."""
    rng = random.Random(f"world/{seed}")
    people = [(name, "She") for name in WOMEN] + [(name, "He") for name in MEN]
    residents = tuple(
        Person(
            name,
            pronoun,
            {key: VALUES[key][int(rng.random() * len(VALUES[key]))] for key in ATTRIBUTES},
        )
        for name, pronoun in people
    )
    return World(
        residents=residents,
        visitors=VISITORS,
        good=("bright", "calm", "warm", "kind", "glad", "fine"),
        bad=("dark", "cold", "harsh", "sad", "rough", "grim"),
        verbs=("found", "lost", "bought", "sold", "painted", "cleaned", "borrowed", "fixed"),
        things=(
            "lamp",
            "hat",
            "book",
            "chair",
            "clock",
            "bell",
            "basket",
            "violin",
            "ladder",
            "mirror",
        ),
        times=("dawn", "noon", "dusk", "night", "lunch", "supper"),
        days=("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"),
        places=PLACES,
        values=VALUES,
    )


def tiny_world() -> World:
    """Two people and one or two words of each sort: small enough that tests enumerate all its
    documents."""
    values = {"job": ("baker", "farmer"), "town": ("Alder",), "pet": ("cat",), "drink": ("tea",)}
    ada = Person("Ada", "She", {"job": "baker", "town": "Alder", "pet": "cat", "drink": "tea"})
    ben = Person("Ben", "He", {"job": "farmer", "town": "Alder", "pet": "cat", "drink": "tea"})
    return World(
        residents=(ada, ben),
        visitors=("Florence",),
        good=("bright",),
        bad=("dark",),
        verbs=("found", "lost"),
        things=("lamp", "hat"),
        times=("dawn",),
        days=("Monday",),
        places=("Florence",),
        values=values,
    )
