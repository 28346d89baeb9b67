"""Chapter 08, P-tuning."""

from __future__ import annotations

import torch


def exercise_1(answer):
    cases = [
        ((2, 1), [[5, 6]], 97, [5, 6, 99]),
        ((0, 2), [[1]], 10, [1, 10, 11]),
        ((3, 1, 2), [[7, 8], [9]], 50, [7, 8, 53, 9, 54, 55]),
        ((1, 0, 1), [[4], [4, 4]], 20, [4, 4, 4, 21]),
    ]
    for template, segments, V, wanted in cases:
        got = list(answer(template, segments, V))
        front = list(range(V, V + template[0]))
        assert got[: len(front)] != front or not front, (
            "the pseudo tokens in front are put there by the model, leave them out"
        )
        assert [i for i in got if i < V] == [i for s in segments for i in s], (
            f"for {template} the words of the segments are not there in order"
        )
        used = [i for i in got if i >= V]
        assert len(set(used)) == len(used), "each pseudo token has its own id"
        assert got == wanted, (
            f"for {template}, {segments} and {V} words the pseudo tokens are wrong or misplaced"
        )


def exercise_2(answer):
    V = 10
    for ids in ([3, 10, 4, 11, 12, 5], [1, 2], [7, 10], [10, 10, 9]):
        got = list(answer(ids, V))
        assert len(got) == len(ids), f"{len(got)} labels for {len(ids)} ids"
        assert got[-1] == -100, "nothing follows the last id"
        assert all(label < V for label in got), (
            "a label asks for a pseudo token, which no text contains"
        )
        for here, following, label in zip(ids, ids[1:], got):
            if following < V:
                assert label == following, (
                    f"after {here} comes {following}, which is a word and counts"
                )
            else:
                assert label == -100, "a pseudo token as next id is -100"


def exercise_3(answer):
    for D, h, layers in [(8, 4, 1), (6, 5, 2), (3, 2, 3)]:
        lstm = torch.nn.LSTM(D, h, layers, bidirectional=True)
        wanted = sum(p.numel() for p in lstm.parameters())
        got = answer(D, h, layers)
        one = 2 * (4 * h * (D + h) + 8 * h)
        if layers > 1:
            assert got != one * layers, (
                "layers above the first do not read rows of width D: what do they read?"
            )
        assert got != wanted / 2, "one direction is missing"
        assert got == wanted, (
            f"not the number for D={D}, h={h}, layers={layers}"
        )
