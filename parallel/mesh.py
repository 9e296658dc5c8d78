"""The world as named axes. Every axis exists; one that is not used has size 1.

The dense view is `dp_replicate × dp_shard × sp × tp`, in that order, the last axis fastest. Batches
are split over the data axes (`dp_replicate × dp_shard`), master weights are sharded over the same.
The expert view `dp_replicate × edp × ep × etp` folds over the same ranks:
dp_shard·sp·tp = edp·ep·etp. Experts borrow ranks, they add none.
"""

from dataclasses import dataclass

import torch.distributed as dist
from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from parallel.errors import LayoutError


class MeshConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    dp_replicate: PositiveInt = 1  # ranks that hold the same compute shard
    dp_shard: PositiveInt | None = None  # ranks that share one copy; null: the rest of the world
    sp: PositiveInt = 1  # sequence axis
    tp: PositiveInt = 1  # tensor axis
    ep: PositiveInt = 1  # expert axis, folded over dp_shard × sp × tp
    etp: PositiveInt = 1  # tensor axis inside an expert
    reshard_after_forward: bool = True  # free gathered weights between forward and backward
    unit_mb: NonNegativeInt = 64  # neighbouring blocks below this together are gathered as one
    offload: bool = False  # masters, moments and averages live in CPU memory


@dataclass(frozen=True)
class Degrees:
    """Sizes of every axis for one world; their product is the world."""

    dp_replicate: int = 1
    dp_shard: int = 1
    sp: int = 1
    tp: int = 1
    ep: int = 1
    etp: int = 1

    @property
    def data(self) -> int:
        """Ranks that read different slots."""
        return self.dp_replicate * self.dp_shard

    @property
    def inner(self) -> int:
        """Ranks of one replica."""
        return self.dp_shard * self.sp * self.tp

    @property
    def world(self) -> int:
        return self.dp_replicate * self.inner

    def data_rank(self, rank: int) -> int:
        """Which share of the global batch a rank reads; those of one tp group read the same."""
        return rank // (self.sp * self.tp)

    @property
    def edp(self) -> int:
        """Ranks of one replica that hold the same experts."""
        return self.inner // (self.ep * self.etp)


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


@dataclass(frozen=True)
class Axis:
    """One axis as this rank sees it."""

    rank: int = 0  # place on the axis
    size: int = 1
    group: dist.ProcessGroup | None = None  # None: the axis has size 1 and nobody to talk to
    mesh: DeviceMesh | None = None  # the same as a 1-D mesh, for placements
    ordered: bool = False  # sums are taken in rank order, whatever the topology


ALONE = Axis()


class Mesh:
    """Both views of the world, and this process's place in them.

    shard: 1-D mesh that FSDP cuts dense weights over; experts: the one for experts (the edp axis).
    """

    def __init__(self, sizes: Degrees, device_type: str, *, ordered: bool = False) -> None:
        self.sizes = sizes
        self.rank = dist.get_rank()
        self.ordered = ordered
        dense = {"dp_replicate": sizes.dp_replicate, "dp_shard": sizes.dp_shard, "tp": sizes.tp}
        self._dense = _view(dense, "dp_shard", device_type)
        self.shard: DeviceMesh = self._dense["dp_shard"]
        self._expert, self.experts = self._dense, self.shard
        if sizes.ep > 1 or sizes.tp > 1:
            expert = {"dp_replicate": sizes.dp_replicate, "edp": sizes.edp, "ep": sizes.ep}
            self._expert = _view(expert, "edp", device_type)
            self.experts = self._expert["edp"]
        self.tp = self._axis(self._dense, "tp")
        self.ep = self._axis(self._expert, "ep")
        self.replicate = self._axis(self._dense, "dp_replicate")
        self.data = self._data()

    def _axis(self, view: DeviceMesh, name: str) -> Axis:
        if name not in (view.mesh_dim_names or ()):
            return ALONE
        one = view[name]
        return Axis(one.get_local_rank(), one.size(), one.get_group(), one, self.ordered)

    def _data(self) -> Axis:
        """The ranks that read different slots."""
        sizes, rank = self.sizes, self.sizes.data_rank(self.rank)
        if sizes.data == 1:
            return ALONE
        if sizes.tp == 1:
            return Axis(rank, sizes.data, dist.group.WORLD, None, self.ordered)
        if sizes.dp_replicate == 1:
            return self._axis(self._dense, "dp_shard")
        if sizes.dp_shard == 1:
            return self._axis(self._dense, "dp_replicate")
        both = self._dense["dp_replicate", "dp_shard"]._flatten("data")
        return Axis(rank, sizes.data, both.get_group(), both, self.ordered)


def _view(axes: dict[str, int], always: str, device_type: str) -> DeviceMesh:
    # why: an axis of size 1 makes no communicator; the axis FSDP cuts over is always there.
    used = {name: size for name, size in axes.items() if size > 1 or name == always}
    return init_device_mesh(device_type, tuple(used.values()), mesh_dim_names=tuple(used))
