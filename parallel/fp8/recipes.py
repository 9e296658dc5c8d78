"""How numbers become float8: formats, scales, and the three recipes. Arithmetic only.

A scale is always a power of two. Scaling is then exact in every float format, so a value keeps the
same bits whatever tensor it stands in, but for those that saturate or fall below the smallest
normal number: two layouts that see other maxima agree up to these. A scaled-back value is exact in
bfloat16 too, which is why a bf16 product of such values is a true emulation of an FP8 product.

* delayed: one scale a tensor, from the largest magnitude of the last `history` steps, all ranks.
* current: one scale a tensor, from the tensor at hand: of a weight the whole logical tensor,
  of activations and gradients those of this rank and micro-batch.
* block: one scale for each 1×128 tile of activations and gradients along the summed dim, and for
  each 128×128 block of a weight. Source: DeepSeek-V3, section 3.3.2; gradients are e4m3 too there.
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import guard_or_true

Recipe = Literal["delayed", "current", "block"]
Backend = Literal["transformer_engine", "torch", "emulated"]

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
LARGEST = {E4M3: 448.0, E5M2: 57344.0}
TILE = 128  # values that share a scale
_FARTHEST = 2.0**100  # of a scale, so that its inverse is a normal number


class FP8Config(BaseModel):
    """Products in FP8, of precision=fp8. Blocks' linears, experts and, if asked for, attention."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    recipe: Recipe = "delayed"
    attention: bool = False  # softmax(QKᵀ)V too
    keep_first: NonNegativeInt = 1  # blocks that stay in bf16 at the start
    keep_last: NonNegativeInt = 1  # and at the end
    history: PositiveInt = 64  # delayed: steps that a maximum is remembered
    margin: NonNegativeInt = Field(0, le=8)  # powers of two left free above the maximum
    # auto: Transformer Engine if it is there, else torch; without such a GPU an emulation
    backend: Backend | Literal["auto"] = "auto"
    guard_every: PositiveInt | None = 200  # steps between comparisons with bf16; null: none
    guard_limit: PositiveFloat = 0.005  # largest relative gap of the loss to bf16


class Quantised(NamedTuple):
    """float8 values and what they are multiplied with to be what they stand for.

    inverse: () or (E, 1, 1) for whole matrices; (..., 1) for rows; of tiles (Mt, Kt), where data is
    filled up with zeros to whole tiles and shape is without them.
    """

    data: Tensor  # (..., M, K) float8
    inverse: Tensor  # float32
    shape: torch.Size
    tile: tuple[int, int] | None = None

    def plain(self, dtype: torch.dtype) -> Tensor:
        """The values stood for, exact in bfloat16 and wider; zeros of tiles included."""
        inverse = self.inverse.to(dtype)
        if self.tile is None:
            return self.data.to(dtype) * inverse
        grid = self.data.to(dtype).view(_grid(self.data.shape, self.tile))
        return (grid * inverse[:, None, :, None]).view(self.data.shape)

    def t(self) -> "Quantised":
        """Of matrices with one scale each: the transpose, with the same scale."""
        assert self.inverse.shape[-2:].numel() == 1, "scales lie along one dim"
        data = self.data.transpose(-2, -1)
        return Quantised(data, self.inverse, data.shape)


def largest(x: Tensor) -> Tensor:
    """Largest magnitude, () float32; 0 of an empty tensor, not finite if x is not."""
    magnitudes = x.detach().abs()
    if guard_or_true(x.numel() == 0):  # why: true as well where a compiler cannot know
        magnitudes = F.pad(magnitudes.flatten(), (0, 1))
    return magnitudes.amax().float()


def scale_of(amax: Tensor, fmt: torch.dtype, margin: int = 0) -> Tensor:
    """The largest power of two that brings amax to at most 2^-margin of the format's range.

    1 for an amax of 0, 0 for an infinite one. Same shape as amax, float32.
    """
    ratio = (LARGEST[fmt] * 2.0**-margin / amax).clamp(max=_FARTHEST)
    # why: a float's exponent bits alone are the power of two below it, on every device alike.
    power = (ratio.contiguous().view(torch.int32) & 0x7F800000).view(torch.float32)
    return torch.where(amax == 0, torch.ones_like(power), power)


def cast(x: Tensor, scale: Tensor, fmt: torch.dtype) -> Tensor:
    """x·scale, saturated. Exact up to the one rounding, as the scale is a power of two."""
    limit = LARGEST[fmt]
    return (x * scale.to(x.dtype)).clamp(-limit, limit).to(fmt)


def whole(x: Tensor, fmt: torch.dtype, amax: Tensor, margin: int = 0) -> Quantised:
    """One scale for x, or for each matrix of it. amax: (), or of each matrix (E, 1, 1)."""
    scale = scale_of(amax, fmt, margin)
    return Quantised(cast(x, scale, fmt), 1.0 / scale, x.shape)


def by_history(
    x: Tensor, fmt: torch.dtype, past: Tensor, now: Tensor, margin: int = 0
) -> Quantised:
    """One scale from past steps, or from `now` where there are none. past, now: () maxima.

    A tensor that is not finite gives nothing but NaN: saturation would hide it from the step's
    guard.
    """
    scale = scale_of(torch.where(past > 0, past, now), fmt, margin)
    inverse = torch.where(now.isfinite(), 1.0 / scale, torch.nan)
    return Quantised(cast(x, scale, fmt), inverse, x.shape)


def rows(x: Tensor, fmt: torch.dtype, margin: int = 0) -> Quantised:
    """One scale for each row. x: (..., M, K)."""
    magnitudes = x.detach().abs()
    if guard_or_true(x.shape[-1] == 0):  # as in `largest`
        magnitudes = F.pad(magnitudes, (0, 1))
    scale = scale_of(magnitudes.amax(-1, keepdim=True).float(), fmt, margin)
    return Quantised(cast(x, scale, fmt), 1.0 / scale, x.shape)


def tiles(x: Tensor, fmt: torch.dtype, tile: tuple[int, int], margin: int = 0) -> Quantised:
    """One scale for each tile, filled up with zeros; no tile is larger than x. x: (M, K)."""
    tile = (max(1, min(tile[0], x.shape[0])), min(tile[1], x.shape[1]))
    down, right = (-n % t for n, t in zip(x.shape, tile, strict=True))
    padded = F.pad(x.detach(), (0, right, 0, down))
    grid = padded.view(_grid(padded.shape, tile))
    scale = scale_of(grid.abs().amax((1, 3)).float(), fmt, margin)
    data = cast(grid, scale[:, None, :, None], fmt).view(padded.shape)
    return Quantised(data, 1.0 / scale, x.shape, tile)


def _grid(shape: torch.Size, tile: tuple[int, int]) -> tuple[int, int, int, int]:
    return (shape[0] // tile[0], tile[0], shape[1] // tile[1], tile[1])
