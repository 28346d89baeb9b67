r"""What people in Tiny Town write: stories, records, sentences, questions, facts, and the mix the
base is pre-trained on.

    story           0.24   Ada found a bright lamp at dawn . She felt glad . It was a good day .
    record to text  0.20   what : lamp . who : Ada . ... Text : Ada once found that ...
    restyling       0.09   Ada once found that ... In other words : On Monday Ada once ...
    text to record  0.16   Ada once found that ... Table : who : Ada . did : found . ...
    question        0.22   (a record or a sentence) Question : what ? lamp . (two of them)
    facts           0.09   Question : town of Ada ? Answer : Alder .

Every slot has a cue word of its own: "once" before a verb, "that" before a thing, "near" before a
place, "on" before a day. A cue that something random follows elsewhere is not connected with
copying by a model of this size: with "the lamp" here and "the job of Ada" in the questions, things
stayed at chance while the four other slots were copied; with "Ada found" here and in the stories,
verbs did. For the same reason an answer follows right behind what was asked for: "when ? Monday",
as in a record, is one lookup; "when ? Answer : Monday" takes one more to find out what the question
was.

A style is a set of weights for the same decisions. HOME and DIALECT differ in their weights alone,
so a model of HOME can write every story of DIALECT, only less often, and the price of not being
adapted is a finite number.
"""

from dataclasses import dataclass
from functools import partial

from minipeft.town.world import ATTRIBUTES, FIELDS, Person, World

MOODS = ("good", "bad")
SHARES = {
    "story": 24,
    "record_to_text": 20,
    "restyling": 9,
    "text_to_record": 16,
    "question": 22,
    "facts": 9,
}
QUESTIONS = 2  # a document; one alone teaches little for the price of reading five fields
# A pair is what stands between a field and its value, and what stands after the value.
SEPARATORS = ((":", "."), (":", "|"), ("=", ";"), ("=", "|"), ("-", ","), ("-", ";"))
TEMPLATES = {
    "plain": "who once did that what near where on when .",
    "day first": "On when who once did that what near where .",
    "place first": "Near where who once did that what on when .",
    "passive": "Also that what was once did by who near where on when .",
}
# Held back for the tasks; each word of them is known.
NEW_TEMPLATES = {
    "table_to_text": "Near where on when that what was once did by who .",
    "restyling": "On when near where that what was once did by who .",
}


@dataclass(frozen=True)
class Style:
    """Weights of a story's decisions."""

    verb_slope: float  # verb i has weight slope^i
    adjective_slope: (
        float  # adjective i of the mood drawn has weight slope^i; above 1 turns their order round
    )
    favourite: float  # weight of a thing in the same half of its list as the verb, against 1
    time: tuple[int, int, int]  # no time, time in front, time behind
    sky_first: int  # weight of opening with the sky, against 4 for opening with what somebody did
    stop: int  # weight of ending the story, against 9 for the sentences that may still come


HOME = Style(0.8, 0.75, favourite=1, time=(50, 10, 40), sky_first=1, stop=2)
DIALECT = Style(1.7, 1.35, favourite=6, time=(5, 90, 5), sky_first=32, stop=1)

# How often the adjective of a sentence is of the story's own mood. Three different values, so that
# no two sentences that contradict each other leave a story with even odds.
OWN_MOOD = {"did": 0.88, "sky": 0.92, "felt": 0.97}
FURTHER = {
    "felt": 4,
    "sky": 3,
    "fact": 2,
}  # sentences that may follow the first, with their weights
FACT_SENTENCES = {
    "job": "is a {} .",
    "town": "lives in {} .",
    "pet": "has a {} .",
    "drink": "likes {} .",
}


# -- Stories


def story(choose, say, world: World, style: Style = HOME, mood: str | None = None) -> str:
    """A few sentences about one resident on a good or a bad day, which is hidden unless given.
    Returns the mood."""
    mood = mood or choose(MOODS)
    further = dict(FURTHER)
    if choose(("sky", "did"), (style.sky_first, 4)) == "sky":
        _sky(choose, say, world, style, mood)
        del further["sky"]
    person = _did(choose, say, world, style, mood)
    while further:
        kind = choose((*further, "end"), (*further.values(), style.stop))
        if kind == "end":
            break
        del further[kind]
        if kind == "sky":
            _sky(choose, say, world, style, mood)
        elif kind == "felt":
            say(person.pronoun, "felt")
            _adjective(choose, world, style, mood, "felt")
            say(".")
        else:
            attribute = choose(ATTRIBUTES)
            say(person.pronoun, *FACT_SENTENCES[attribute].format(person.facts[attribute]).split())
    return mood


def _sky(choose, say, world, style, mood):
    say("The", "sky", "was")
    _adjective(choose, world, style, mood, "sky")
    say(".")


def _did(choose, say, world, style, mood) -> Person:
    place = choose(("none", "front", "behind"), style.time)
    if place == "front":
        say("At")
        choose(world.times, aloud=True)
    person = world.resident(choose(world.resident_names, aloud=True))
    verb = choose(world.verbs, _slope(style.verb_slope, world.verbs), aloud=True)
    say("a")
    _adjective(choose, world, style, mood, "did")
    choose(world.things, _thing_weights(world, style, verb), aloud=True)
    if place == "behind":
        say("at")
        choose(world.times, aloud=True)
    say(".")
    return person


def _thing_weights(world, style, verb):
    half = world.verbs.index(verb) * 2 >= len(world.verbs)
    n = len(world.things)
    return [style.favourite if (j * 2 >= n) == half else 1 for j in range(n)]


def _adjective(choose, world, style, mood, sentence):
    own, other = (world.good, world.bad) if mood == "good" else (world.bad, world.good)
    share = OWN_MOOD[sentence]
    slope = _slope(style.adjective_slope, own)
    scale = share / sum(slope), (1 - share) / sum(slope)
    choose(own + other, [scale[0] * w for w in slope] + [scale[1] * w for w in slope], aloud=True)


def _slope(slope, words):
    return [slope**i for i in range(len(words))]


def story_with_tail(choose, say, world: World, style: Style = HOME) -> None:
    """A story that says its mood in three cases of five: this is what teaches a base to read
    moods."""
    mood = story(choose, say, world, style)
    tail = choose(("none", "day", "mood"), (4, 3, 3))
    if tail == "day":
        say("It", "was", "a", mood, "day", ".")
    elif tail == "mood":
        say("Mood", ":", mood, ".")


# -- Records and sentences


def sentence(choose, say, world: World, event: dict, template: str) -> None:
    """The event in a template. Fields the event lacks are drawn, in the order in which they are
    said."""
    for word in template.split():
        if word in FIELDS:
            _field(choose, say, world, event, word)
        else:
            say(word)


def record(choose, say, world: World, event: dict, separators, order=None) -> None:
    """ "who : Ada . did : found . ..." in the given order of fields, or in a random one."""
    between, behind = separators
    left = list(order or FIELDS)
    while left:
        if order:
            say(key := left[0])
        else:
            key = choose(tuple(left), aloud=True)
        left.remove(key)
        say(between)
        _field(choose, say, world, event, key)
        say(behind)


def _field(choose, say, world, event, key):
    if key in event:
        say(event[key])
    else:
        event[key] = choose(world.record_values(key), aloud=True)


def any_template(choose, besides: str | None = None) -> str:
    """One of the pre-training templates, other than `besides`."""
    return choose(tuple(t for t in TEMPLATES.values() if t != besides))


def record_to_text(choose, say, world: World) -> None:
    event = {}
    record(choose, say, world, event, choose(SEPARATORS))
    say("Text", ":")
    sentence(choose, say, world, event, any_template(choose))


def text_to_record(choose, say, world: World) -> None:
    event = {}
    sentence(choose, say, world, event, any_template(choose))
    say("Table", ":")
    record(choose, say, world, event, choose(SEPARATORS))


def restyling(choose, say, world: World) -> None:
    event, first = {}, any_template(choose)
    sentence(choose, say, world, event, first)
    say("In", "other", "words", ":")
    sentence(choose, say, world, event, any_template(choose, besides=first))


def question(choose, say, world: World) -> None:
    """A record or a sentence, then two questions about it: the answers stand in the document."""
    event = {}
    if choose(("record", "sentence")) == "record":
        record(choose, say, world, event, choose(SEPARATORS))
    else:
        sentence(choose, say, world, event, any_template(choose))
    left = list(FIELDS)
    for _ in range(QUESTIONS):
        say("Question", ":")
        key = choose(tuple(left), aloud=True)
        left.remove(key)
        say("?", event[key], ".")


# -- Facts

# Three ways to ask for the same fact, as (prompt, completion). New facts are learned in two and
# asked in the third.
FACT_FORMS = {
    "question": ("Question : {attribute} of {name} ? Answer :", "{value} ."),
    "key": ("{attribute} of {name} :", "{value} ."),
    "what is": ("What is the {attribute} of {name} ?", "{value} ."),
}


def facts(choose, say, world: World) -> None:
    """Something about a resident: asked in three ways, as a profile, or as a yes-no question."""
    form = choose((*FACT_FORMS, "profile", "check"), (3, 3, 3, 1, 3))
    if form == "profile":
        person = world.resident(choose(world.resident_names, aloud=True))
        say("the", person.facts["job"], "lives", "in", person.facts["town"], "with", "a")
        say(person.facts["pet"], ".", person.pronoun, "likes", person.facts["drink"], ".")
        return
    attribute = choose(ATTRIBUTES)
    if form == "check":
        say("Is", "the", attribute, "of")
        person = world.resident(choose(world.resident_names, aloud=True))
        _check(choose, say, world, attribute, person.facts[attribute])
        return
    person = choose(world.residents)
    true = person.facts[attribute]
    for part in FACT_FORMS[form]:
        say(*part.format(attribute=attribute, name=person.name, value=true).split())


def _check(choose, say, world, attribute, true):
    wrong = tuple(v for v in world.values[attribute] if v != true)
    truth = choose(("yes", "no")) if wrong else "yes"
    choose((true,) if truth == "yes" else wrong, aloud=True)
    say("?", truth, ".")


# -- The mix

KINDS = {
    "story": story_with_tail,
    "record_to_text": record_to_text,
    "restyling": restyling,
    "text_to_record": text_to_record,
    "question": question,
    "facts": facts,
}


def mix(choose, say, world: World) -> None:
    """One document of the pre-training mix."""
    KINDS[choose(tuple(SHARES), tuple(SHARES.values()))](choose, say, world)


def of(world: World, kind, **given):
    """The document kind with its world (and style, mood ...) filled in: a function of `choose` and
    `say` alone."""
    return partial(kind, world=world, **given)
