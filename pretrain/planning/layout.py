"""The degrees and sizes of a run that decide what one rank holds, sends and computes."""

from dataclasses import dataclass, replace

from parallel.errors import LayoutError
from parallel.mesh import Degrees
from parallel.precision import COMPUTE, Precision
from parallel.remat import RematConfig
from pretrain.models.moe import MoEConfig
from pretrain.parallelize import EngineName
from pretrain.planning.activations import Sizes


@dataclass(frozen=True)
class Layout:
    sizes: Degrees = Degrees()
    precision: Precision = "fp32"  # of gathered weights and activations
    micro_batch: int = 1  # images a rank and micro-batch
    accum: int = 1  # micro-batches a step
    reshard_after_forward: bool = True  # free gathered weights between forward and backward
    unit_bytes: int = 0  # neighbouring blocks below this together are gathered as one
    remat: RematConfig = RematConfig()
    averages: int = 1  # EMAs of the weights
    engine: EngineName = "fsdp2"
    offload: bool = False  # masters, moments and averages in CPU memory
    deterministic: bool = False
    device: str = "cpu"  # where it runs: a CUDA allocator needs room for fragments

    @property
    def global_batch(self) -> int:
        return self.micro_batch * self.sizes.data * self.accum

    @property
    def item(self) -> int:
        """Bytes of the compute dtype."""
        return COMPUTE[self.precision].itemsize

    @property
    def stage(self) -> int:
        """Of ZeRO; 0: FSDP2."""
        return int(self.engine[-1]) if self.engine != "fsdp2" else 0

    def of_micro_batch(self, moe: MoEConfig | None) -> Sizes:
        """What decides the sizes of activations."""
        room = 1.0
        if moe is not None and moe.dispatcher == "static" and self.sizes.ep > 1:
            room = min(moe.capacity, self.sizes.ep)
        sizes = self.sizes
        return Sizes(self.micro_batch, self.item, sizes.tp, sizes.ep, room, self.pairs)

    @property
    def pairs(self) -> bool:
        """Whether pairs of 1×1 may be multiplied together."""
        return self.sizes.tp == 1 and self.precision != "fp8"

    def changed(self, **changes: object) -> "Layout":
        return replace(self, **changes)  # type: ignore[arg-type]


def check(layout: Layout, moe: MoEConfig | None) -> None:
    """Raises LayoutError when ep does not fit the experts."""
    if moe is not None and moe.experts % layout.sizes.ep:
        raise LayoutError(
            f"ep={layout.sizes.ep} must divide moe.experts={moe.experts}; change one of the two"
        )
