"""Seconds of a step and hours of a run: arithmetic on a plan's counts and a cluster's figures.

Computing and communication are taken to overlap whole: a step takes the longer of the two. Of
communication all parts are added, as if no two of them shared the time. Not counted: norms and
counts, waiting for data, saving, and what a kernel reads and writes.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from parallel.links import COLLECTIVES, bus_factor
from parallel.mesh import Degrees
from parallel.precision import COMPUTE
from pretrain.plan import Layout, Plan

_FLOAT = 4  # bytes of a gradient on its way, and of a master
SHARE = 0.4  # of the data sheet's bf16 FLOP/s that training reaches
INSIDE, ACROSS = 320.0, 45.0  # GB/s a GPU: NVLink of the Hopper generation, a 400 Gb/s NIC
WORLD = {16: 340.0, 64: 300.0, 512: 200.0}  # GB/s by GPUs: rings over eight NICs a node
NODE = 8  # GPUs
ASSUMED = (
    f"assumed: {SHARE * 100:.0f} % of {{peak:.0f}} TFLOP/s, NVLink {INSIDE:.0f} GB/s, NIC "
    f"{ACROSS:.0f} GB/s a GPU (data sheets and published figures)"
)


@dataclass(frozen=True)
class Figures:
    """What ranks of a cluster reach. Bus bandwidths (parallel.links), bytes/s, by collective;
    empty: not measured, or the same as another.
    """

    flops: float  # model FLOP/s of a rank in training
    ranks_per_node: int
    inside: Mapping[str, float]
    across: Mapping[str, float]
    world: Mapping[str, float]
    basis: str  # where the figures come from


@dataclass(frozen=True)
class Traffic:
    """One kind of communication of a step, as one rank sees it."""

    what: str
    axis: str
    ranks: int  # of the axis
    inside_node: bool  # the whole axis
    bytes: float  # that pass a rank's link in a step
    gb_per_s: float | None  # None: this cluster's link was not measured
    seconds: float | None


@dataclass(frozen=True)
class Hours:
    """None: there are no figures; `hours_basis` says why."""

    compute_seconds: float | None  # a step
    communication_seconds: float | None  # a step
    step_seconds: float | None  # the longer of the two
    binding: str | None  # what takes longest: compute, or one kind of communication
    hours: float | None
    gpu_hours: float | None
    hours_basis: str
    communication: tuple[Traffic, ...] = ()


@dataclass(frozen=True)
class _Axis:
    """Ranks r, r + stride, r + 2·stride … of the world."""

    name: str
    size: int
    stride: int


def assumed(peak: float, ranks: int) -> Figures:
    """Figures of `ranks` Hopper GPUs from data sheets. peak: dense bf16 FLOP/s of one.

    Source: NVIDIA H100 data sheet; busbw that NCCL-tests users publish for 8 × 400 Gb/s a node.
    """
    ring = np.interp(math.log2(ranks), [math.log2(n) for n in WORLD], list(WORLD.values()))
    return Figures(
        flops=SHARE * peak,
        ranks_per_node=NODE,
        inside=dict.fromkeys(COLLECTIVES, INSIDE * 1e9),
        across=dict.fromkeys(COLLECTIVES, ACROSS * 1e9),
        world=dict.fromkeys(COLLECTIVES, float(ring) * 1e9),
        basis=ASSUMED.format(peak=peak / 1e12),
    )


def unknown(why: str) -> Hours:
    return Hours(None, None, None, None, None, None, why)


def of(plan: Plan, layout: Layout, steps: int, figures: Figures, *, room: float = 1.0) -> Hours:
    """room: rows that the dispatcher sends ÷ rows that were picked."""
    traffic = tuple(t for t in _traffic(plan, layout, figures, room) if t.ranks > 1 and t.bytes)
    missing = [t.axis for t in traffic if t.seconds is None]
    if missing:
        return unknown(
            f"{figures.basis}: what the axis {missing[0]} would use was not measured; run "
            "slurm/acceptance.sh on more nodes"
        )
    seconds = {t.what: t.seconds or 0.0 for t in traffic}
    images = layout.micro_batch * layout.accum
    compute = plan.flops_train_per_image * images / layout.sizes.tp / figures.flops
    talk = sum(seconds.values())
    step = max(compute, talk)
    run = step * steps / 3600
    return Hours(
        compute_seconds=compute,
        communication_seconds=talk,
        step_seconds=step,
        binding="compute" if compute >= talk else max(seconds, key=lambda what: seconds[what]),
        hours=run,
        gpu_hours=run * layout.sizes.world,
        hours_basis=f"{figures.basis}; communication behind computing",
        communication=traffic,
    )


def _traffic(plan: Plan, layout: Layout, figures: Figures, room: float) -> Iterator[Traffic]:
    """Every kind, those of axes of one rank too.

    FSDP gathers the blocks once a pass, forward and again backward if they were freed, and what
    belongs to no block once; it scatters gradients once a step. Replicas reduce and gather the
    shards that stand on a rank. A tensor axis sums activations four times a block.
    """
    sizes, item = layout.sizes, COMPUTE[layout.precision].itemsize
    shard, replicate, tp, ep, edp = _axes(sizes)
    root = next(row.params for row in plan.stages if row.name == "rest")
    blocks = plan.params_total - plan.params_experts - root
    passes = (2 if layout.reshard_after_forward else 1) * layout.accum
    dense = (blocks * passes + root * layout.accum) * item / sizes.tp
    yield _one("gathers of dense weights", "all_gather", shard, dense, figures)
    dense = (blocks + root) * _FLOAT / sizes.tp
    yield _one("scatters of dense gradients", "reduce_scatter", shard, dense, figures)
    own = plan.params_experts / sizes.ep
    yield _one("gathers of experts", "all_gather", edp, own * passes * item, figures)
    yield _one("scatters of expert gradients", "reduce_scatter", edp, own * _FLOAT, figures)
    held = plan.per_rank.weights  # float32 of this rank's shards
    yield _one("gradients between replicas", "all_to_all", replicate, held, figures)
    yield _one("weights between replicas", "all_gather", replicate, held, figures)
    images = layout.micro_batch * layout.accum
    rows = sum(row.all_to_all_bytes for row in plan.stages) * images * room / sizes.tp
    yield _one("tokens to experts and back", "all_to_all", ep, rows, figures)
    tokens = sum(row.blocks * row.tokens * row.width for row in plan.stages)
    yield _one("sums of activations", "all_reduce", tp, 4 * tokens * item * images, figures)


def _axes(sizes: Degrees) -> tuple[_Axis, ...]:
    """Where the ranks of an axis stand in the world (parallel.mesh: the last axis fastest)."""
    return (
        _Axis("dp_shard", sizes.dp_shard, sizes.tp),
        _Axis("dp_replicate", sizes.dp_replicate, sizes.inner),
        _Axis("tp", sizes.tp, 1),
        _Axis("ep", sizes.ep, 1),
        _Axis("edp", sizes.edp, sizes.ep),
    )


def _one(what: str, collective: str, axis: _Axis, size: float, figures: Figures) -> Traffic:
    """size: bytes of the collectives of a step, as `bus_factor` counts them."""
    node, ranks = figures.ranks_per_node, axis.size
    inside = axis.stride * ranks <= node and node % (axis.stride * ranks) == 0
    together = min(ranks, max(1, node // axis.stride))  # ranks of one group on one node
    moved = size * bus_factor(collective, ranks)
    rate: float | None
    if inside:
        rate = figures.inside.get(collective)
    elif collective == "all_to_all":
        # why: every rank sends each other its own part; what stays in the node needs no NIC.
        moved = size * (ranks - together) / ranks
        rate = figures.across.get(collective)
    elif together == 1:
        rate = figures.across.get(collective)
    elif together == node:
        rate = figures.world.get(collective)
    else:  # one ring through several ranks of a node, which shares the NICs with the other groups
        one, near = figures.across.get(collective), figures.inside.get(collective)
        rate = min(one * together, near) if one and near else None
    seconds = moved / rate if rate else None
    return Traffic(what, axis.name, ranks, inside, moved, rate / 1e9 if rate else None, seconds)
