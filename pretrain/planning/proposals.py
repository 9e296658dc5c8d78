"""Layouts of a run that fit the memory of its devices, best first: a search by arithmetic alone.

What a run computes stays as it is (model, batch, engine's arithmetic); how ranks share it is
searched over: replicas, tensor and expert axis, freeing gathered weights, remat, micro-batches.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Literal

from parallel.mesh import Degrees
from parallel.remat import RematConfig
from pretrain.models.families import ModelConfig
from pretrain.planning import hours, memory
from pretrain.planning.anatomy import anatomy
from pretrain.planning.hours import Figures, Hours
from pretrain.planning.layout import Layout
from pretrain.planning.memory import PerRank
from pretrain.planning.parameters import parameters

TOP = 5
EASY = 0.95  # of a device's memory: layouts that need more come after their equals
MAX_TP = 8  # a tensor axis stays inside a node
MAX_MICRO_BATCHES = 64
_MODES: tuple[Literal["none", "selective", "full"], ...] = ("none", "selective", "full")


@dataclass(frozen=True)
class Proposal:
    """One layout."""

    words: str  # overrides that give it, where it differs from the configured
    micro_batch: int  # images a rank
    memory: int  # bytes on rank 0
    step_seconds: float | None
    mfu: float | None
    binding: str | None
    resource: str | None
    break_even: float | None  # images a rank and step


@dataclass(frozen=True)
class Search:
    """What was found."""

    layouts_tried: int
    layouts_fit: int
    proposals: tuple[Proposal, ...]  # best first, at most TOP
    nothing_fits: str | None  # why, and what to change


def search(
    cfg: ModelConfig,
    now: Layout,
    global_batch: int,
    room: int,
    figures: Figures | None,
    *,
    compiled: bool = False,
) -> Search:
    """now: the layout that is configured. room: bytes of a device. figures: None: by memory then.

    compiled: of the configuration; cut parameters then allow no full remat.
    """
    tried, found = 0, list[tuple[tuple[float, ...], Proposal]]()
    least: tuple[Layout, PerRank] | None = None
    for layout in candidates(cfg, now, global_batch, compiled):
        tried += 1
        held = memory.per_rank(cfg, layout)
        if least is None or held.total < least[1].total:
            least = layout, held
        if held.total > room:
            continue
        took = None if figures is None else hours.of(cfg, layout, 1, figures)
        found.append((_rank(held, took, room), _proposal(layout, now, held, took)))
    found.sort(key=lambda pair: pair[0])
    nothing = None if found else _nothing(least, room, now)
    return Search(tried, len(found), tuple(one for _, one in found[:TOP]), nothing)


def _rank(held: PerRank, took: Hours | None, room: int) -> tuple[float, ...]:
    """Fastest first, to 1 %; of equals what leaves room, then what sends least."""
    tight, total = float(held.total > EASY * room), float(held.total)
    if took is None or not took.step_seconds:
        return (0.0, tight, 0.0, total)
    return (round(math.log(took.step_seconds), 2), tight, took.communication_seconds or 0.0, total)


def candidates(
    cfg: ModelConfig, now: Layout, global_batch: int, compiled: bool = False
) -> Iterator[Layout]:
    """Every layout that the program would run, in a fixed order."""
    world, moe = now.sizes.world, anatomy(cfg).moe
    for replicate, tp in product(_divisors(world), _divisors(world)):
        shard = world // (replicate * tp)
        if replicate * tp * shard != world or not _tensor_axis_fits(cfg, tp):
            continue
        if now.stage and (replicate > 1 or (now.stage == 3 and tp > 1 and moe)):
            continue
        for ep in _divisors(shard * tp) if moe else [1]:
            if moe and (moe.experts % ep or (now.stage == 3 and ep > 1)):
                continue
            sizes = Degrees(replicate, shard, 1, tp, ep, 1)
            for layout in _micro_batches(cfg, now, sizes, global_batch):
                if not (compiled and _keeps_a_mesh(layout)):
                    yield layout


def _keeps_a_mesh(layout: Layout) -> bool:
    """Whether a compiler would have to keep a cut parameter for full remat, which torch cannot."""
    cut = max(layout.sizes.tp, layout.sizes.ep) > 1 and not layout.stage
    return cut and layout.remat.mode == "full"


def _micro_batches(
    cfg: ModelConfig, now: Layout, sizes: Degrees, global_batch: int
) -> Iterator[Layout]:
    freeing = (True, False) if not now.stage else (now.reshard_after_forward,)
    moe = anatomy(cfg).moe
    for accum in _divisors(global_batch // sizes.data if global_batch % sizes.data == 0 else 0):
        micro = global_batch // (sizes.data * accum)
        if accum > MAX_MICRO_BATCHES:
            continue
        if moe and any(micro * site.tokens % sizes.tp for site in anatomy(cfg).sites if site.moe):
            continue
        for free, mode in product(freeing, _MODES):
            yield now.changed(
                sizes=sizes,
                micro_batch=micro,
                accum=accum,
                reshard_after_forward=free,
                remat=RematConfig(mode=mode),
            )


def _divisors(whole: int) -> list[int]:
    return [d for d in range(1, whole + 1) if whole % d == 0]


def _tensor_axis_fits(cfg: ModelConfig, tp: int) -> bool:
    if tp > MAX_TP or any(heads % tp for heads in cfg.heads().values()):
        return False
    return all(p.cut is None or p.shape[p.cut] % tp == 0 for p in parameters(cfg))


def _proposal(layout: Layout, now: Layout, held: PerRank, took: Hours | None) -> Proposal:
    return Proposal(
        words=words(layout, now),
        micro_batch=layout.micro_batch,
        memory=held.total,
        step_seconds=took.step_seconds if took else None,
        mfu=took.mfu if took else None,
        binding=took.binding if took else None,
        resource=took.resource if took else None,
        break_even=took.break_even if took else None,
    )


def words(layout: Layout, now: Layout) -> str:
    """Overrides of the command line that give a layout, where it differs from the configured."""
    said = [
        f"{name}={value}"
        for (name, value), other in zip(_named(layout), _named(now), strict=True)
        if (name, value) != other
    ]
    return " ".join(said) or "as configured"


def _named(layout: Layout) -> list[tuple[str, str]]:
    sizes = layout.sizes
    return [
        ("mesh.dp_replicate", str(sizes.dp_replicate)),
        ("mesh.dp_shard", str(sizes.dp_shard)),
        ("mesh.tp", str(sizes.tp)),
        ("mesh.ep", str(sizes.ep)),
        ("mesh.reshard_after_forward", str(layout.reshard_after_forward).lower()),
        ("accum", str(layout.accum)),
        ("remat.mode", layout.remat.mode),
        ("remat.every", str(layout.remat.every)),
    ]


def _nothing(least: tuple[Layout, PerRank] | None, room: int, now: Layout) -> str:
    if least is None:
        return (
            f"no layout of {now.sizes.world} ranks splits the global batch and the model's sizes; "
            "change data.global_batch or --gpus"
        )
    layout, held = least
    parts = {name: size for name, size in vars(held).items() if name not in ("total", "host")}
    largest = max(parts, key=lambda name: parts[name])
    cure = {
        "activations": "give more GPUs, or lower model.input_size or model.width",
        "gathered": "give a larger mesh.tp or mesh.ep, or engine=zero3",
        "grads": "give a larger mesh.tp or mesh.ep, or a batch that fits accum=1",
    }.get(largest, "give more GPUs, or set mesh.offload=true")
    return (
        f"nothing fits: the least that any layout needs is {held.total / 1e9:.1f} GB of "
        f"{room / 1e9:.1f} GB ({words(layout, now)}); its largest part is {largest}, "
        f"{parts[largest] / 1e9:.1f} GB; {cure}, or a device with more memory"
    )
