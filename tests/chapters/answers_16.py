"""Chapter 16, QLoRA and the paged optimizer."""


def least_recently_used(touches, frames):
    resident, faults = [], 0
    for page in touches:
        if page in resident:
            resident.remove(page)
        else:
            faults += 1
            if len(resident) == frames:
                resident.pop(0)
        resident.append(page)
    return faults


def first_in_first_out(touches, frames):
    resident, faults = [], 0
    for page in touches:
        if page not in resident:
            faults += 1
            resident = [*resident, page][-frames:]
    return faults


def most_recently_used(touches, frames):
    resident, faults = [], 0
    for page in touches:
        if page in resident:
            resident.remove(page)
        else:
            faults += 1
            if len(resident) == frames:
                resident.pop()
        resident.append(page)
    return faults


def product(x, unpack, b, g):
    return x @ unpack().T + b, g @ unpack()


def keeps_the_weight(x, unpack, b, g):
    W = unpack()
    return x @ W.T + b, g @ W


REFERENCE = {
    "16.1": least_recently_used,
    "16.2": lambda N, P, F: 8 * min(N, F * min(N, P)),
    "16.3": product,
}
WRONG = {
    "16.1": [first_in_first_out, most_recently_used, lambda touches, frames: len({*touches})],
    "16.2": [
        lambda N, P, F: 8 * F * P,
        lambda N, P, F: 4 * min(N, F * P),  # one moment
        lambda N, P, F: 8 * N,
    ],
    "16.3": [
        keeps_the_weight,
        lambda x, unpack, b, g: (x @ unpack().T, g @ unpack()),
        lambda x, unpack, b, g: (x @ unpack().T + b, (g + b) @ unpack()),
    ],
}
