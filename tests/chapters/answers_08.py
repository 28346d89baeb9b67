"""Chapter 08, P-tuning."""


def lay(template, segments, vocab_size):
    first, ids = vocab_size + template[0], []
    for segment, count in zip(segments, template[1:]):
        ids += [*segment, *range(first, first + count)]
        first += count
    return ids


def front_laid_too(template, segments, vocab_size):
    front = range(vocab_size, vocab_size + template[0])
    return [*front, *lay(template, segments, vocab_size)]


def ids_start_anew(template, segments, vocab_size):
    ids = []
    for segment, count in zip(segments, template[1:]):
        ids += [*segment, *range(vocab_size, vocab_size + count)]
    return ids


def pseudo_tokens_first(template, segments, vocab_size):
    first, ids = vocab_size + template[0], []
    for segment, count in zip(segments, template[1:]):
        ids += [*range(first, first + count), *segment]
        first += count
    return ids


def labels(ids, vocab_size):
    return [i if i < vocab_size else -100 for i in ids[1:]] + [-100]


def not_shifted(ids, vocab_size):
    return [i if i < vocab_size else -100 for i in ids]


def pseudo_labels(ids, vocab_size):
    return [*ids[1:], -100]


def silent_pseudo_tokens(ids, vocab_size):
    following = labels(ids, vocab_size)
    return [-100 if i >= vocab_size else j for i, j in zip(ids, following)]


def count(D, h, layers):
    later = (layers - 1) * 2 * (4 * h * (2 * h + h) + 8 * h)
    return 2 * (4 * h * (D + h) + 8 * h) + later


REFERENCE = {"08.1": lay, "08.2": labels, "08.3": count}
WRONG = {
    "08.1": [front_laid_too, ids_start_anew, pseudo_tokens_first],
    "08.2": [not_shifted, pseudo_labels, silent_pseudo_tokens],
    "08.3": [
        lambda D, h, layers: layers * 2 * (4 * h * (D + h) + 8 * h),
        lambda D, h, layers: count(D, h, layers) // 2,
        lambda D, h, layers: 2 * (4 * h * (D + h) + 4 * h) * layers,
    ],
}
