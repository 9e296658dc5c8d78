"""Attention over token sets, and its down-sampled form for U-DiT.

One `Attention` serves every family: plain dot product (DiT), affine qk-norm (DiT-MoE XL and G),
cosine with 2-D rotary positions (U-DiT). q, k and v are separate parameters, each started with the
bound of the fused (3C, C) matrix that the references use. The key bias has gradient exactly 0 under
softmax.
"""

import math
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from parallel.fp8.attention import attend
from parallel.fp8.product import Product
from parallel.kernels.depthwise import mix, split_phases
from parallel.kernels.heads import cosine_heads, rotate
from parallel.tensor import Plan, part
from pretrain.models.init import Fill, Init, Table, Xavier
from pretrain.models.layers import ChannelAffineNorm, Depthwise, Linear

MAX_LOG_SCALE = math.log(100.0)


class Attention(nn.Module):
    """Softmax attention within each token set. (B, N, C) -> (B, N, C)."""

    tensor_plan: ClassVar[Plan] = {
        "enter": "enter",
        "q": "column",
        "k": "column",
        "v": "column",
        "out": "row",
        "logit_scale": "cut",
    }
    fp8_products: ClassVar = ("q", "k", "v", "out")
    fp8_attention: Product | None = None  # of softmax(QKᵀ)V

    def __init__(
        self,
        width: int,
        num_heads: int,
        kind: Literal["dot", "norm", "cosine"] = "dot",
        phases: bool = False,
    ) -> None:
        """phases: four token sets at a time are the phases of an image, see `split_phases`."""
        super().__init__()
        self.kind = kind
        self.phases = phases
        self.head_dim = width // num_heads
        fused = Xavier(width, 3 * width)
        self.enter = nn.Identity()
        self.q = Linear(width, width, init=fused)
        self.k = Linear(width, width, init=fused)
        self.v = Linear(width, width, init=fused)
        self.out = Linear(width, width)
        if kind == "norm":
            self.q_norm = ChannelAffineNorm(self.head_dim)
            self.k_norm = ChannelAffineNorm(self.head_dim)
        self.register_parameter("logit_scale", None)
        self.inits: dict[str, Init] = {}
        if kind == "cosine":
            self.logit_scale = nn.Parameter(torch.empty(num_heads))
            self.inits = {"logit_scale": Fill(math.log(10.0))}

    def forward(self, x: Tensor, rope: Tensor | None = None) -> Tensor:
        """rope: (2, N, head_dim/2) cosines and sines, or None."""
        heads = (-1, self.head_dim)  # those of this rank
        x = self.enter(x)
        q = self.q(x).unflatten(-1, heads)  # (B, N, nh, hd)
        k = self.k(x).unflatten(-1, heads)
        v = self.v(x).unflatten(-1, heads)
        q, k = self._prepare(q, k, rope)
        x = attend(
            q.to(v.dtype).transpose(1, 2),
            k.to(v.dtype).transpose(1, 2),
            v.transpose(1, 2),
            1.0 if self.kind == "cosine" else None,
            self.fp8_attention,
            self.phases,
        )
        return self.out(x.transpose(1, 2).flatten(2))

    def _prepare(self, q: Tensor, k: Tensor, rope: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.kind == "cosine":
            scale = part(self.logit_scale, torch.float32).clamp(max=MAX_LOG_SCALE).exp()  # (nh,)
            return cosine_heads(q, rope, scale), cosine_heads(k, rope, None)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        if self.kind == "norm":
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k


class PhaseAttention(nn.Module):
    """Tokens attend within their phase of a 2×2 grid. (B, H, W, C) -> (4B, H/2·W/2, C).

    A depthwise 5×5 mixes neighbours first; then the four phase grids are four token sets of H/2·W/2
    tokens, at full width. They come out as such, see `split_phases`; whoever reads them next joins
    them on the way. Source: U-DiT, section 3.3.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.apart = False  # whether `mix` is called by itself, for whoever watches it
        self.mix = Depthwise(width, 5)
        self.core = Attention(width, num_heads, "cosine", phases=True)

    def forward(self, x: Tensor, rope: Tensor | None) -> Tensor:
        if self.apart:
            tokens = split_phases(x + self.mix(x))
        else:
            bias = self.mix.bias
            assert bias is not None
            tokens = mix(x, part(self.mix.weight, x.dtype), part(bias, x.dtype), split=True)
        return self.core(tokens, rope)  # (4B, H/2*W/2, C)


class Rope(nn.Module):
    """The rotary table of one grid: forward gives (2, grid², head_dim/2), cosines then sines."""

    def __init__(self, grid: int, head_dim: int) -> None:
        super().__init__()
        shape = (2, grid * grid, head_dim // 2)
        self.register_buffer("table", torch.empty(shape, dtype=torch.float32), persistent=False)
        self.inits: dict[str, Init] = {"table": Table(partial(rope_table, grid, head_dim))}

    def forward(self) -> Tensor:
        return self.table


def rope_table(grid: int, head_dim: int) -> Tensor:
    """(2, grid², head_dim/2) float32. Even pairs turn by the column, odd pairs by the row.

    Frequencies 10000^(-4i/head_dim), i < head_dim/4; pair 2i uses column·f_i, pair 2i + 1 uses
    row·f_i.
    """
    with torch.device("cpu"):
        rate = 10_000.0 ** (-4 * torch.arange(head_dim // 4, dtype=torch.float64) / head_dim)
        token = torch.arange(grid * grid)
        column = (token % grid)[:, None] * rate
        row = (token // grid)[:, None] * rate
        angle = torch.stack([column, row], dim=-1).flatten(1)  # (grid², hd/2)
        return torch.stack([angle.cos(), angle.sin()]).float()
