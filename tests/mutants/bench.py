"""What goes wrong in comparing speeds."""

from tests.mutants import Mutant

FILE = "minipeft/bench.py"
TESTS = ["tests/test_bench.py"]

MUTANTS = [
    Mutant(
        name="theirs over ours",
        file=FILE,
        find="found = timing.interleaved(ours, theirs, rounds, device)",
        replace="found = timing.interleaved(theirs, ours, rounds, device)",
        why="a speed-up is read the other way round",
        invariant="the ratio is ours over theirs",
    ),
    Mutant(
        name="any two sides may be compared",
        file=FILE,
        find="    if worst > tolerance:",
        replace="    if worst < 0:",
        why="the check was in the way while the peer was set up",
        invariant="sides that differ are refused",
    ),
    Mutant(
        name="the signed difference",
        file=FILE,
        find="float((ours - theirs).detach().abs().max())",
        replace="float((ours - theirs).detach().max())",
        why="abs is forgotten: half of all errors pass",
        invariant="sides that differ are refused, whichever is larger",
    ),
    Mutant(
        name="the forward pass alone is counted",
        file=FILE,
        find="work = roofline.operations(lambda: our_loss().backward())",
        replace="work = roofline.operations(our_loss)",
        why="the floor of a step was first the floor of a loss",
        invariant="a step is three to four forward passes",
    ),
    Mutant(
        name="a batch of eight whatever the batch is",
        file=FILE,
        find='        work["operations"] = 2.0 * weights * new_tokens * batch',
        replace='        work["operations"] = 2.0 * weights * new_tokens * 8 / batch',
        why="the larger batch was written first",
        invariant="a row more is work more",
    ),
    Mutant(
        name="decoding reads the weights once",
        file=FILE,
        find='work = {"bytes_moved": 4.0 * weights * new_tokens}',
        replace='work = {"bytes_moved": 4.0 * weights}',
        why="they are read at the start; but they do not fit a cache",
        invariant="every token reads every weight",
    ),
    Mutant(
        name="the adapters are not read",
        file=FILE,
        find="        tensors += [*model.blocks.parameters(), model.head.weight]",
        replace="        tensors = [*model.blocks.parameters(), model.head.weight]",
        why="they are small beside the model; sixteen of them are not",
        invariant="the bytes of a batch with many adapters",
    ),
    Mutant(
        name="one token is the whole text",
        file=FILE,
        find="for part in (ids, ids[:, :1]):",
        replace="for part in (ids, ids):",
        why="a slice is lost",
        invariant="texts and single tokens",
    ),
    Mutant(
        name="a frozen head as dear as a trained one",
        file=FILE,
        find='facts["operations"] = (4 if frozen else 6) * M * V * D',
        replace='facts["operations"] = 6 * M * V * D',
        why="forward, and twice as much backward, is what one remembers",
        invariant="a frozen weight has no gradient to compute",
    ),
    Mutant(
        name="the peer's memory under our name",
        file=FILE,
        find="    memory = [extra_bytes(run, inputs) for run in (ours, theirs)]",
        replace="    memory = [extra_bytes(run, inputs) for run in (theirs, ours)]",
        why="the order of two lines",
        invariant="the loss in chunks needs less memory",
    ),
    Mutant(
        name="a GPU that is not there",
        file=FILE,
        find='    if device == "cuda" and not torch.cuda.is_available():',
        replace="    if False:",
        why="torch will say something, somewhere",
        invariant="a device that is not there is an error before anything runs",
    ),
    Mutant(
        name="written at the end",
        file=FILE,
        find="""            contents[name] = measured(name, rounds, device, rates)
            if folder is not None:
                write(contents[name], results_file(folder, name, device))
""",
        replace="""            contents[name] = measured(name, rounds, device, rates)
        for name in contents if folder is not None else ():
            write(contents[name], results_file(folder, name, device))
""",
        why="files are written when all is known",
        invariant="what was measured is on disk when a later benchmark fails",
    ),
    Mutant(
        name="a file named after the run",
        file=FILE,
        find='    return Path(folder) / f"{name}{SUFFIX[device]}.json"',
        replace='    return Path(folder) / f"{name}-{date.today()}{SUFFIX[device]}.json"',
        why="nothing is ever lost, and nobody knows which one counts",
        invariant="a run replaces its own files",
    ),
    Mutant(
        name="a GPU's results replace the CPU's",
        file=FILE,
        find='SUFFIX = {"cpu": "", "cuda": "-cuda"}',
        replace='SUFFIX = {"cpu": "", "cuda": ""}',
        why="the device stands in the file anyway",
        invariant="results of a GPU stand in files of their own",
    ),
    Mutant(
        name="all threads",
        file=FILE,
        find="    torch.set_num_threads(1)\n",
        replace="",
        why="more is faster",
        invariant="one thread, and the file says so",
    ),
    Mutant(
        name="one thread for ever",
        file=FILE,
        find="        torch.set_num_threads(threads)\n",
        replace="        pass\n",
        why="the setting is the program's, not the benchmark's",
        invariant="the threads are what they were",
    ),
    Mutant(
        name="silent about a missing peer",
        file=FILE,
        find='        left_out = f"{missing.name} is not installed"',
        replace="        pass",
        why="there is nothing to report",
        invariant="what was left out stands in the file",
    ),
    Mutant(
        name="the floor in bytes only",
        file=FILE,
        find="r.floor = rates.floor(r.bytes_moved, r.operations)",
        replace="r.floor = rates.floor(r.bytes_moved)",
        why="memory is what limits most things",
        invariant="the larger of both floors",
    ),
    Mutant(
        name="techniques among the contests",
        file=FILE,
        find="for title, table in TABLES.items() if title != COSTS for name in table)",
        replace="for title, table in TABLES.items() for name in table)",
        why="all ratios in one picture",
        invariant="the picture shows all but what techniques cost",
    ),
    Mutant(
        name="one picture forgets the other",
        file=FILE,
        find="known = json.loads(alts.read_text()) if alts.is_file() else {}",
        replace="known = {}",
        why="the file is written anew",
        invariant="both devices' pictures have their text",
    ),
]
