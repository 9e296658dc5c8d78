"""DiT and DiT-MoE: a patch embedding, equal transformer blocks, a patch head.

Source: Peebles and Xie, Scalable Diffusion Models with Transformers; Fei et al., Scaling Diffusion
Transformers to 16 Billion Parameters. Written from descriptions, no reference code used.
"""

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from pretrain.models.attention import Attention
from pretrain.models.layers import (
    AdaLN,
    Block,
    Condition,
    Mlp,
    PatchEmbed,
    PatchHead,
    PositionTable,
    SwiGLU,
    sinusoid,
)
from pretrain.models.moe import MoE, MoEConfig, Router, Routing, moe_layers
from pretrain.models.shape import LatentConfig, fill_from_size, require_multiple

_SHAPES = {
    "S": {"depth": 12, "width": 384, "num_heads": 6},
    "B": {"depth": 12, "width": 768, "num_heads": 12},
    "L": {"depth": 24, "width": 1024, "num_heads": 16},
    "XL": {"depth": 28, "width": 1152, "num_heads": 16},
    "G": {"depth": 40, "width": 1408, "num_heads": 16},
}
_PATCHES = (2, 4, 8)
_NEEDED = ("depth", "width", "num_heads", "patch")

DIT_SIZES: dict[str, dict[str, Any]] = {
    f"{name}/{patch}": {**_SHAPES[name], "patch": patch}
    for name in ("S", "B", "L", "XL")
    for patch in _PATCHES
}
DIT_MOE_SIZES: dict[str, dict[str, Any]] = {
    f"{name}/{patch}-{experts}E2A": {
        **shape,
        "patch": patch,
        "qk_norm": name in ("XL", "G"),
        "moe": {"experts": experts},
    }
    for name, shape in _SHAPES.items()
    for patch in _PATCHES
    for experts in (8, 16)
}
PUBLISHED_MOE: dict[str, Any] = {
    "experts": 8,
    "top_k": 2,
    "hidden_ratio": 4.0,
    "shared": True,
    "shared_ratio": 2.0,
    "score": "softmax",
    "renormalise": False,
    "scale": 1.0,
    "router_input": "modulated",
    "router_time": False,
    "balance": "none",
    "aux_batch": 0.01,
}


class DiTShape(LatentConfig):
    """The fields that DiT and DiT-MoE share. A field given explicitly wins over `size`."""

    depth: int = Field(ge=1)  # blocks
    width: int = Field(ge=4)  # channels of a token
    num_heads: int = Field(ge=1)  # attention heads
    head_dim: int | None = Field(None, ge=1)  # another way to say num_heads
    patch: int = Field(ge=1)  # latent pixels a token, per side
    mlp_ratio: float = Field(4.0, gt=0)  # hidden ÷ width of a dense feed-forward
    qk_norm: bool = False  # affine layer norm of q and k, per head
    # time frequencies 10000^(-i/(128 - this)): 0 as published, 1 as diffusers' own class has them
    sinusoid_shift: Literal[0, 1] = 0

    @model_validator(mode="after")
    def _check(self) -> "DiTShape":
        require_multiple("width", self.width, 4, "sine and cosine of two axes")
        require_multiple("width", self.width, self.num_heads, "num_heads")
        require_multiple("input_size", self.input_size, self.patch, "patch")
        if self.head_dim not in (None, self.width // self.num_heads):
            raise ValueError(
                f"head_dim={self.head_dim} x num_heads={self.num_heads} must be "
                f"width={self.width}; give one of the two"
            )
        return self

    @property
    def residual_scale(self) -> float:
        """Multiplies what attention and feed-forward add to the tokens.

        Source: Yang et al., Tensor Programs VI (Depth-muP).
        """
        base = self.mup.base_depth if self.mup else None
        return 1.0 if base is None else math.sqrt(base / self.depth)

    def heads(self) -> dict[str, int]:
        """Attention heads by what sets them."""
        return {"model.num_heads": self.num_heads}

    def head_dims(self) -> dict[str, int]:
        """Channels of an attention head by where it is."""
        return {"every block": self.width // self.num_heads}

    def moe_tokens(self) -> list[int]:
        """Tokens of an image in each kind of MoE layer."""
        return [(self.input_size // self.patch) ** 2]


def _heads(values: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """num_heads from head_dim where only that was given."""
    width, head_dim = values.get("width"), values.get("head_dim")
    if head_dim and given.get("num_heads") is None:
        if not isinstance(width, int) or not isinstance(head_dim, int):
            return {**values, "num_heads": 1}  # why: pydantic reports the wrong type by its name
        require_multiple("width", width, head_dim, "head_dim")
        values = {**values, "num_heads": width // head_dim}
    return values


class DiTConfig(DiTShape):
    """A dense DiT."""

    family: Literal["dit"] = "dit"
    size: str | None = None  # published size: S/2 … XL/8

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        needed = tuple(n for n in _NEEDED if n != "num_heads" or not values.get("head_dim"))
        return _heads(fill_from_size(values, DIT_SIZES, needed, cls.model_fields), values)


class DiTMoEConfig(DiTShape):
    """A DiT with routed experts; `moe` starts from the published form."""

    family: Literal["dit-moe"] = "dit-moe"
    size: str | None = None  # published size: S/2-8E2A … G/8-16E2A
    moe: MoEConfig  # what is given wins over the published form

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        needed = tuple(n for n in _NEEDED if n != "num_heads" or not values.get("head_dim"))
        moe = values.get("moe") or {}
        moe = moe.model_dump(exclude_unset=True) if isinstance(moe, MoEConfig) else moe
        out = _heads(fill_from_size(values, DIT_MOE_SIZES, needed, cls.model_fields), values)
        if isinstance(moe, Mapping):
            sized = DIT_MOE_SIZES.get(str(values.get("size")), {}).get("moe", {})
            out["moe"] = {**PUBLISHED_MOE, **sized, **moe}
        return out

    @model_validator(mode="after")
    def _has_experts(self) -> "DiTMoEConfig":
        if self.moe.every > self.depth:
            raise ValueError(
                f"moe.every={self.moe.every} leaves none of depth={self.depth} blocks with "
                "experts; lower moe.every, or set family to dit"
            )
        return self


class DiT(nn.Module):
    """Latent, time and label to a prediction; dense or with experts in every n-th block."""

    label_tables = 1
    readout: ClassVar = "head.linear"  # the layer that starts at zero and whose input is scaled

    def __init__(self, cfg: DiTConfig | DiTMoEConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.dtype = torch.float32  # of activations
        self.grid = cfg.input_size // cfg.patch
        self.embed = PatchEmbed(cfg.in_channels, cfg.patch, cfg.width)
        self.position = PositionTable(cfg.width, self.grid)
        self.condition = Condition(cfg.width, cfg.num_classes)
        self.blocks = nn.ModuleList(_block(cfg, i) for i in range(cfg.depth))
        self.head = PatchHead(cfg.width, cfg.patch, cfg.out_channels, cfg.readout_scale)

    def forward(
        self, x_t: Tensor, t: Tensor, cond: Tensor, *, routing: bool = False
    ) -> Tensor | tuple[Tensor, list[Routing]]:
        """Predict from a noised latent.

        x_t: (B, C, H, W) float32; t: (B,) in sinusoid units (0..1000); cond: (B,) or (B, 1) int64,
        the value num_classes being the null label. Returns pred: (B, C or 2C, H, W) float32, and
        with `routing` one Routing for each MoE layer in order.
        """
        self.cfg.check_input(x_t)
        x = self.position(self.embed(x_t.to(self.dtype)))  # (B, N, D)
        waves = sinusoid(t, shift=self.cfg.sinusoid_shift).to(self.dtype)
        c = self.condition(waves, cond.view(-1))  # (B, D)
        seen: list[Routing] = []
        for block in self.blocks:
            x, routed = block(x, c)  # (B, N, D)
            seen += [routed] if routed is not None else []
        pred = self.head(x, c, self.grid).float()  # (B, C', H, W)
        return (pred, seen) if routing else pred

    def units(self) -> list[nn.Module]:
        """What is sharded and compiled one by one: the blocks, in order."""
        return list(self.blocks)

    def routers(self) -> list[Router]:
        """The routers, which stay float32 whatever the precision."""
        return [layer.router for layer in moe_layers(self)]


def _block(cfg: DiTConfig | DiTMoEConfig, index: int) -> Block:
    attn = Attention(cfg.width, cfg.num_heads, "norm" if cfg.qk_norm else "dot")
    if isinstance(cfg, DiTMoEConfig) and (index + 1) % cfg.moe.every == 0:
        shared = SwiGLU(cfg.width, round(cfg.moe.shared_ratio * cfg.width))
        ffn: nn.Module = MoE(cfg.width, cfg.moe, shared if cfg.moe.shared else None)
    else:
        ffn = Mlp(cfg.width, round(cfg.mlp_ratio * cfg.width))
    return Block(AdaLN(cfg.width, 6), attn, ffn, cfg.residual_scale)
