"""The layers every family is built from: linears, convolutions, adaLN, embeddings, the block.

Tokens stay channels-last throughout, (B, N, C) or (B, H, W, C): a 1×1 convolution is a `Linear`,
and a spatial one runs on the permuted view, which is torch's channels_last memory format, without a
copy. Values are undefined until `init.initialise`. No layer writes to itself in forward. A layer
computes in the dtype of its input, whatever the dtype its weights are held in; `cuts` names the dim
of each parameter that its output features lie on.
"""

import math
from functools import partial
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallel.fp8.linear import linear
from parallel.fp8.product import Product
from parallel.kernels.norm import EPS, gated, gated_norm, modulate
from parallel.kernels.swiglu import swiglu
from parallel.tensor import Plan, part
from pretrain.models.init import Fill, Init, Normal, Table, Xavier, Zero, xavier_conv
from pretrain.models.moe import MoE, Routing

FREQUENCIES = 256  # width of the timestep sinusoid


class Linear(nn.Linear):
    """A linear layer that declares its start: xavier weight and zero bias unless told otherwise."""

    cuts: ClassVar = {"weight": 0, "bias": 0}
    fp8: Product | None = None

    def __init__(
        self, inner: int, outer: int, *, bias: bool = True, init: Init | None = None
    ) -> None:
        super().__init__(inner, outer, bias=bias)
        self.inits: dict[str, Init] = {"weight": init or Xavier(inner, outer)}
        if bias:
            self.inits["bias"] = Zero()

    def reset_parameters(self) -> None:
        """Nothing: `initialise` gives the values, from an address."""

    @staticmethod
    def compute(
        x: Tensor, weight: Tensor, bias: Tensor | None, fp8: Product | None = None
    ) -> Tensor:
        """With the parameters a rank holds, whole or cut."""
        bias = None if bias is None else part(bias, x.dtype)
        return linear(x, part(weight, x.dtype), bias, fp8)

    def forward(self, input: Tensor) -> Tensor:
        return self.compute(input, self.weight, self.bias, self.fp8)


class Conv(nn.Conv2d):
    """A convolution over channels-last tokens, same size out. (B, H, W, C) -> (B, H, W, C')."""

    cuts: ClassVar = {"weight": 0, "bias": 0}

    def __init__(
        self,
        inner: int,
        outer: int,
        kernel: int,
        *,
        groups: int = 1,
        bias: bool = True,
        init: Init | None = None,
    ) -> None:
        super().__init__(inner, outer, kernel, padding=kernel // 2, groups=groups, bias=bias)
        shape = (outer, inner // groups, kernel, kernel)
        self.inits: dict[str, Init] = {"weight": init or xavier_conv(shape)}
        if bias:
            self.inits["bias"] = Zero()

    def reset_parameters(self) -> None:
        """Nothing: `initialise` gives the values, from an address."""

    @staticmethod
    def compute(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """With the kernels a rank holds, whole or cut; groups as the shapes say."""
        weight = part(weight, x.dtype)
        bias = None if bias is None else part(bias, x.dtype)
        groups, padding = x.shape[-1] // weight.shape[1], weight.shape[-1] // 2
        images = x.permute(0, 3, 1, 2)
        return F.conv2d(images, weight, bias, 1, padding, 1, groups).permute(0, 2, 3, 1)

    def forward(self, input: Tensor) -> Tensor:
        return self.compute(input, self.weight, self.bias)


class Depthwise(Conv):
    """One k×k kernel a channel."""

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__(width, width, kernel, groups=width)


def layer_norm(x: Tensor) -> Tensor:
    """Normalise the last dim, without affine, in float32. (..., C) -> (..., C) float32."""
    return F.layer_norm(x.float(), x.shape[-1:], eps=EPS)


def times(x: Tensor, scale: float) -> Tensor:
    """x·scale; x itself where scale is 1, as in the standard parametrisation."""
    return x if scale == 1.0 else x * scale


class Conditioning(NamedTuple):
    """What conditions a block, one per image."""

    c: Tensor  # (B, D): SiLU(time + label)
    time: Tensor  # (B, D): SiLU(time)
    shared: Tensor | None  # (B, 6C): the part of the modulation that blocks share (adaLN-LoRA)


def sinusoid(t: Tensor, width: int = FREQUENCIES, shift: int = 0) -> Tensor:
    """Timestep features [cos | sin], frequencies 10000^(-i/(half - shift)), i < half.

    t: (B,) -> (B, width) float32. Source: DiT's has shift 0, DDPM's and diffusers' own DiT shift 1.
    """
    half = width // 2
    # why: in this order, or at t near 1000 the last bit of a rate is a difference of 1e-4.
    rate = torch.arange(half, device=t.device, dtype=torch.float32) * -math.log(10_000)
    rate = rate / (half - shift)
    angle = t.float()[:, None] * rate.exp()[None]
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


class LabelTable(nn.Embedding):
    """num_classes + 1 rows; the last is the null label."""

    cuts: ClassVar = {"weight": 1}

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__(num_classes + 1, width)
        self.register_parameter("bias", None)
        self.inits: dict[str, Init] = {"weight": Normal(0.02)}

    def reset_parameters(self) -> None:
        """Nothing: `initialise` gives the values, from an address."""

    @staticmethod
    def compute(x: Tensor, weight: Tensor, bias: None) -> Tensor:
        """With the columns a rank holds."""
        return F.embedding(x, part(weight, weight.dtype))

    def forward(self, input: Tensor) -> Tensor:
        return self.compute(input, self.weight, self.bias)


class Condition(nn.Module):
    """Time and label to one conditioning vector, with the shared adaLN of `adaln_lora` if asked."""

    tensor_plan: ClassVar[Plan] = {
        "time1": "column",
        "time2": "row",
        "label": "gathered",
        "adaln": "gathered",
    }

    def __init__(self, width: int, num_classes: int, shared_adaln: bool = False) -> None:
        super().__init__()
        self.time1 = Linear(FREQUENCIES, width, init=Normal(0.02))
        self.time2 = Linear(width, width, init=Normal(0.02))
        self.label = LabelTable(num_classes, width)
        self.adaln = Linear(width, 6 * width, init=Zero()) if shared_adaln else None

    def forward(self, waves: Tensor, label: Tensor) -> Conditioning:
        """waves: (B, 256) sinusoid of t; label: (B,) int64."""
        time = self.time2(F.silu(self.time1(waves)))  # (B, D)
        c = F.silu(time + self.label(label).to(time.dtype))
        shared = None if self.adaln is None else self.adaln(c)
        return Conditioning(c, F.silu(time), shared)


class AdaLN(nn.Module):
    """Modulation vectors of one block from its conditioning; all zero at the start.

    With a rank, a low-rank part of its own is added to the part that blocks share.
    Source: DiT section 3.2 (adaLN-Zero); adaLN-LoRA after PixArt and Cosmos.
    """

    tensor_plan: ClassVar[Plan] = {"up": "gathered"}

    def __init__(self, width: int, chunks: int, rank: int | None = None) -> None:
        super().__init__()
        self.chunks = chunks
        self.down = None if rank is None else Linear(width, rank, bias=False)
        self.up = Linear(rank or width, chunks * width, init=Zero())

    def forward(self, cond: Conditioning, ndim: int) -> tuple[Tensor, ...]:
        """`chunks` tensors (B, 1, ..., C) with ndim dims."""
        if self.down is None:
            out = self.up(cond.c)
        else:
            assert cond.shared is not None
            out = cond.shared + self.up(self.down(cond.c))
        out = out.view(out.shape[0], *(1,) * (ndim - 2), out.shape[-1])
        return out.chunk(self.chunks, dim=-1)


def tanh_gelu(x: Tensor) -> Tensor:
    """GELU by its tanh approximation. Source: Hendrycks and Gimpel, section 2."""
    if not torch.compiler.is_compiling():
        return F.gelu(x, approximate="tanh")
    # perf: 1 + tanh(u) = 2·sigmoid(2u). What the compiler makes of an exp takes half the time.
    wide = x.float()
    twice = math.sqrt(8 / math.pi) * (wide + 0.044715 * wide * wide * wide)
    return (wide * twice.sigmoid()).to(x.dtype)


class Mlp(nn.Module):
    """Two linears with tanh-GELU between: the feed-forward of DiT."""

    tensor_plan: ClassVar[Plan] = {"enter": "enter", "fc1": "column", "fc2": "row"}
    fp8_products: ClassVar = ("fc1", "fc2")

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.enter = nn.Identity()
        self.fc1 = Linear(width, hidden)
        self.fc2 = Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(tanh_gelu(self.fc1(self.enter(x))))


class SwiGLU(nn.Module):
    """Bias-free gated feed-forward: the shared expert of DiT-MoE."""

    tensor_plan: ClassVar[Plan] = {
        "enter": "enter",
        "gate": "column",
        "up": "column",
        "down": "row",
    }
    fp8_products: ClassVar = ("gate", "up", "down")

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.enter = nn.Identity()
        self.gate = Linear(width, hidden, bias=False)
        self.up = Linear(width, hidden, bias=False)
        self.down = Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        return self.down(swiglu(self.gate(x), self.up(x)))


class Block(nn.Module):
    """One transformer block with adaLN-Zero; the identity at the start. (B, ..., C) -> the same.

    Attention and feed-forward are given; both families and their MoE variants differ only in these.
    """

    def __init__(self, adaln: AdaLN, attn: nn.Module, ffn: nn.Module, scale: float = 1.0) -> None:
        """scale: multiplies what attention and feed-forward add."""
        super().__init__()
        self.adaln, self.attn, self.ffn, self.scale = adaln, attn, ffn, scale

    def forward(
        self, x: Tensor, cond: Conditioning, rope: Tensor | None = None
    ) -> tuple[Tensor, Routing | None]:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaln(cond, x.ndim)
        gate1, gate2 = times(gate1, self.scale), times(gate2, self.scale)
        out, routing = self.attn(modulate(x, shift1, scale1), rope), None
        phases = out.shape[0] != x.shape[0]  # attention within phase grids leaves them apart
        x, out = gated_norm(x, out, gate1, shift2, scale2, phases=phases)
        if isinstance(self.ffn, MoE):
            out, routing = self.ffn(out, layer_norm(x), cond.time)
        else:
            out = self.ffn(out)
        return gated(x, out, gate2), routing


class PatchEmbed(Linear):
    """Patches to tokens, row-major: (B, C, H, W) -> (B, N, D); weight (D, C, p, p) flattened."""

    def __init__(self, channels: int, patch: int, width: int) -> None:
        super().__init__(channels * patch * patch, width)
        self.patch = patch

    def forward(self, input: Tensor) -> Tensor:
        x = F.pixel_unshuffle(input, self.patch)  # (B, C*p*p, H/p, W/p)
        return super().forward(x.flatten(2).transpose(1, 2))


class PatchHead(nn.Module):
    """Tokens back to an image. (B, N, D) -> (B, C, H, W); a patch is (row, column, channel)."""

    def __init__(self, width: int, patch: int, channels: int, scale: float = 1.0) -> None:
        """scale: multiplies what the linear reads."""
        super().__init__()
        self.patch, self.channels, self.scale = patch, channels, scale
        self.adaln = AdaLN(width, 2)
        self.linear = Linear(width, patch * patch * channels, init=Zero())

    def forward(self, x: Tensor, cond: Conditioning, grid: int) -> Tensor:
        x = self.linear(times(modulate(x, *self.adaln(cond, x.ndim)), self.scale))
        x = x.view(-1, grid, grid, self.patch, self.patch, self.channels)
        x = x.permute(0, 5, 1, 3, 2, 4)
        return x.reshape(-1, self.channels, grid * self.patch, grid * self.patch)


class PositionTable(nn.Module):
    """Fixed 2-D sine-cosine positions, added to tokens. (B, N, D) -> (B, N, D)."""

    def __init__(self, width: int, grid: int) -> None:
        super().__init__()
        self.register_buffer("table", torch.empty(grid * grid, width), persistent=False)
        self.inits: dict[str, Init] = {"table": Table(partial(position_table, width, grid))}

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table.to(x.dtype)


def position_table(width: int, grid: int) -> Tensor:
    """(grid², width) float32: first half the column, second half the row, each [sin | cos].

    Source: DiT's reference; frequencies 10000^(-j/(width/4)), integer coordinates.
    """
    with torch.device("cpu"):
        quarter = width // 4
        rate = 10_000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
        place = torch.arange(grid, dtype=torch.float64)[:, None] * rate
        wave = torch.cat([place.sin(), place.cos()], dim=1)  # (grid, width/2)
        column = wave[None, :].expand(grid, grid, -1)
        row = wave[:, None].expand(grid, grid, -1)
        return torch.cat([column, row], dim=-1).reshape(grid * grid, width).float()


class ChannelAffineNorm(nn.Module):
    """Layer norm with weight and bias, in float32: the qk-norm of DiT-MoE XL and G."""

    tensor_plan: ClassVar[Plan] = {"enter": "enter"}

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width))
        self.inits: dict[str, Init] = {"weight": Fill(1.0), "bias": Zero()}
        self.enter = nn.Identity()  # of the parameters: every rank's heads use all of them

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.enter(self.weight.float()), self.enter(self.bias.float())
        return F.layer_norm(x.float(), x.shape[-1:], weight, bias, EPS)
