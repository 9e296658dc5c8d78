"""Seconds of a step, hours and cost of a run: what computes and what is sent, side by side.

Computing, the links inside a node and the network are taken to work at once: a step takes the
longest of the three. What shares one of them is added up. Not counted: norms and counts, waiting
for data, saving.
"""

import math
from dataclasses import dataclass

import numpy as np

from parallel.chips import Chip
from parallel.links import COLLECTIVES
from pretrain.models.families import ModelConfig
from pretrain.planning import macs, roofline
from pretrain.planning.layout import Layout
from pretrain.planning.roofline import Machine, Seconds
from pretrain.planning.traffic import Links, Traffic, traffic

INSIDE, ACROSS = 320 / 450, 45 / 50  # of the data sheets' NVLink and NIC, that collectives reach
RING = {16: 340 / 45, 64: 300 / 45, 512: 200 / 45}  # NICs' worth, by GPUs, of one ring over all
NODE = 8  # GPUs
ASSUMED = (
    f"assumed: products at {roofline.PRODUCTS * 100:.0f} % of {{peak:.0f}} TFLOP/s, memory "
    "{memory:.2f} TB/s, NVLink {inside:.0f} GB/s, NIC {across:.0f} GB/s a GPU (data sheets, shares "
    "that are published)"
)
OVERLAP = "computing, NVLink and network at once"


@dataclass(frozen=True)
class Figures:
    """What ranks of a cluster reach."""

    machine: Machine | None  # None: only `flops` is known
    flops: float | None  # model FLOP/s of a rank in training, measured; wins over the machine
    links: Links
    basis: str  # where the figures come from


@dataclass(frozen=True)
class Hours:
    """None: there are no figures; `hours_basis` says why."""

    compute_seconds: float | None  # a step, the update too
    communication_seconds: float | None  # a step, all kinds one after the other
    step_seconds: float | None  # the longest of computing, links in a node, network
    binding: str | None  # what takes longest: compute, or one kind of communication
    resource: str | None  # compute, links inside a node, or network
    images_per_s: float | None  # of all ranks
    mfu: float | None  # of the executed graph; the roofline is the bound of what is reached
    mfu_bound: float | None  # if communication took nothing
    break_even: float | None  # images a rank and step from which computing takes longest
    hours: float | None
    gpu_hours: float | None
    cost: float | None  # GPU hours × price
    hours_basis: str
    communication: tuple[Traffic, ...] = ()
    compute: tuple[Seconds, ...] = ()  # by stage of the model


def assumed(chip: Chip, ranks: int) -> Figures:
    """Figures of `ranks` GPUs from data sheets and from shares of them that are published."""
    inside, across = INSIDE * chip.nvlink, ACROSS * chip.nic
    ring = np.interp(math.log2(ranks), [math.log2(n) for n in RING], list(RING.values()))
    machine = roofline.of_chip(chip)
    return Figures(
        machine=machine,
        flops=None,
        links=Links(
            ranks_per_node=NODE,
            inside=dict.fromkeys(COLLECTIVES, inside),
            across=dict.fromkeys(COLLECTIVES, across),
            world=dict.fromkeys(COLLECTIVES, min(float(ring) * across, 1.0625 * inside)),
        ),
        basis=ASSUMED.format(
            peak=chip.bf16 / 1e12,
            memory=machine.memory / 1e12,
            inside=inside / 1e9,
            across=across / 1e9,
        ),
    )


def unknown(why: str) -> Hours:
    return Hours(*[None] * 12, hours_basis=why)


def of(
    cfg: ModelConfig, layout: Layout, steps: int, figures: Figures, price: float | None = None
) -> Hours:
    """price: of a GPU hour, in any currency."""
    sent = traffic(cfg, layout, figures.links)
    missing = [t.axis for t in sent if t.seconds is None]
    if missing:
        return unknown(
            f"{figures.basis}: what the axis {missing[0]} would use was not measured; run "
            "slurm/acceptance.sh on more nodes"
        )
    stages = _compute(cfg, layout, figures)
    if isinstance(stages, float):
        compute, parts = stages, ()
    else:
        compute, parts = sum(stage.total for stage in stages), stages
    lanes = _lanes(sent)
    step = max(compute, *lanes.values())
    resource = "compute"
    if compute < step:
        resource = max(lanes, key=lambda name: lanes[name])
    images = layout.micro_batch * layout.accum
    executed = macs.flops_per_image(cfg, layout.micro_batch, pairs=layout.pairs)
    flops = executed * images / layout.sizes.tp
    peak = figures.machine.peak if figures.machine else None
    run = step * steps / 3600
    gpu_hours = run * layout.sizes.world
    return Hours(
        compute_seconds=compute,
        communication_seconds=sum(t.seconds or 0.0 for t in sent),
        step_seconds=step,
        binding="compute" if resource == "compute" else _longest(sent, resource),
        resource=resource,
        images_per_s=layout.global_batch / step,
        mfu=flops / step / peak if peak else None,
        mfu_bound=flops / compute / peak if peak else None,
        break_even=_break_even(layout, compute, parts, sent),
        hours=run,
        gpu_hours=gpu_hours,
        cost=None if price is None else gpu_hours * price,
        hours_basis=f"{figures.basis}; {OVERLAP}",
        communication=sent,
        compute=parts,
    )


def _compute(cfg: ModelConfig, layout: Layout, figures: Figures) -> float | tuple[Seconds, ...]:
    if figures.flops is not None:
        images = layout.micro_batch * layout.accum
        flops = 6 * macs.total(cfg, "published") * images
        return flops / layout.sizes.tp / figures.flops
    assert figures.machine is not None, "figures of nothing"
    return roofline.step(cfg, layout, figures.machine)


def _lane(one: Traffic) -> str:
    return "links inside a node" if one.inside_node else "network"


def _lanes(sent: tuple[Traffic, ...]) -> dict[str, float]:
    lanes = {"links inside a node": 0.0, "network": 0.0}
    for one in sent:
        lanes[_lane(one)] += one.seconds or 0.0
    return lanes


def _longest(sent: tuple[Traffic, ...], lane: str) -> str:
    own = [one for one in sent if _lane(one) == lane]
    return max(own, key=lambda one: one.seconds or 0.0).what


def _break_even(
    layout: Layout, compute: float, parts: tuple[Seconds, ...], sent: tuple[Traffic, ...]
) -> float | None:
    """None: at no batch does computing take longest. Weights travel as often whatever the batch,
    tokens in proportion to it."""
    images = layout.micro_batch * layout.accum
    update = sum(part.total for part in parts if part.stage == "update")
    found = 0.0
    for lane in ("links inside a node", "network"):
        own = [one for one in sent if _lane(one) == lane]
        tokens = sum(one.seconds or 0.0 for one in own if one.axis in ("ep", "tp"))
        weights = sum(one.seconds or 0.0 for one in own) - tokens
        each = (compute - update - tokens) / images
        if weights <= update and tokens <= compute - update:
            continue
        if each <= 0:
            return None
        found = max(found, (weights - update) / each)
    return found
