"""What goes wrong in choosing between a definition and its twin."""

from tests.mutants import Mutant

FILE = "minipeft/dispatch.py"
TESTS = ["tests/test_dispatch.py"]

MUTANTS = [
    Mutant(
        name="off is not off",
        file=FILE,
        find='        if mode == "off":\n            return "MINIPEFT_FAST_PATH=off"\n',
        replace="",
        why="auto and on were thought of",
        invariant="off always takes the definition",
    ),
    Mutant(
        name="on any device",
        file=FILE,
        find="            if device.type not in allowed:",
        replace="            if False:",
        why="the developer has one device",
        invariant="another device takes the definition",
    ),
    Mutant(
        name="old GPUs too",
        file=FILE,
        find="and torch.cuda.get_device_capability(device) < self.capability:",
        replace="and False:",
        why="the developer has a new one",
        invariant="an older GPU takes the definition",
    ),
    Mutant(
        name="exactly this GPU",
        file=FILE,
        find="torch.cuda.get_device_capability(device) < self.capability",
        replace="torch.cuda.get_device_capability(device) != self.capability",
        why="a comparison",
        invariant="newer GPUs run it",
    ),
    Mutant(
        name="dtypes of codes count",
        file=FILE,
        find=("if self.dtypes and tensor.is_floating_point() and tensor.dtype not in self.dtypes:"),
        replace="if self.dtypes and tensor.dtype not in self.dtypes:",
        why="a tensor is a tensor",
        invariant="integers are codes, not values",
    ),
    Mutant(
        name="any dtype",
        file=FILE,
        find=("if self.dtypes and tensor.is_floating_point() and tensor.dtype not in self.dtypes:"),
        replace="if False:",
        why="float32 is what one has",
        invariant="another dtype takes the definition",
    ),
    Mutant(
        name="keyword arguments are not looked at",
        file=FILE,
        find="tensors = list(tensors_in((*args, *kwargs.values())))",
        replace="tensors = list(tensors_in(args))",
        why="tensors come first",
        invariant="a tensor given by name counts too",
    ),
    Mutant(
        name="any shape",
        file=FILE,
        find=("        if self.supports is not None and not self.supports(*args, **kwargs):"),
        replace="        if False:",
        why="tried with a power of two",
        invariant="an unsupported shape takes the definition",
    ),
    Mutant(
        name="forced means faster, too",
        file=FILE,
        find='        if mode == "auto" and self.wins',
        replace="        if self.wins",
        why="one condition for all modes",
        invariant="on asks not whether it wins",
    ),
    Mutant(
        name="slower twins run",
        file=FILE,
        find='        if mode == "auto" and self.wins',
        replace='        if mode == "on" and self.wins',
        why="the mode the wrong way round",
        invariant="auto takes the twin only where it was measured to win",
    ),
    Mutant(
        name="interpreted without being asked",
        file=FILE,
        find='interpreted = mode == "on" and os.environ.get("TRITON_INTERPRET") == "1"',
        replace='interpreted = os.environ.get("TRITON_INTERPRET") == "1"',
        why="the variable is set for tests",
        invariant="a thousand times slower only when forced",
    ),
    Mutant(
        name="a broken twin is hidden",
        file=FILE,
        find="            except ImportError as problem:",
        replace="            except Exception as problem:",
        why="robustness",
        invariant="errors in a kernel's module are seen",
    ),
    Mutant(
        name="a missing module is tried on every call",
        file=FILE,
        find=(
            '                self.missing = f"{self.module} cannot be imported ({problem})"\n'
            "                return None"
        ),
        replace="                return None",
        why="None is the answer",
        invariant="a missing module is tried once",
    ),
    Mutant(
        name="said on every call",
        file=FILE,
        find="    if (twin.name, twin.module, refusal) not in _said:",
        replace="    if True:",
        why="logging is cheap",
        invariant="said once for each reason",
    ),
    Mutant(
        name="said while tracing",
        file=FILE,
        find="                if not tracing:",
        replace="                if True:",
        why="tracing is running",
        invariant="silent inside torch.compile",
    ),
    Mutant(
        name="imported first, asked later",
        file=FILE,
        find=(
            'or ("" if self.load() is not None else self.missing or "not loaded yet")\n        )'
        ),
        replace=(
            'or ("" if self.load() is not None else self.missing or "not loaded yet")\n'
            '        ) if self.load() is not None else "missing"'
        ),
        why="the twin is needed anyway",
        invariant="Triton is not imported before the twin may run",
    ),
    Mutant(
        name="any word is a mode",
        file=FILE,
        find="    if chosen not in MODES:",
        replace="    if False:",
        why="else means auto",
        invariant="another word is an error that names it",
    ),
    Mutant(
        name="forced for ever",
        file=FILE,
        find="    finally:\n        _forced.pop()",
        replace="    finally:\n        pass",
        why="the end of a context forgotten",
        invariant="afterwards the mode is what it was",
    ),
    Mutant(
        name="the lower twin is asked first",
        file=FILE,
        find='twins = (twin, *getattr(definition, "twins", ()))',
        replace='twins = (*getattr(definition, "twins", ()), twin)',
        why="decorators apply from below",
        invariant="of two twins the upper one that may runs",
    ),
    Mutant(
        name="a refused twin ends the search",
        file=FILE,
        find="            for candidate in twins:",
        replace="            for candidate in twins[:1]:",
        why="one twin was enough so far",
        invariant="of two twins the upper one that may runs",
    ),
    Mutant(
        name="lists are not looked into",
        file=FILE,
        find="            yield from (a for a in argument if isinstance(a, torch.Tensor))",
        replace="            yield from argument[:1]",
        why="the first stands for all",
        invariant="tensors in lists count too",
    ),
]
