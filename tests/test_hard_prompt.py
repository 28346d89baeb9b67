"""Hard prompts: contexts, exact scores, search, few-shot learning."""

import math

import pytest
import torch

from minipeft.soft_prompt import hard_prompt
from minipeft.soft_prompt.hard_prompt import (
    ROWS,
    Example,
    HardPrompt,
    answer_scores,
    classify,
    demonstrations_from,
    greedy_answer,
    in_context,
    score,
    search,
    search_words,
)
from tests.tiny import close

EXACT = 1e-12  # float64, relative: a few hundred roundings of 1e-16
ANSWERS = [(3,), (8, 20)]
EXAMPLES = [
    Example((5, 9), (3,)),
    Example((41,), (8, 20)),
    Example((7, 7, 60), (3,)),
    Example((30, 2), (8, 20)),
    Example((90,), (8, 20)),
]
PROMPT = HardPrompt(before=(50, 51), after=(52,), between=(53,))


def log_probability(model, context, answer):
    """log p(answer | context), one token and one forward pass at a time."""
    total, text = 0.0, list(context)
    for token in answer:
        total += model(torch.tensor([text]))[0, -1].log_softmax(-1)[token].item()
        text.append(token)
    return total


def test_a_context_is_the_demonstrations_and_the_template_around_the_text():
    """(Hard prompt 1)"""
    demos = EXAMPLES[:2]
    shown = [50, 51, 5, 9, 52, 3, 53, 50, 51, 41, 52, 8, 20, 53]
    assert PROMPT.context((1, 2), demos) == [*shown, 50, 51, 1, 2, 52]
    assert PROMPT.context((1, 2)) == [50, 51, 1, 2, 52]
    assert HardPrompt().context((1, 2)) == [1, 2]


def test_scores_are_the_answers_log_probabilities(model):
    """(Hard prompt 2), with contexts and answers of different lengths in one batch."""
    contexts = [PROMPT.context(e.text) for e in EXAMPLES]
    scores = answer_scores(model, contexts, [ANSWERS] * 5)
    assert scores.shape == (5, 2)
    for b, context in enumerate(contexts):
        for c, answer in enumerate(ANSWERS):
            assert math.isclose(
                scores[b, c], log_probability(model, context, answer), rel_tol=EXACT
            )


def test_many_rows_are_scored_in_parts(model):
    contexts = [[1 + n % 90, 2] for n in range(ROWS + 5)]
    scores = answer_scores(model, contexts, [[(3,)]] * len(contexts))
    alone = answer_scores(model, contexts[-1:], [[(3,)]])
    close(scores[-1:], alone, EXACT)


def test_nothing_to_read_or_to_answer_is_an_error(model):
    with pytest.raises(ValueError, match="at least one token"):
        answer_scores(model, [[]], [[(3,)]])
    with pytest.raises(ValueError, match="at least one token"):
        answer_scores(model, [[1]], [[()]])
    with pytest.raises(ValueError, match="token id 97"):
        answer_scores(model, [[1]], [[(97,)]])


def test_loss_and_accuracy_are_over_the_set_of_answers(model):
    """(Hard prompt 3)"""
    found, loss, right = score(model, PROMPT, EXAMPLES, ANSWERS), 0.0, 0
    for e in EXAMPLES:
        s = [log_probability(model, PROMPT.context(e.text), a) for a in ANSWERS]
        truth = ANSWERS.index(e.answer)
        loss += math.log(sum(map(math.exp, s))) - s[truth]
        right += s[truth] == max(s)
    assert found.prompt == PROMPT
    assert math.isclose(found.loss, loss / 5, rel_tol=EXACT) and found.accuracy == right / 5


def test_without_a_set_the_answer_s_own_probability_counts(model):
    """(Hard prompt 3), second form: right is what greedy decoding would write."""
    context = PROMPT.context((5, 9))
    likeliest = greedy_answer(model, context, 2)
    examples = [Example((5, 9), tuple(likeliest)), Example((5, 9), (likeliest[0], 1))]
    found = score(model, PROMPT, examples)
    own = [log_probability(model, context, e.answer) for e in examples]
    assert math.isclose(found.loss, -sum(own) / 2, rel_tol=EXACT)
    assert found.accuracy == 0.5 and likeliest[1] != 1


def test_the_class_is_the_likeliest_answer(model):
    texts = [e.text for e in EXAMPLES]
    demos = EXAMPLES[:1]
    chosen = classify(model, PROMPT, texts, ANSWERS, demos)
    for n, text in enumerate(texts):
        s = [log_probability(model, PROMPT.context(text, demos), a) for a in ANSWERS]
        assert s[chosen[n]] == max(s)


# -- search


def test_search_puts_the_best_template_first(model):
    prompts = [HardPrompt((w,), (w + 1,)) for w in (10, 20, 30, 40)]
    ranked = search(model, prompts, EXAMPLES, ANSWERS)
    assert [s.loss for s in ranked] == sorted(s.loss for s in ranked)
    assert {s.prompt for s in ranked} == set(prompts)
    assert ranked[0] == score(model, ranked[0].prompt, EXAMPLES, ANSWERS)


@pytest.mark.parametrize("place", ["before", "after"])
def test_a_search_over_words_ends_where_no_single_word_helps(model, place):
    words = (10, 20, 30, 40)
    found = search_words(model, words, 2, EXAMPLES, ANSWERS, place=place)
    chosen = getattr(found.prompt, place)
    assert len(chosen) == 2 and set(chosen) <= set(words)
    for n in range(2):
        for word in words:
            other = list(chosen)
            other[n] = word
            tried = score(model, HardPrompt(**{place: tuple(other)}), EXAMPLES, ANSWERS)
            assert tried.loss >= found.loss - EXACT
    first = score(model, HardPrompt(**{place: (10, 10)}), EXAMPLES, ANSWERS)
    assert found.loss < first.loss, "and it has moved from where it began"


def test_a_search_goes_round_again_while_anything_helps(model, monkeypatch):
    """The first word improves only after the second one has: that takes a second round."""
    losses = {(0, 0): 5.0, (0, 1): 4.0, (2, 1): 1.0}

    def made_up(model, prompt, examples, answers=None):
        return hard_prompt.Scored(prompt, losses.get(prompt.before, 6.0), 0.0)

    monkeypatch.setattr(hard_prompt, "score", made_up)
    found = search_words(model, (0, 1, 2), 2, EXAMPLES, ANSWERS)
    assert found.prompt.before == (2, 1)


def test_a_search_can_start_from_a_template(model):
    start = HardPrompt(before=(10, 20), after=(77,))
    found = search_words(model, (10, 20, 30), 2, EXAMPLES, ANSWERS, start=start)
    assert found.prompt.after == (77,)
    assert found.loss <= score(model, start, EXAMPLES, ANSWERS).loss


# -- in-context learning


def test_demonstrations_are_spread_over_the_answers():
    for seed in range(5):
        shown = demonstrations_from(EXAMPLES, 4, seed)
        assert [e.answer for e in shown].count((3,)) == 2 and len(set(shown)) == 4
    assert len({demonstrations_from(EXAMPLES, 4, seed) for seed in range(8)}) > 4
    assert demonstrations_from(EXAMPLES, 2, 3) == demonstrations_from(EXAMPLES, 2, 3)


def test_the_order_of_answers_in_demonstrations_varies():
    firsts = {demonstrations_from(EXAMPLES, 2, seed)[0].answer for seed in range(20)}
    assert firsts == set(ANSWERS)


def test_too_many_demonstrations_are_an_error():
    with pytest.raises(ValueError, match="6 demonstrations cannot be drawn from 5"):
        demonstrations_from(EXAMPLES, 6)


def test_zero_one_and_few_shot(model):
    test = [Example((11, 12), (3,)), Example((13,), (8, 20))]
    found = in_context(model, PROMPT, EXAMPLES, test, ANSWERS, shots=(0, 1, 3), seed=2)
    assert list(found) == [0, 1, 3]
    assert found[0] == score(model, PROMPT, test, ANSWERS)
    shown = demonstrations_from(EXAMPLES, 3, 2)
    assert found[3] == score(model, PROMPT, test, ANSWERS, shown)


def test_a_context_too_short_for_the_examples_is_an_error(model):
    with pytest.raises(ValueError, match="context_length=64 is too short"):
        score(model, PROMPT, EXAMPLES, ANSWERS, EXAMPLES * 3)


def test_scores_are_those_of_eval_mode(model):
    """A model fresh from its making is in train mode, and dropout is no part of a template."""
    wanted = answer_scores(model, [[1, 2]], [[[4], [5]]])
    greedy = hard_prompt.greedy_answer(model, [1, 2], 6)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    model.train()
    assert torch.equal(answer_scores(model, [[1, 2]], [[[4], [5]]]), wanted)
    assert hard_prompt.greedy_answer(model, [1, 2], 6) == greedy
    assert model.training


def test_what_does_not_fit_together_is_named(model):
    with pytest.raises(ValueError, match=r"2 contexts with \[1, 3\] answers"):
        answer_scores(model, [[1, 2], [3]], [[[4]], [[5], [6], [7]]])
    with pytest.raises(ValueError, match="0 contexts"):
        score(model, HardPrompt(), [])
    with pytest.raises(ValueError, match=r"answer=\(2,\) of an example is none of"):
        score(model, HardPrompt((1,)), [Example((1,), (2,))], answers=[(3,), (4,)])
