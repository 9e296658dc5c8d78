"""The world as named axes. Every axis exists; one that is not used has size 1.

The dense view is `dp_replicate × dp_shard × sp × tp`, in that order, the last axis fastest. Batches
are split over the data axes (`dp_replicate × dp_shard`), master weights are sharded over the same.
The expert view `dp_replicate × edp × ep × etp` folds over the same ranks:
dp_shard·sp·tp = edp·ep·etp.
"""

from dataclasses import dataclass

import torch.distributed as dist
from pydantic import BaseModel, ConfigDict, PositiveInt
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from parallel.errors import LayoutError


class MeshConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    dp_replicate: PositiveInt = 1  # ranks that hold the same shard
    dp_shard: PositiveInt | None = None  # ranks that share one copy; null: the rest of the world
    sp: PositiveInt = 1  # sequence axis
    tp: PositiveInt = 1  # tensor axis
    ep: PositiveInt = 1  # expert axis, folded over dp_shard × sp × tp
    etp: PositiveInt = 1  # tensor axis inside an expert
    reshard_after_forward: bool = True  # free gathered weights between forward and backward


@dataclass(frozen=True)
class Degrees:
    """Sizes of every axis for one world; their product is the world."""

    dp_replicate: int
    dp_shard: int
    sp: int
    tp: int
    ep: int
    etp: int

    @property
    def data(self) -> int:
        """Ranks that read different slots."""
        return self.dp_replicate * self.dp_shard

    @property
    def world(self) -> int:
        return self.data * self.sp * self.tp

    @property
    def edp(self) -> int:
        """Ranks of one replica that hold the same experts."""
        return self.dp_shard * self.sp * self.tp // (self.ep * self.etp)


def degrees(cfg: MeshConfig, world: int) -> Degrees:
    """Resolves the sizes of all axes for `world` ranks.

    Raises LayoutError if they do not multiply to the world, with the nearest degree that does.
    """
    for axis in ("sp", "etp"):
        if getattr(cfg, axis) > 1:
            raise LayoutError(
                f"mesh.{axis}={getattr(cfg, axis)}: this axis exists with size 1 for now "
                f"(256-px models do not need it); set mesh.{axis}=1"
            )
    fixed = cfg.dp_replicate * cfg.sp * cfg.tp
    shard = cfg.dp_shard or max(1, world // fixed)
    if fixed * shard != world:
        raise LayoutError(
            f"mesh.dp_replicate·dp_shard·sp·tp = {cfg.dp_replicate}·{shard}·{cfg.sp}·{cfg.tp} = "
            f"{fixed * shard}, but the number of ranks is {world}; {_nearest(cfg, world)}"
        )
    inner = shard * cfg.sp * cfg.tp
    if inner % (cfg.ep * cfg.etp):
        good = max(d for d in range(1, cfg.ep + 1) if inner % (d * cfg.etp) == 0)
        raise LayoutError(
            f"mesh.ep·etp = {cfg.ep}·{cfg.etp} must divide dp_shard·sp·tp = {inner}; "
            f"set mesh.ep={good}"
        )
    return Degrees(cfg.dp_replicate, shard, cfg.sp, cfg.tp, cfg.ep, cfg.etp)


def _nearest(cfg: MeshConfig, world: int) -> str:
    fixed = cfg.dp_replicate * cfg.sp * cfg.tp
    if world % fixed == 0:
        return f"set mesh.dp_shard={world // fixed} or start {fixed * (cfg.dp_shard or 1)} ranks"
    return f"start {fixed * (cfg.dp_shard or 1)} ranks or change the degrees"


def check_supported(cfg: MeshConfig) -> None:
    """Raises LayoutError for axes that this version plans for but cannot train with."""
    for axis in ("dp_replicate", "tp", "ep"):
        if getattr(cfg, axis) > 1:
            raise LayoutError(
                f"mesh.{axis}={getattr(cfg, axis)} is planned for (`pretrain plan`) but training "
                f"supports {axis} 1 in this version; set mesh.{axis}=1"
            )


class Mesh:
    """The dense view as a DeviceMesh, and this process's place in it."""

    def __init__(self, sizes: Degrees, device_type: str) -> None:
        self.sizes = sizes
        self.rank = dist.get_rank()
        axes = {"dp_replicate": sizes.dp_replicate, "dp_shard": sizes.dp_shard}
        # why: an axis of size 1 makes no communicator; the shard axis is always there for FSDP.
        used = {name: n for name, n in axes.items() if n > 1 or name == "dp_shard"}
        self.shard: DeviceMesh = init_device_mesh(
            device_type, tuple(used.values()), mesh_dim_names=tuple(used)
        )
        # What `fully_shard` takes: 1-D, or (replicate, shard) for HSDP.

    @property
    def data(self) -> tuple[int, int]:
        """(rank, size) among the ranks that read different slots."""
        return self.rank // (self.sizes.sp * self.sizes.tp), self.sizes.data
