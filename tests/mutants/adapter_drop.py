"""What goes wrong in AdapterDrop."""

from tests.mutants import Mutant

FILE = "minipeft/additive/adapter_drop.py"
TESTS = ["tests/test_adapter_drop.py", "tests/contract -k AdapterDrop"]

MUTANTS = [
    Mutant(
        name="the last layers are dropped",
        file=FILE,
        find="return kept if self.robust else [n for n in kept if n >= self.drop]",
        replace="return kept if self.robust else [n for n in kept if n < n_layer - self.drop]",
        why="the list is cut at the wrong end",
        invariant="(AdapterDrop 1): the first n",
    ),
    Mutant(
        name="one layer too many",
        file=FILE,
        find="return kept if self.robust else [n for n in kept if n >= self.drop]",
        replace="return kept if self.robust else [n for n in kept if n > self.drop]",
        why="counting from 1",
        invariant="(AdapterDrop 1): layer n has an adapter",
    ),
    Mutant(
        name="drop itself is never drawn",
        file=FILE,
        find="return int(torch.randint(most + 1, ()))",
        replace="return int(torch.randint(max(most, 1), ()))",
        why="randint's end is exclusive",
        invariant="(AdapterDrop 2): n from 0 to drop",
    ),
    Mutant(
        name="always the most",
        file=FILE,
        find="return int(torch.randint(most + 1, ()))",
        replace="return most",
        why="the draw is forgotten",
        invariant="(AdapterDrop 2)",
    ),
    Mutant(
        name="drawn at evaluation too",
        file=FILE,
        find="        if self.training:\n            n = draw_depth",
        replace="        if True:\n            n = draw_depth",
        why="train and eval are not told apart",
        invariant="evaluation draws no random number",
    ),
    Mutant(
        name="the last draw stays on at evaluation",
        file="minipeft/additive/adapter.py",
        find="return self.left_out or (self.training and self.drawn_out)",
        replace="return self.left_out or self.drawn_out",
        why="train and eval are not told apart",
        invariant="evaluation runs all adapters",
    ),
    Mutant(
        name="drawn a layer at a time",
        file=FILE,
        find="wrapper.drawn_out = layer < n  #",
        replace="wrapper.drawn_out = draw_depth(1) == 1  #",
        why="that is LayerDrop",
        invariant="(AdapterDrop 2): the first n, together",
    ),
    Mutant(
        name="the last layers are drawn out",
        file=FILE,
        find="wrapper.drawn_out = layer < n  #",
        replace="wrapper.drawn_out = layer >= n  #",
        why="the condition the wrong way round",
        invariant="(AdapterDrop 1)",
    ),
    Mutant(
        name="robust has no adapters in the first layers",
        file=FILE,
        find="return kept if self.robust else [n for n in kept if n >= self.drop]",
        replace="return [n for n in kept if n >= self.drop]",
        why="robust forgotten in the list of layers",
        invariant="robust: all adapters exist and train",
    ),
    Mutant(
        name="dropped leaves one more out",
        file=FILE,
        find="for layer, w in adapters_of(a) if layer < n]",
        replace="for layer, w in adapters_of(a) if layer <= n]",
        why="off by one",
        invariant="dropped(model, n) leaves out layers 0 .. n-1",
    ),
]
