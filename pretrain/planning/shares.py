"""How many values of a tensor a rank holds: the arithmetic of the cuts, without a mesh."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from parallel.mesh import Degrees
from pretrain.planning.parameters import Parameter

MASTER = 4  # bytes of a master weight, a gradient, a moment, an EMA value: all float32


@dataclass(frozen=True)
class Shares:
    """Of rank 0."""

    sizes: Degrees

    def gathered(self, parameter: Parameter) -> int:
        """Values that a rank computes with, after tensor and expert parallelism."""
        return math.prod(self._local(parameter))

    def sharded(self, parameter: Parameter) -> int:
        """Values after FSDP2's cut: of dim 0 in chunks of rounded-up size, of experts evenly."""
        local, ranks = self._local(parameter), self.ranks(parameter)
        if parameter.role == "expert" and any(size % ranks == 0 for size in local):
            return math.prod(local) // ranks
        return math.ceil(local[0] / ranks) * math.prod(local[1:])

    def ranks(self, parameter: Parameter) -> int:
        """Ranks that share what this one computes with."""
        return self.sizes.edp if parameter.role == "expert" else self.sizes.dp_shard

    def owned(self, sharded: int) -> int:
        """Of these, what the first replica owns."""
        return sharded // self.sizes.dp_replicate

    def _local(self, parameter: Parameter) -> list[int]:
        local = list(parameter.shape)
        if parameter.role == "expert":
            local[0] //= self.sizes.ep
        elif parameter.cut is not None:
            local[parameter.cut] //= self.sizes.tp
        return local


def groups(sizes: Sequence[int], least: int) -> Iterator[list[int]]:
    """Indices of neighbours until they have `least` bytes together, as `parallel.fsdp.groups`."""
    found: list[int] = []
    held = 0
    for index, size in enumerate(sizes):
        found.append(index)
        held += size
        if held >= least:
            yield found
            found, held = [], 0
    if found:
        yield found
