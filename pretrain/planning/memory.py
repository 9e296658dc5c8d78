"""Bytes on rank 0, as arithmetic: what stands between steps, and the most that stands in one.

Two moments can be the fullest: backward, when activations, gathered weights and gradients meet, and
the update, when gradients meet what the averages need. Backward is walked through unit by unit from
the last, because activations go while gradients come. Source of what each engine holds: what was
measured of it (tests/unit/test_planning_memory.py), FSDP2's and DeepSpeed's own code.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

from pretrain.models.families import ModelConfig
from pretrain.planning import activations
from pretrain.planning.activations import Kept, Sizes
from pretrain.planning.anatomy import anatomy
from pretrain.planning.layout import Layout
from pretrain.planning.parameters import Parameter, parameters
from pretrain.planning.shares import MASTER, Shares, groups

REPLICAS = 64 << 20  # bytes exchanged between replicas at a time: parallel.fsdp
BUCKET = 1 << 26  # values reduced or gathered in one call: parallel.deepspeed
PERSIST = 100_000  # values up to which ZeRO-3 keeps a parameter gathered
LIVE = 10**9  # values of others that ZeRO-3 keeps gathered for backward: DeepSpeed's default
FRAGMENTS = 0.05  # of all that is allocated, lost between the blocks of CUDA's allocator

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
    fragments: int  # allowance for what the allocator of a GPU cannot use
    total: int  # on the device
    host: int  # in CPU memory, with offload: not in the total


def per_rank(cfg: ModelConfig, layout: Layout) -> PerRank:
    shares, held = Shares(layout.sizes), parameters(cfg)
    walk = _Walk(layout, layout.of_micro_batch(anatomy(cfg).moe), cfg)
    if layout.stage:
        moments, standing = _zero(layout, shares, held, walk)
    else:
        moments, standing = _fsdp(layout, shares, held, walk)
    fuller = max(moments, key=_sum)
    return _summed(standing | fuller, layout, 0 if layout.device == "cpu" else reduced(cfg, layout))


def reduced(cfg: ModelConfig, layout: Layout) -> int:
    """Bytes of the sharded float32 gradients after backward."""
    shares, held = Shares(layout.sizes), parameters(cfg)
    if layout.stage:
        return MASTER * sum(-(-shares.gathered(p) // shares.ranks(p)) for p in held)
    shard = sum(shares.sharded(p) for p in held)
    own = sum(shares.owned(shares.sharded(p)) for p in held)
    # why: replicas reduce into the part they own, beside the gradient of the whole shard.
    return MASTER * (shard + (own if layout.sizes.dp_replicate > 1 else 0))


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
    fragments = int(FRAGMENTS * total) if layout.device != "cpu" else 0
    return PerRank(**full | {"fragments": fragments, "total": total + fragments, "host": host})


@dataclass(frozen=True)
class _Walk:
    """The activations of a micro-batch, as backward meets them."""

    layout: Layout
    sizes: Sizes
    cfg: ModelConfig

    @property
    def around(self) -> int:
        return activations.around(self.cfg, self.sizes)

    @property
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


def _fsdp(
    layout: Layout, shares: Shares, held: Sequence[Parameter], walk: _Walk
) -> tuple[list[Moment], Moment]:
    own = sum(shares.owned(shares.sharded(p)) for p in held)
    standing = {
        "weights": MASTER * sum(shares.sharded(p) for p in held),
        "optimizer": MASTER * 2 * own,
        "ema": MASTER * layout.averages * own,
    }
    exchanged = 0
    if layout.sizes.dp_replicate > 1:
        exchanged = 2 * min(REPLICAS, standing["weights"])
    gradients = reduced(walk.cfg, layout)
    update = {"grads": gradients, "update": MASTER * own, "communication": exchanged}
    return [*_fsdp_backward(layout, shares, held, walk), update], standing


def _fsdp_backward(
    layout: Layout, shares: Shares, held: Sequence[Parameter], walk: _Walk
) -> Iterator[Moment]:
    kept, around, item = walk.kept, walk.around, layout.item
    whole, sharded = [0] * len(kept), [0] * len(kept)
    for parameter in held:
        if parameter.unit is not None:
            whole[parameter.unit] += shares.gathered(parameter)
            sharded[parameter.unit] += shares.sharded(parameter)
    root = sum(shares.gathered(p) for p in held if p.unit is None)
    together = list(groups([n * item for n in whole], layout.unit_bytes))
    values = [sum(whole[i] for i in group) for group in together]
    # why: micro-batches before the last add up whole gradients, which no rank shares yet.
    before = MASTER * (sum(values) + root) if layout.accum > 1 else 0
    done, left = 0, sum(kept)
    for n in reversed(range(len(together))):
        # why: FSDP gathers one unit ahead, and never frees the root between forward and backward.
        stands = sum(values[max(0, n - 1) : n + 1])
        if not layout.reshard_after_forward:
            stands = sum(values[: n + 1])
        gathered = (stands + root) * item
        if layout.sizes.inner > layout.sizes.tp or layout.sizes.edp > 1:
            # why: gathered into one buffer, then copied out of it.
            buffer = values[n] * item
            yield _moment(before + done, gathered, left + around, buffer)
        for index in reversed(together[n]):
            beside = walk.again(index) + walk.unit(index).backward
            yield _moment(before + done, gathered, left + around + beside)
            left -= kept[index]
        done += MASTER * sum(sharded[i] for i in together[n])
        fresh = values[n] * item if layout.accum == 1 else 0
        sent = values[n] * MASTER if layout.accum == 1 else 0
        yield _moment(before + done + fresh, gathered, left + around, sent)


def _moment(grads: int, gathered: int, kept: int, buffers: int = 0) -> Moment:
    return {
        "grads": grads,
        "gathered": gathered,
        "activations": kept,
        "communication": buffers,
    }


def _zero(
    layout: Layout, shares: Shares, held: Sequence[Parameter], walk: _Walk
) -> tuple[list[Moment], Moment]:
    """DeepSpeed runs in float32: weights are cast where they are used, and autograd keeps that."""
    local = sum(shares.gathered(p) for p in held)
    part = sum(-(-shares.gathered(p) // shares.ranks(p)) for p in held)
    largest = max(shares.gathered(p) for p in held)
    bucket = MASTER * min(local, max(BUCKET, largest))
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
        small = sum(n for p in held if (n := shares.gathered(p)) <= PERSIST)
        # the shards that gathers start from stand beside the masters
        gathered = MASTER * (part + small + min(local - small, LIVE))
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
