"""Chapter 00, start here."""

from __future__ import annotations

from minipeft.wrap import resolve

import kit


def exercise_1(answer):
    model = kit.base()[0]
    assert isinstance(answer, str), f"a path is a string, not {answer!r}"
    try:
        found = resolve(model, answer)
    except (ValueError, AttributeError):
        raise AssertionError(f"the model has nothing at {answer!r}") from None
    assert found is not model.blocks[0].attn.v, (
        "that is the first block; blocks count from 0"
    )
    assert found is model.blocks[-1].attn.v, (
        f"{answer!r} is there, but it is something else"
    )


def exercise_2(answer):
    small = {
        "a": ({}, "low_rank", 30),
        "zz": ({}, "additive", 7),
        "b": ({}, "additive", 12),
    }
    assert answer(small) == "zz", (
        "try it on a family of three: the one with 7 should be found"
    )
    small["c"] = ({}, "selective", 5)
    assert answer(small) == "c", "the one with 5 should be found now"


def exercise_3(answer):
    text = (
        "as (LoRA 2) says, not (LoRA 1); see (P-tuning 3), (LoRA 2) and LoRA 4"
    )
    found = answer(text + " (in 2019) (lora 7)")
    assert "LoRA 4" not in found, "LoRA 4 stands there without brackets"
    assert "in 2019" not in found, "an id begins with a capital letter"
    assert "lora 7" not in found, "an id begins with a capital letter"
    assert "P-tuning 3" in found, "a name may hold a hyphen"
    assert list(found) == sorted(found), "sort them"
    assert list(found) == ["LoRA 1", "LoRA 2", "P-tuning 3"], (
        "each id once, without brackets"
    )
