"""Bytes that autograd keeps of a micro-batch, and what backward needs beside them.

A block is a list of tensors in the order of forward, each with its bytes, whether autograd keeps it
and whether remat does (the result of a product, the routing). What a block keeps in the compute
dtype is cut by tensor parallelism where a tensor is; what is float32 whatever the precision says
so. Attention counts as its flash kernel, which keeps no scores.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from parallel.remat import RematConfig
from pretrain.models.families import ModelConfig
from pretrain.models.rep import pays
from pretrain.planning.anatomy import Site, anatomy

FLOAT = 4  # bytes of float32
INDEX = 8  # bytes of an int64


@dataclass(frozen=True)
class Sizes:
    """What decides how large a tensor is on a rank."""

    images: int  # of a micro-batch
    item: int  # bytes of the compute dtype
    tp: int = 1
    ep: int = 1
    room: float = 1.0  # rows that the dispatcher sends ÷ picks
    pairs: bool = True  # pairs of 1×1 may be multiplied together, as where nothing cuts them


@dataclass(frozen=True)
class Tensor:
    """One result of the forward of a block."""

    name: str
    bytes: int
    saved: bool = True  # autograd keeps it
    product: bool = False  # of a product or a collective: selective remat keeps it
    routing: bool = False  # every remat keeps it


@dataclass(frozen=True)
class Kept:
    """Bytes of one unit of a micro-batch."""

    entering: int  # what comes in: all that full remat needs beside the routing
    saved: int  # by autograd, without remat; what comes in is among it
    full: int  # what full remat keeps of what is made inside
    selective: int
    backward: int  # the most that gradients take at once, beside what was kept


def block(site: Site, sizes: Sizes) -> Iterator[Tensor]:
    """What the forward of one block makes and does not drop at once, after what comes in."""
    n, c = sizes.images * site.tokens, site.width
    stream = n * c * sizes.item
    modulation = sizes.images * 6 * c * sizes.item
    yield Tensor("modulation", modulation, product=sizes.tp == 1)
    if sizes.tp > 1:
        yield Tensor("modulation, cut", modulation // sizes.tp, saved=False, product=True)
    if site.rank is not None:
        yield Tensor("low rank", sizes.images * site.rank * sizes.item, product=True)
    yield Tensor("statistics of a norm", 2 * n * FLOAT)
    yield Tensor("modulated", stream)
    yield from _attention(site, sizes)
    yield Tensor("attended stream", stream)
    yield Tensor("statistics of a norm", 2 * n * FLOAT)
    yield Tensor("modulated", stream)
    if site.moe is not None:
        yield from _routed(site, sizes)
    if site.ffn is not None:
        yield from _dense(site, sizes)


def _attention(site: Site, sizes: Sizes) -> Iterator[Tensor]:
    n, c = sizes.images * site.tokens, site.width
    stream, wide = n * c * sizes.item, n * c * FLOAT // sizes.tp
    cut, whole = stream // sizes.tp, sizes.item == FLOAT
    heads = n * site.heads * FLOAT // sizes.tp
    if site.windows > 1:
        yield Tensor("by phase", stream, product=True)
    match site.attention:
        case "dot":
            yield Tensor("q and k", 2 * cut, product=True)
        case "norm":
            yield Tensor("q and k", 2 * cut, saved=whole, product=True)
            yield Tensor("statistics of heads", 4 * heads)
            yield Tensor("q and k, normed", 2 * cut)
            if not whole:
                yield Tensor("q and k, wide", 2 * wide)
        case "cosine":
            yield Tensor("q and k", 2 * cut, product=True)
            turns = site.tokens // site.windows * (c // site.heads)
            yield Tensor("rotary tables", 4 * turns * FLOAT)
            yield Tensor("q and k of length 1", 2 * cut)
    yield Tensor("v", cut, product=True)
    yield Tensor("read", cut, product=True)
    yield Tensor("sums of exponentials", heads, product=True)
    yield Tensor("out", stream, product=sizes.tp == 1)


def _dense(site: Site, sizes: Sizes) -> Iterator[Tensor]:
    n = sizes.images * site.tokens
    stream, inner = n * site.width * sizes.item, n * site.hidden * sizes.item // sizes.tp
    last = Tensor("fed forward", stream, saved=site.moe is None, product=sizes.tp == 1)
    match site.ffn:
        case "mlp":
            yield Tensor("expanded", inner, product=True)
            yield Tensor("bent", inner)
            yield last
        case "swiglu":
            yield Tensor("gate and up", 2 * inner, product=True)
            yield Tensor("gated", inner)
            yield last
        case "rep":
            yield _pair(site, sizes, site.width, site.hidden)
            yield Tensor("expanded", inner, product=True)
            yield Tensor("kernels in one", 25 * site.hidden * sizes.item // sizes.tp)
            yield Tensor("mixed", inner, product=True)
            yield _pair(site, sizes, site.hidden, site.width)
            yield last


def _pair(site: Site, sizes: Sizes, inner: int, outer: int) -> Tensor:
    """What stands between two linears: their product, or the result of the first."""
    n, c = sizes.images * site.tokens, site.width
    if sizes.pairs and pays(n, inner, c, outer):
        return Tensor("product of a pair", inner * outer * sizes.item, product=True)
    return Tensor("first of a pair", n * c * sizes.item, product=sizes.tp == 1)


def _routed(site: Site, sizes: Sizes) -> Iterator[Tensor]:
    assert site.moe is not None
    moe, n, c = site.moe, sizes.images * site.tokens, site.width
    table = n * moe.experts * FLOAT
    if moe.router_input == "unmodulated":
        yield Tensor("normed", n * c * FLOAT)
    if sizes.item != FLOAT:
        yield Tensor("read by the router", n * c * FLOAT)
    yield Tensor("logits", table, product=True)
    yield Tensor("scores", (1 if moe.score == "softmax" else 2) * table)
    picks = sizes.images * site.picks // sizes.tp
    yield Tensor("picks", sizes.images * site.picks * INDEX, routing=True)
    yield Tensor("order of picks", picks * (4 * INDEX + 3 * FLOAT))
    rows = int(picks * sizes.room)
    row, hidden = rows * c * sizes.item, rows * site.expert_width * sizes.item
    yield Tensor("rows", row)
    if sizes.ep > 1:
        yield Tensor("rows, sent and sorted", row, product=True)
    yield Tensor("gate and up of experts", 2 * hidden, product=True)
    yield Tensor("gated rows", hidden)
    yield Tensor("rows of experts", row, saved=False, product=True)
    if sizes.ep > 1:
        yield Tensor("rows, back", row, saved=False, product=True)
    yield Tensor("rows by pick", picks * c * sizes.item)
    yield Tensor("combined", n * c * sizes.item)


def _backward(site: Site, sizes: Sizes) -> int:
    """The most that gradients take at once in the backward of a block."""
    n = sizes.images * site.tokens
    stream, inner = n * site.width * sizes.item, n * site.hidden * sizes.item // sizes.tp
    # the stream's gradient, the branch's, and of the widest step its result's and its input's
    return 2 * stream + max(2 * stream, 2 * inner)


@lru_cache(maxsize=256)
def unit(cfg: ModelConfig, index: int, sizes: Sizes) -> Kept:
    """Of what is recomputed as one: a block of DiT, two of U-DiT."""
    sites = [site for site in anatomy(cfg).sites if site.unit == index]
    tensors = [tensor for site in sites for tensor in block(site, sizes)]
    entering = [sizes.images * s.tokens * s.width * sizes.item for s in sites]
    return Kept(
        entering=entering[0],
        saved=sum(entering) + sum(t.bytes for t in tensors if t.saved),
        full=sum(t.bytes for t in tensors if t.routing),
        selective=sum(t.bytes for t in tensors if t.routing or t.product),
        backward=max(_backward(site, sizes) for site in sites),
    )


def around(cfg: ModelConfig, sizes: Sizes) -> int:
    """What is kept outside the blocks: conditions, embedding, skips, resampling, head."""
    whole = anatomy(cfg)
    total = 0
    for layer in whole.around:
        entering = layer.applied * layer.inner * sizes.item
        if layer.part == "condition" and layer.path.endswith("time2"):
            entering *= 4  # before and after three SiLUs
        if layer.path.endswith("head.adaln.up"):
            entering = 0  # the condition itself
            modulated = max(x.applied for x in whole.around if x.part == "head")
            entering += layer.outer * sizes.item + modulated * (
                layer.inner * sizes.item + 2 * FLOAT
            )
        total += sizes.images * entering
    return total


def loss(cfg: ModelConfig, sizes: Sizes) -> int:
    """Noise, noised latents, prediction and what the loss makes of them."""
    whole = anatomy(cfg)
    inside, outside = whole.channels
    return sizes.images * whole.pixels * (2 * outside + 4 * inside) * FLOAT


def standing(cfg: ModelConfig, sizes: Sizes, remat: RematConfig) -> list[int]:
    """What each unit keeps from its forward to its backward."""
    kept = []
    for index in range(anatomy(cfg).units):
        one = unit(cfg, index, sizes)
        if remat.mode == "none" or (index + 1) % remat.every:
            kept.append(one.saved)
        else:
            kept.append(one.entering + getattr(one, remat.mode))
    return kept
