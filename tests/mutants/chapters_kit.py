"""What goes wrong in what the chapters share: the kit and the build."""

from tests.mutants import Mutant

KIT, BUILD = "chapters/kit.py", "chapters/build.py"
NAMES = (
    "planted or comes_back or fast_mode or learning or random_state or crashes or two_builds "
    "or stderr or prose or blank"
)
TESTS = [f"tests/test_chapters.py -k '{NAMES}'"]

MUTANTS = [
    Mutant(
        name="the clean package does not come back",
        file=KIT,
        find="        sys.modules.update(kept)",
        replace="        pass",
        why="deleting the planted modules looks like enough",
        invariant="behind the block `minipeft` is the object it was",
    ),
    Mutant(
        name="the finder stays",
        file=KIT,
        find="        sys.meta_path.remove(finder)",
        replace="        pass",
        why="it only answers for one module",
        invariant="nothing of a planted bug is left behind the block",
    ),
    Mutant(
        name="old modules serve inside the block",
        file=KIT,
        find="        n: sys.modules.pop(n)\n",
        replace="        n: sys.modules[n]\n",
        why="get and pop read alike",
        invariant="inside the block the bug is there",
    ),
    Mutant(
        name="the original is executed",
        file=KIT,
        find="    source = mutant.plant(original)\n",
        replace="    source = mutant.plant(original) and original\n",
        why="a loader usually reads the file",
        invariant="inside the block the bug is there",
    ),
    Mutant(
        name="fast is slow",
        file=KIT,
        find="return min(n, fast) if FAST else n",
        replace="return n if FAST else min(n, fast)",
        why="the condition the wrong way round",
        invariant="the fast mode takes fewer steps, and only it",
    ),
    Mutant(
        name="scored at the end alone",
        file=KIT,
        find="        eval_every=max(1, n // points),\n",
        replace="",
        why="the last score is what a table needs",
        invariant="a curve has points before, during and after training",
    ),
    Mutant(
        name="a check moves the random state",
        file=KIT,
        find="with torch.random.fork_rng(devices=[]), warnings",
        replace="with warnings",
        why="the seed inside makes the check itself reproducible",
        invariant="an exercise changes nothing in the cells behind it",
    ),
    Mutant(
        name="an error in an answer ends the chapter",
        file=KIT,
        find="    except Exception as error:\n",
        replace="    except TypeError as error:\n",
        why="a call with the wrong arguments is what comes to mind",
        invariant="the notebook runs to its end whatever is answered",
    ),
    Mutant(
        name="None is an answer",
        file=KIT,
        find="        if result is None or result is ...:\n",
        replace="        if result is ...:\n",
        why="the template says return ...",
        invariant="a blank is told from a mistake",
    ),
    Mutant(
        name="random cell ids",
        file=BUILD,
        find='        cell["id"] = f"cell-{number:03d}"\n',
        replace="",
        why="jupytext gives every cell an id",
        invariant="two builds give the same bytes",
    ),
    Mutant(
        name="hashes differ from run to run",
        file=BUILD,
        find='    "PYTHONHASHSEED": "0",\n',
        replace='    "PYTHONHASHSEED": "random",\n',
        why="the environment is taken over as it is",
        invariant="two builds give the same bytes",
    ),
    Mutant(
        name="times are kept",
        file=BUILD,
        find="record_timing=False",
        replace="record_timing=True",
        why="that is the default",
        invariant="two builds give the same bytes",
    ),
    Mutant(
        name="stderr is published",
        file=BUILD,
        find='output.get("name") == "stderr"',
        replace='output.get("name") == "error"',
        why="streams and errors are two kinds of output",
        invariant="a cell that writes to stderr stops the build",
    ),
    Mutant(
        name="new code with old outputs",
        file=BUILD,
        find="    if [cell.source for cell in run] != [cell.source for cell in new]:\n",
        replace="    if len(run) != len(new):\n",
        why="as many cells look like the same cells",
        invariant="outputs are only kept for the very same code",
    ),
]
