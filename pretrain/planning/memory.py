"""Bytes on rank 0, as arithmetic: what stands between steps, and the most that stands in one.

Two moments can be the fullest: backward, when activations, gathered weights and gradients meet, and
the update, when gradients meet what the averages need. Backward is walked through unit by unit from
the last, because activations go while gradients come. Source of what each engine holds: what was
measured of it (tests/unit/test_planning_memory.py), FSDP2's and DeepSpeed's own code.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property

from parallel.mesh import Degrees
from pretrain.models.families import ModelConfig
from pretrain.planning import activations
from pretrain.planning.activations import Kept, Sizes
from pretrain.planning.anatomy import anatomy
from pretrain.planning.layout import Layout
from pretrain.planning.shares import MASTER, Held, groups, held

REPLICAS = 64 << 20  # bytes exchanged between replicas at a time: parallel.fsdp
BUCKET = 1 << 26  # values reduced or gathered in one call: parallel.deepspeed
LIVE = 10**9  # values of others that ZeRO-3 keeps gathered for backward: DeepSpeed's default
FRAGMENTS = 0.05  # of all that is allocated, lost between the blocks of CUDA's allocator
CONTEXT = 1 << 30  # bytes of a GPU that CUDA, its kernels and NCCL take for themselves

Moment = dict[str, int]  # bytes by field of PerRank


@dataclass(frozen=True)
class PerRank:
    """Bytes at the fullest moment of a step; what is full only at another moment is less here."""

    weights: int  # master weights, float32, as the engine shards them
    grads: int  # float32, sharded; whole ones too while micro-batches add up
    optimizer: int  # two Adam moments, float32, sharded
    ema: int  # all EMAs, float32, sharded
    gathered: int  # weights in the dtype and size that they are computed with
    activations: int  # what autograd keeps, and what backward needs beside it
    communication: int  # buffers of gathers, scatters and buckets
    update: int  # what the averages need while they move
    fragments: int  # allowance for what a GPU's allocator cannot use, and for CUDA itself
    total: int  # on the device
    host: int  # in CPU memory, with offload: not in the total


def per_rank(cfg: ModelConfig, layout: Layout) -> PerRank:
    walk = _Walk(layout, layout.of_micro_batch(anatomy(cfg).moe), cfg)
    moments, standing = (_zero if layout.stage else _fsdp)(layout, held(cfg, layout.sizes), walk)
    fuller = max(moments, key=_sum)
    return _summed(standing | fuller, layout, 0 if layout.device == "cpu" else reduced(cfg, layout))


def reduced(cfg: ModelConfig, layout: Layout) -> int:
    """Bytes of the sharded float32 gradients after backward."""
    values = held(cfg, layout.sizes)
    if layout.stage:
        return MASTER * values.part
    # why: replicas reduce into the part they own, beside the gradient of the whole shard.
    return MASTER * (values.shard + (values.own if layout.sizes.dp_replicate > 1 else 0))


def _sum(moment: Moment) -> int:
    return sum(moment.values())


def _summed(parts: Moment, layout: Layout, gradients: int) -> PerRank:
    """gradients: sharded ones, which offload moves to CPU memory too."""
    full = {field.name: parts.get(field.name, 0) for field in fields(PerRank)}
    host = 0
    if layout.offload and layout.device != "cpu":
        for name in ("weights", "optimizer", "ema", "update"):
            host, full[name] = host + full[name], 0
        host, full["grads"] = host + gradients, max(0, full["grads"] - gradients)
    total = _sum(full)
    fragments = CONTEXT + int(FRAGMENTS * total) if layout.device != "cpu" else 0
    return PerRank(**full | {"fragments": fragments, "total": total + fragments, "host": host})


@dataclass(frozen=True)
class _Walk:
    """The activations of a micro-batch, as backward meets them."""

    layout: Layout
    sizes: Sizes
    cfg: ModelConfig

    @cached_property
    def around(self) -> int:
        outside = activations.around(self.cfg, self.sizes)
        return outside + activations.loss(self.cfg, self.sizes)

    @cached_property
    def kept(self) -> list[int]:
        """Of each unit, from its forward to its backward."""
        return activations.standing(self.cfg, self.sizes, self.layout.remat)

    def unit(self, index: int) -> Kept:
        return activations.unit(self.cfg, index, self.sizes)

    def again(self, index: int) -> int:
        """What stands beside what was kept while this unit is recomputed."""
        remat = self.layout.remat
        if remat.mode == "none" or (index + 1) % remat.every:
            return 0
        return max(0, self.unit(index).saved - self.kept[index])


def _fsdp(layout: Layout, values: Held, walk: _Walk) -> tuple[list[Moment], Moment]:
    standing = {
        "weights": MASTER * values.shard,
        "optimizer": MASTER * 2 * values.own,
        "ema": MASTER * layout.averages * values.own,
    }
    exchanged = 0
    if layout.sizes.dp_replicate > 1:
        exchanged = 2 * min(REPLICAS, standing["weights"])
    gradients = reduced(walk.cfg, layout)
    update = {"grads": gradients, "update": MASTER * values.own, "communication": exchanged}
    return [*_fsdp_backward(layout, values, walk), update], standing


def _fsdp_backward(layout: Layout, values: Held, walk: _Walk) -> Iterator[Moment]:
    kept, around, item = walk.kept, walk.around, layout.item
    together = list(groups([n * item for n in values.whole], layout.unit_bytes))
    sizes = [sum(values.whole[i] for i in group) for group in together]
    # why: micro-batches before the last add up whole gradients, which no rank shares yet.
    before = MASTER * values.local if layout.accum > 1 else 0
    done, left = 0, sum(kept)
    for n in reversed(range(len(together))):
        # why: FSDP gathers one unit ahead, and never frees the root between forward and backward.
        stands = sum(sizes[max(0, n - 1) : n + 1])
        if not layout.reshard_after_forward:
            stands = sum(sizes[: n + 1])
        gathered = (stands + values.root) * item
        # why: weights are gathered into one buffer, then copied out of it.
        buffer = item * _exchanged(layout.sizes, values, together[n])
        yield _moment(before + done, gathered, left + around, buffer)
        for index in reversed(together[n]):
            beside = walk.again(index) + walk.unit(index).backward
            yield _moment(before + done, gathered, left + around + beside)
            left -= kept[index]
        done += MASTER * sum(values.sharded[i] for i in together[n])
        fresh, sent = (sizes[n] * item, sizes[n] * MASTER) if layout.accum == 1 else (0, 0)
        yield _moment(before + done + fresh, gathered, left + around, sent)


def _exchanged(sizes: Degrees, values: Held, group: Sequence[int]) -> int:
    """The most that one gather of a group brings; an axis of one rank gathers nothing."""
    whole, experts = (sum(of[i] for i in group) for of in (values.whole, values.experts))
    if sizes.ep == sizes.tp == 1:
        return whole * (sizes.dp_shard > 1)
    return max((whole - experts) * (sizes.dp_shard > 1), experts * (sizes.edp > 1))


def _moment(grads: int, gathered: int, kept: int, buffers: int = 0) -> Moment:
    return {
        "grads": grads,
        "gathered": gathered,
        "activations": kept,
        "communication": buffers,
    }


def _zero(layout: Layout, values: Held, walk: _Walk) -> tuple[list[Moment], Moment]:
    """DeepSpeed runs in float32: weights are cast where they are used, and autograd keeps that."""
    local, part = values.local, values.part
    bucket = MASTER * min(local, max(BUCKET, values.largest))
    standing = {
        "weights": MASTER * part,
        "optimizer": MASTER * 2 * part,
        "ema": MASTER * layout.averages * part,
    }
    if layout.stage < 3:
        gathered, before = MASTER * local, 0
        if layout.accum > 1:
            before = MASTER * (local if layout.stage == 1 else part)
    else:
        # why: the shards that gathers start from stand beside the masters.
        gathered = MASTER * (part + values.small + min(local - values.small, LIVE))
        before = MASTER * part
    cast = layout.item * local if layout.item != MASTER else 0
    kept, around, done = walk.kept, walk.around, before
    moments, left = [], sum(kept)
    for index in reversed(range(len(kept))):
        beside = walk.again(index) + walk.unit(index).backward
        moments.append(_moment(done, gathered, left + around + beside + cast, bucket))
        left -= kept[index]
        if layout.stage < 3 and layout.accum == 1:
            done += MASTER * part // len(kept)
    idle = bucket if layout.stage == 3 else 0
    update = {"grads": MASTER * part, "gathered": gathered, "communication": idle}
    return [*moments, update | {"update": MASTER * part}], standing
