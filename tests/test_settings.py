"""Settings travel through JSON and come back equal, or are refused when they are written."""

import json
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minipeft import IA3, LoRA, settings
from minipeft.technique import Technique

SHARED = LoRA(rank=4, alpha=7, targets=("q", "k", "v"), share_qkv=True)


@dataclass(frozen=True)
class Inner:
    width: int = 3
    names: tuple[str, ...] = ("a",)


@dataclass(frozen=True)
class Outer(Technique):
    inner: Inner | None = None
    pairs: tuple[tuple[str, int], ...] = ()
    table: dict[int, Inner] | None = None
    parts: list | None = None
    base: Technique | None = None
    ratio: float | tuple[float, ...] = 0.5


@pytest.fixture
def outer(monkeypatch):
    """Let the registry find Outer."""
    known = settings.technique_class
    monkeypatch.setattr(settings, "technique_class", lambda n: Outer if n == "Outer" else known(n))


@pytest.mark.parametrize(
    "technique",
    [
        Outer(),
        Outer(inner=Inner(5, ("b", "c")), pairs=(("q", 3), ("blocks.0.attn.v", 0))),
        Outer(table={3: Inner(), -1: Inner(2, ())}, ratio=(0.25, 1.0)),
        Outer(parts=[LoRA(rank=2, targets=("o",)), IA3()], base=SHARED),
        Outer(base=Outer(parts=[Outer()])),
    ],
)
def test_nested_settings_survive_json(outer, technique):
    text = json.dumps(settings.encode_settings(technique))
    again = settings.decode_settings({"minipeft_type": "Outer", "settings": json.loads(text)})
    assert again == technique
    assert type(again.parts) is type(technique.parts)


def test_settings_that_json_cannot_hold_are_an_error(outer):
    with pytest.raises((ValueError, TypeError), match="JSON"):
        settings.encode_settings(Outer(parts=[object()]))
    with pytest.raises(ValueError, match="does not survive"):
        settings.encode_settings(Outer(table={"3": Inner()}))  # a str where an int is declared


@given(
    st.builds(
        LoRA,
        rank=st.integers(1, 32),
        alpha=st.floats(allow_nan=False, allow_infinity=False),
        targets=st.lists(st.sampled_from(["q", "v", "o"]), unique=True).map(tuple),
        rank_pattern=st.lists(st.tuples(st.text(), st.integers())).map(tuple),
    )
)
def test_any_lora_s_settings_survive_json(technique):
    values = json.loads(json.dumps(settings.encode(technique)))
    assert settings.decode(values, Technique) == technique
