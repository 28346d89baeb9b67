"""What goes wrong in saying how fast a machine could be."""

from tests.mutants import Mutant

FILE = "minipeft/roofline.py"
TESTS = ["tests/test_roofline.py"]

MUTANTS = [
    Mutant(
        name="bytes and operations one after the other",
        file=FILE,
        find="return max(bytes_moved / self.bandwidth, operations / self.operations)",
        replace="return bytes_moved / self.bandwidth + operations / self.operations",
        why="both have to be done",
        invariant="(Floor 1): they overlap",
    ),
    Mutant(
        name="the faster of the two",
        file=FILE,
        find="return max(bytes_moved / self.bandwidth, operations / self.operations)",
        replace="return min(bytes_moved / self.bandwidth, operations / self.operations)",
        why="a floor is the least",
        invariant="(Floor 1)",
    ),
    Mutant(
        name="a copy moves each byte once",
        file=FILE,
        find="return Rates(2 * 4 * source.numel() / copying",
        replace="return Rates(4 * source.numel() / copying",
        why="writing comes free",
        invariant="rates count reading and writing",
    ),
    Mutant(
        name="elements for bytes",
        file=FILE,
        find="return Rates(2 * 4 * source.numel() / copying",
        replace="return Rates(2 * source.numel() / copying",
        why="numel is a size",
        invariant="float32 has four bytes",
    ),
    Mutant(
        name="a multiplication with an addition is one operation",
        file=FILE,
        find="2 * n**3 / multiplying",
        replace="n**3 / multiplying",
        why="fused multiply-add is one instruction",
        invariant="operations are counted as FlopCounterMode counts them",
    ),
    Mutant(
        name="the slowest copy",
        file=FILE,
        find="copying = min(seconds",
        replace="copying = max(seconds",
        why="to be on the safe side",
        invariant="the best round counts",
    ),
    Mutant(
        name="the slowest product",
        file=FILE,
        find="multiplying = min(seconds",
        replace="multiplying = max(seconds",
        why="to be on the safe side",
        invariant="the best round counts",
    ),
    Mutant(
        name="only the forward pass is counted",
        file=FILE,
        find="custom_mapping=ON_A_CPU) as counter:",
        replace="custom_mapping=ON_A_CPU) as counter, torch.no_grad():",
        why="counting needs no gradients",
        invariant="six operations a weight and token in a training step",
    ),
    Mutant(
        name="attention for nothing",
        file=FILE,
        find="(display=False, custom_mapping=ON_A_CPU)",
        replace="(display=False)",
        why="torch's counter knows attention, on GPUs",
        invariant="attention counts",
    ),
    Mutant(
        name="products in place are free",
        file=FILE,
        find="torch.ops.aten.baddbmm_: lambda x, a, b,",
        replace="torch.ops.aten.baddbmm: lambda x, a, b,",
        why="torch's counter knows baddbmm",
        invariant="the operations of causal_attention.py are all counted",
    ),
    Mutant(
        name="a head's gradient is not counted",
        file=FILE,
        find="torch.ops.aten.addmm_: lambda x, a, b",
        replace="torch.ops.aten.addmm: lambda x, a, b",
        why="torch's counter knows addmm, and the name looks the same",
        invariant="the gradient of a chunked head is counted",
    ),
]
