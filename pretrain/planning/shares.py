"""How many values of a tensor a rank holds: the arithmetic of the cuts, without a mesh."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from parallel.mesh import Degrees
from pretrain.models.families import ModelConfig
from pretrain.planning.parameters import Parameter, parameters

PERSIST = 100_000  # values up to which ZeRO-3 keeps a parameter gathered
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


@dataclass(frozen=True)
class Held:
    """Values of all tensors together, and of each unit."""

    whole: tuple[int, ...]  # of each unit, that a rank computes with
    sharded: tuple[int, ...]  # of each unit, after FSDP2's cut
    experts: tuple[int, ...]  # of each unit, that a rank computes with
    root: int  # of no unit
    routers: int
    shard: int  # all, after FSDP2's cut
    own: int  # of these, what a replica owns
    part: int  # all, after DeepSpeed's cut
    largest: int  # of one tensor
    small: int  # in tensors of at most PERSIST values

    @property
    def local(self) -> int:
        """All that a rank computes with."""
        return sum(self.whole) + self.root


@lru_cache(maxsize=256)
def held(cfg: ModelConfig, sizes: Degrees) -> Held:
    """What rank 0 holds of a model."""
    tensors, shares = parameters(cfg), Shares(sizes)
    units = 1 + max(p.unit for p in tensors if p.unit is not None)
    whole, sharded, experts = ([0] * units for _ in range(3))
    numbers = [shares.gathered(p) for p in tensors]
    shards = [shares.sharded(p) for p in tensors]
    for parameter, number, shard in zip(tensors, numbers, shards, strict=True):
        if parameter.unit is not None:
            whole[parameter.unit] += number
            sharded[parameter.unit] += shard
            experts[parameter.unit] += number * (parameter.role == "expert")
    pairs = list(zip(tensors, numbers, strict=True))
    return Held(
        whole=tuple(whole),
        sharded=tuple(sharded),
        experts=tuple(experts),
        root=sum(n for p, n in pairs if p.unit is None),
        routers=sum(n for p, n in pairs if p.role == "router"),
        shard=sum(shards),
        own=sum(shares.owned(shard) for shard in shards),
        part=sum(-(-n // shares.ranks(p)) for p, n in pairs),
        largest=max(numbers),
        small=sum(n for n in numbers if n <= PERSIST),
    )


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
