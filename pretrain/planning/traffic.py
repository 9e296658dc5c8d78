"""What ranks send each other in a step, by kind and mesh axis, and how long links take for it.

Bytes are those that pass one rank's link. A kind takes the links of its axis: those inside a node,
or the network.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from parallel.links import bus_factor
from parallel.mesh import Degrees
from pretrain.models.families import ModelConfig
from pretrain.planning.anatomy import anatomy
from pretrain.planning.layout import Layout
from pretrain.planning.memory import LIVE
from pretrain.planning.shares import MASTER, Held, held

PASSES = 4  # of the all-to-all: dispatch and combine, forward and backward


@dataclass(frozen=True)
class Links:
    """Bus bandwidths (parallel.links) of a cluster, bytes/s, by collective; empty: not measured, or
    the same as another.
    """

    ranks_per_node: int
    inside: Mapping[str, float]
    across: Mapping[str, float]
    world: Mapping[str, float]


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
class _Axis:
    """Ranks r, r + stride, r + 2·stride … of the world."""

    name: str
    size: int
    stride: int


def traffic(cfg: ModelConfig, layout: Layout, links: Links) -> tuple[Traffic, ...]:
    """Every kind that there is on this layout."""
    found = (*_of_weights(cfg, layout, links), *_of_tokens(cfg, layout, links))
    return tuple(t for t in found if t.ranks > 1 and t.bytes)


def all_to_all(cfg: ModelConfig, stage: str, item: int) -> int:
    """Bytes of one image that go to experts and come back, both ways, if all are on other ranks."""
    sites = [site for site in anatomy(cfg).sites if site.stage == stage and site.moe]
    return PASSES * item * sum(site.picks * site.width for site in sites)


def _of_weights(cfg: ModelConfig, layout: Layout, links: Links) -> Iterator[Traffic]:
    values, axes = held(cfg, layout.sizes), _axes(layout.sizes)
    yield from (_zero if layout.stage else _fsdp)(layout, links, axes, values)


def _fsdp(
    layout: Layout, links: Links, axes: Mapping[str, _Axis], values: Held
) -> Iterator[Traffic]:
    """FSDP gathers the blocks once a pass, forward and again backward if they were freed, and what
    belongs to no block once; it scatters gradients once a step. Replicas reduce and gather the
    shards that stand on a rank.
    """
    passes = (2 if layout.reshard_after_forward else 1) * layout.accum
    experts = sum(values.experts)
    root = values.root + values.routers
    blocks = values.local - experts - root
    dense = (blocks * passes + root * layout.accum) * layout.item
    yield _one("gathers of dense weights", "all_gather", axes["dp_shard"], dense, links)
    dense = (blocks + root) * MASTER
    # why: deterministic runs scatter by an all-to-all, which sends as much.
    scatter = "all_to_all" if layout.deterministic else "reduce_scatter"
    yield _one("scatters of dense gradients", scatter, axes["dp_shard"], dense, links)
    edp = axes["edp"]
    own = experts * passes * layout.item
    yield _one("gathers of experts", "all_gather", edp, own, links)
    yield _one("scatters of expert gradients", scatter, edp, experts * MASTER, links)
    whole = values.shard * MASTER
    replicas = axes["dp_replicate"]
    yield _one("gradients between replicas", "all_to_all", replicas, whole, links)
    yield _one("weights between replicas", "all_gather", replicas, whole, links)


def _zero(
    layout: Layout, links: Links, axes: Mapping[str, _Axis], values: Held
) -> Iterator[Traffic]:
    """DeepSpeed sends float32. ZeRO-1 and 2 sum whole gradients, 2 and 3 every micro-batch, and
    gather the new weights once a step. ZeRO-3 gathers what is large every pass, and backward again
    what did not stay.
    """
    data, edp = axes["dp_shard"], axes["edp"]
    experts = MASTER * sum(values.experts)
    dense = MASTER * values.local - experts
    often = 1 if layout.stage == 1 else layout.accum
    if layout.stage == 3:
        large = values.local - values.small
        again = max(0, large - LIVE)
        gathers = MASTER * ((large + again) * layout.accum + values.small)
        yield _one("gathers of weights", "all_gather", data, gathers, links)
        scatters = (dense + experts) * often
        yield _one("scatters of gradients", "reduce_scatter", data, scatters, links)
        return
    yield _one("sums of dense gradients", "all_reduce", data, dense * often, links)
    yield _one("gathers of dense weights", "all_gather", data, dense, links)
    yield _one("sums of expert gradients", "all_reduce", edp, experts * often, links)
    yield _one("gathers of experts", "all_gather", edp, experts, links)


def _of_tokens(cfg: ModelConfig, layout: Layout, links: Links) -> Iterator[Traffic]:
    """Rows to the ranks of experts. A tensor axis sums activations four times a block."""
    whole, axes = anatomy(cfg), _axes(layout.sizes)
    images = layout.micro_batch * layout.accum
    room = layout.of_micro_batch(whole.moe).room
    rows = sum(all_to_all(cfg, stage, layout.item) for stage in whole.stages)
    sent = rows * images * room / layout.sizes.tp
    yield _one("tokens to experts and back", "all_to_all", axes["ep"], sent, links)
    tokens = sum(site.tokens * site.width for site in whole.sites)
    summed = 4 * tokens * layout.item * images
    yield _one("sums of activations", "all_reduce", axes["tp"], summed, links)


def _axes(sizes: Degrees) -> dict[str, _Axis]:
    """Where the ranks of an axis stand in the world (parallel.mesh: the last axis fastest)."""
    found = (
        _Axis("dp_shard", sizes.dp_shard, sizes.tp),
        _Axis("dp_replicate", sizes.dp_replicate, sizes.inner),
        _Axis("tp", sizes.tp, 1),
        _Axis("ep", sizes.ep, 1),
        _Axis("edp", sizes.edp, sizes.ep),
    )
    return {axis.name: axis for axis in found}


def _one(what: str, collective: str, axis: _Axis, size: float, links: Links) -> Traffic:
    """size: bytes of the collectives of a step, as `bus_factor` counts them."""
    node, ranks = links.ranks_per_node, axis.size
    inside = axis.stride * ranks <= node and node % (axis.stride * ranks) == 0
    together = min(ranks, max(1, node // axis.stride))  # ranks of one group on one node
    moved = size * bus_factor(collective, ranks)
    rate: float | None
    if inside:
        rate = links.inside.get(collective)
    elif collective == "all_to_all":
        # why: every rank sends each other its own part; what stays in the node needs no NIC.
        moved = size * (ranks - together) / ranks
        rate = links.across.get(collective)
    elif together == 1:
        rate = links.across.get(collective)
    elif together == node:
        rate = links.world.get(collective)
    else:  # one ring through several ranks of a node, which shares the NICs with the other groups
        one, near = links.across.get(collective), links.inside.get(collective)
        rate = min(one * together, near) if one and near else None
    seconds = moved / rate if rate else None
    return Traffic(what, axis.name, ranks, inside, moved, rate / 1e9 if rate else None, seconds)
