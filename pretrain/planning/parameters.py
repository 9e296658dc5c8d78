"""Every trainable tensor of a model, by arithmetic on its configuration: name, shape, its cut.

The tests hold this list against the model that is built: the same names, shapes and cuts.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch

from pretrain.models.build import build
from pretrain.models.families import ModelConfig
from pretrain.planning.anatomy import AROUND, Anatomy, Layer, Site, anatomy


@dataclass(frozen=True)
class Parameter:
    """One tensor."""

    path: str
    shape: tuple[int, ...]
    stage: str = AROUND
    unit: int | None = None  # what is sharded as one; None: the root
    cut: int | None = None  # the dim that a tensor axis cuts
    role: str = "dense"  # dense | expert | router

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@lru_cache(maxsize=64)
def parameters(cfg: ModelConfig) -> tuple[Parameter, ...]:
    """In the order of the model."""
    whole = anatomy(cfg)
    in_blocks = [_named(site, parameter) for site in whole.sites for parameter in _block(site)]
    return (*_around(whole), *in_blocks)


@lru_cache(maxsize=16)
def counted(cfg: ModelConfig) -> int:
    """Trainable values of the model itself, built on meta."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build(cfg).parameters())


def _named(site: Site, parameter: Parameter) -> Parameter:
    path = f"{site.path}.{parameter.path}"
    return Parameter(path, parameter.shape, site.stage, site.unit, parameter.cut, parameter.role)


def _around(whole: Anatomy) -> Iterator[Parameter]:
    for layer in whole.around:
        yield from _layer(layer)
    for table in whole.tables:
        yield Parameter(f"{table.path}.weight", (table.rows, table.width), cut=1)


def _layer(layer: Layer) -> Iterator[Parameter]:
    shape: tuple[int, ...] = (layer.outer, layer.inner)
    if layer.kernel > 1:
        shape = (*shape, layer.kernel, layer.kernel)
    cut = {"column": 0, "gathered": 0, "row": 1}.get(layer.cut or "")
    yield Parameter(f"{layer.path}.weight", shape, cut=cut)
    if layer.bias:
        yield Parameter(f"{layer.path}.bias", (layer.outer,), cut=None if cut == 1 else cut)


def _linear(
    path: str, inner: int, outer: int, cut: str | None = None, *, bias: bool = True
) -> Iterator[Parameter]:
    dim = {"column": 0, "gathered": 0, "row": 1}.get(cut or "")
    yield Parameter(f"{path}.weight", (outer, inner), cut=dim)
    if bias:
        yield Parameter(f"{path}.bias", (outer,), cut=None if dim == 1 else dim)


def _depthwise(path: str, width: int, kernel: int, cut: int | None = None) -> Iterator[Parameter]:
    yield Parameter(f"{path}.weight", (width, 1, kernel, kernel), cut=cut)
    yield Parameter(f"{path}.bias", (width,), cut=cut)


def _block(site: Site) -> Iterator[Parameter]:
    c, inner = site.width, "attn"
    if site.rank is not None:
        yield from _linear("adaln.down", c, site.rank, bias=False)
    yield from _linear("adaln.up", site.rank or c, 6 * c, "gathered")
    if site.windows > 1:
        yield from _depthwise("attn.mix", c, 5)
        inner = "attn.core"
    for name in ("q", "k", "v"):
        yield from _linear(f"{inner}.{name}", c, c, "column")
    yield from _linear(f"{inner}.out", c, c, "row")
    if site.attention == "norm":
        for name in ("q_norm", "k_norm"):
            for kind in ("weight", "bias"):
                yield Parameter(f"{inner}.{name}.{kind}", (c // site.heads,))
    if site.attention == "cosine":
        yield Parameter(f"{inner}.logit_scale", (site.heads,), cut=0)
    if site.moe is not None:
        yield Parameter("ffn.router.weight", (site.moe.experts, c), role="router")
        if site.moe.router_time:
            yield Parameter("ffn.router.time", (site.moe.experts, c), role="router")
        e, h = site.moe.experts, site.expert_width
        for name, shape in (("gate", (e, h, c)), ("up", (e, h, c)), ("down", (e, c, h))):
            yield Parameter(f"ffn.experts.{name}", shape, role="expert")
    path = "ffn" if site.moe is None else "ffn.shared"
    match site.ffn:
        case "mlp":
            yield from _linear(f"{path}.fc1", c, site.hidden, "column")
            yield from _linear(f"{path}.fc2", site.hidden, c, "row")
        case "swiglu":
            for name in ("gate", "up"):
                yield from _linear(f"{path}.{name}", c, site.hidden, "column", bias=False)
            yield from _linear(f"{path}.down", site.hidden, c, "row", bias=False)
        case "rep":
            yield from _linear(f"{path}.expand.first", c, c, "gathered")
            yield from _linear(f"{path}.expand.second", c, site.hidden, "column")
            for kernel, name in ((5, "five"), (3, "three"), (1, "one")):
                yield from _depthwise(f"{path}.mix.{name}", site.hidden, kernel, cut=0)
            yield from _linear(f"{path}.contract.first", site.hidden, c, "row")
            yield from _linear(f"{path}.contract.second", c, c, "gathered")
