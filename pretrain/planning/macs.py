"""Multiply-adds of a forward, in closed form, by block and part.

The graph is counted in one of three forms: `published`, as the papers draw it; `merged`, for
inference; `trained`, as this program runs it on a micro-batch. The forms differ in U-DiT's
feed-forward only. Every matrix product, convolution and attention counts, nothing else does; a
FLOP count is twice this, a training step three times a forward. Where weights are multiplied
together first, that is counted once a micro-batch, so counts are of a whole micro-batch.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from pretrain.models.families import ModelConfig
from pretrain.models.rep import Form, pays
from pretrain.planning.anatomy import AROUND, Anatomy, Site, anatomy

Kind = Literal["product", "grouped", "attention", "depthwise", "convolution"]


@dataclass(frozen=True)
class Work:
    """One part of the forward of a micro-batch."""

    stage: str
    part: str  # adaln, mix, qkv, attention, out, ffn, router, experts, shared; embed, head, …
    kind: Kind
    macs: int
    whole: bool = False  # done by every rank of a tensor axis


def forward(
    cfg: ModelConfig, form: Form, images: int = 1, *, pairs: bool = True
) -> tuple[Work, ...]:
    """Every part of a forward of a micro-batch of `images`.

    pairs: pairs of 1×1 may be multiplied together when trained, as where no axis cuts them.
    """
    whole = anatomy(cfg)
    blocks = (work for site in whole.sites for work in block(site, form, images, pairs=pairs))
    return (*blocks, *_around(whole, images))


def total(cfg: ModelConfig, form: Form, images: int = 1, *, pairs: bool = True) -> int:
    """Multiply-adds of a forward of a micro-batch of `images`."""
    return sum(work.macs for work in forward(cfg, form, images, pairs=pairs))


def flops_per_image(cfg: ModelConfig, images: int = 1, *, pairs: bool = True) -> int:
    """FLOPs of training on one image, in micro-batches of `images`: 2 a multiply-add, three times
    the forward that is run. Rounded down.

    Not above `flops_train_per_image` of the plan, which is of the published graph.
    """
    return 6 * total(cfg, "trained", images, pairs=pairs) // images


def block(site: Site, form: Form, images: int, *, pairs: bool = True) -> Iterator[Work]:
    tokens, c, name = images * site.tokens, site.width, site.stage
    if site.rank is None:
        yield Work(name, "adaln", "product", images * 6 * c * c)
    else:
        yield Work(name, "adaln", "product", images * 7 * c * site.rank)
    if site.windows > 1:
        yield Work(name, "mix", "depthwise", tokens * 25 * c, whole=True)
    yield Work(name, "qkv", "product", tokens * 3 * c * c)
    yield Work(name, "attention", "attention", 2 * tokens * (site.tokens // site.windows) * c)
    yield Work(name, "out", "product", tokens * c * c)
    if site.moe is not None:
        logits = tokens + (images if site.moe.router_time else 0)
        yield Work(name, "router", "product", logits * c * site.moe.experts, whole=True)
        rows = images * site.picks
        yield Work(name, "experts", "grouped", 3 * rows * c * site.expert_width)
    part = "ffn" if site.moe is None else "shared"
    match site.ffn:
        case "mlp":
            yield Work(name, part, "product", 2 * tokens * c * site.hidden)
        case "swiglu":
            yield Work(name, part, "product", 3 * tokens * c * site.hidden)
        case "rep":
            yield from _rep(name, part, tokens, c, site.hidden, form, pairs)


def _rep(
    stage: str, part: str, tokens: int, c: int, hidden: int, form: Form, pairs: bool
) -> Iterator[Work]:
    """U-DiT's feed-forward: a pair of 1×1, depthwise kernels, a pair of 1×1."""
    for inner, outer in ((c, hidden), (hidden, c)):
        product = tokens * c * hidden
        if form == "trained" and pairs and pays(tokens, inner, c, outer):
            product += (
                inner * c * outer + c * outer
            )  # the weights' product, and the bias through it
        elif form != "merged":
            product += tokens * c * c
        yield Work(stage, part, "product", product)
    kernels = 25 + 9 + 1 if form == "published" else 25
    yield Work(stage, f"{part} kernels", "depthwise", tokens * kernels * hidden)


def _around(whole: Anatomy, images: int) -> Iterator[Work]:
    for layer in whole.around:
        kind: Kind = "product" if layer.kernel == 1 else "convolution"
        yield Work(AROUND, layer.part, kind, images * layer.macs, whole=layer.cut is None)
