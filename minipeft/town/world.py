r"""Who and what there is in Tiny Town: residents with facts, visitors without, and the words
documents are made of.

Every word is one token of our tokenizer, so nats a word and nats a token are the same thing. Eight
visitors bear the names of places ("near Florence", "Florence found"), so a word alone does not
always tell its role.
"""

import random
from dataclasses import dataclass, field
from functools import cached_property

ATTRIBUTES = ("job", "town", "pet")
FIELDS = ("who", "did", "what", "when", "where")


@dataclass(frozen=True)
class Person:
    """A resident; `facts` maps job, town and pet to this person's."""

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
}


def _names(*lines):
    return tuple(name for line in lines for name in line.split())


WOMEN = _names(
    "Ada Bea Cora Dora Edith Flora Greta Hilda Ida Jane Kate Lena Mona Nora Olga Paula Rita Sara",
    "Tina Ursula Vera Wilma Zoe Agnes",
)
MEN = _names(
    "Adam Ben Carl David Emil Frank George Hugo Ivan Jack Karl Leo Max Ned Otto Paul Ralph Sam",
    "Tom Ulf Victor Will Xaver Zeno",
)
# The first eight visitors bear the names of the eight places.
PLACES = _names("Florence Chester Lincoln Sydney Austin Dallas Charlotte Victoria")
VISITORS = PLACES + _names(
    "Arno Boris Clara Diana Elsa Fritz Gina Heidi Iris Jonas Klaus Lisa Marta Nils Oskar Petra",
    "Rosa Simon Thea Uwe Viola Wanda Yara Anton",
)


def build_world(seed: int = 0) -> World:
    """The town every number of this project is about: 48 residents with facts drawn by `seed`, 32
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
    values = {"job": ("baker", "farmer"), "town": ("Alder",), "pet": ("cat",)}
    ada = Person("Ada", "She", {"job": "baker", "town": "Alder", "pet": "cat"})
    ben = Person("Ben", "He", {"job": "farmer", "town": "Alder", "pet": "cat"})
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
