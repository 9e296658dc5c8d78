"""Depthwise 5×5 with its shortcut on channels-last tokens, after a GELU if asked: y = a + w∗a + b.

Where U-DiT mixes neighbours. One pass over memory forward and one backward; of what it reads only
x is kept. In C on a CPU, bfloat16 by way of float32, and in Triton on a GPU; else plain torch
operators.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from parallel.kernels import gpu, native
from parallel.kernels.operators import fake, operator

KERNEL = 5
_ONE, _PAD = (1, 1), (KERNEL // 2, KERNEL // 2)


def mix(
    x: Tensor, weight: Tensor, bias: Tensor, *, gelu: bool = False, split: bool = False
) -> Tensor:
    """a + depthwise(a) + bias, where a is x, or its erf-GELU.

    x: (B, H, W, C); weight: (C, 1, 5, 5); bias: (C,); both in any dtype. Returns (B, H, W, C), or
    with `split`, for even H and W, the phase grids (4B, H/2·W/2, C), see `split_phases`.
    """
    return _Mix.apply(x, weight.to(x.dtype), bias.to(x.dtype), gelu, split)


def split_phases(x: Tensor) -> Tensor:
    """(B, H, W, C) -> (4B, H/2*W/2, C): phase 2·dy + dx of an image is its own token set."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // 2, 2, width // 2, 2, channels)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(batch * 4, height * width // 4, channels)


def join_phases(x: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `split_phases`: (4B, H/2*W/2, C) -> (B, H, W, C)."""
    channels = x.shape[-1]
    x = x.reshape(-1, 2, 2, height // 2, width // 2, channels)
    return x.permute(0, 3, 1, 4, 2, 5).reshape(-1, height, width, channels)


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, gelu: bool, split: bool
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.how = (gelu, split)
        return torch.ops.dit_pretrain.mix(x, weight, bias, gelu, split)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        of_x, of_weight, of_bias = torch.ops.dit_pretrain.mix_backward(
            grads[0], *ctx.saved_tensors, *ctx.how
        )
        return of_x, of_weight, of_bias, None, None


@operator("mix")
def _mix(x: Tensor, weight: Tensor, bias: Tensor, gelu: bool, split: bool) -> Tensor:
    x, weight, bias = x.contiguous(), weight.contiguous(), bias.contiguous()
    if gpu.fits(x, weight, bias):
        return gpu.kernels("depthwise").mix(x, weight, bias, gelu, split)
    if _widens(x):
        return _mix(x.float(), weight.float(), bias.float(), gelu, split).to(x.dtype)
    if not native.fits(x, weight, bias):
        return _plain(x, weight, bias, gelu, split)
    out = x.new_empty(_shape(x, split))
    native.call("mix5", x, weight, bias, out, *x.shape, gelu, split)
    return out


@operator("mix_backward")
def _mix_backward(
    grad: Tensor, x: Tensor, weight: Tensor, gelu: bool, split: bool
) -> tuple[Tensor, Tensor, Tensor]:
    grad, x, weight = grad.contiguous(), x.contiguous(), weight.contiguous()
    if gpu.fits(grad, x, weight):
        return gpu.kernels("depthwise").mix_backward(grad, x, weight, gelu, split)
    if _widens(x):
        wide = _mix_backward(grad.float(), x.float(), weight.float(), gelu, split)
        return wide[0].to(x.dtype), wide[1].to(x.dtype), wide[2].to(x.dtype)
    if not native.fits(grad, x, weight):
        return _plain_backward(grad, x, weight, gelu, split)
    of_x, of_weight = torch.empty_like(x), torch.empty_like(weight)
    of_bias = weight.new_empty(weight.shape[0])
    parts = x.new_empty(x.shape[0], KERNEL * KERNEL + 1, x.shape[-1])
    results = (of_x, of_weight, of_bias)
    native.call("mix5_backward", grad, x, weight, *results, parts, *x.shape, gelu, split)
    return results


def _widens(x: Tensor) -> bool:
    """Whether bfloat16 goes through float32. perf: torch's own depthwise convolution in bfloat16
    takes forty times as long where the processor has no instructions for it.
    """
    return x.device.type == "cpu" and x.dtype == torch.bfloat16 and native.library() is not None


@fake("mix")
def _(x: Tensor, weight: Tensor, bias: Tensor, gelu: bool, split: bool) -> Tensor:
    return x.new_empty(_shape(x, split))


@fake("mix_backward")
def _(
    grad: Tensor, x: Tensor, weight: Tensor, gelu: bool, split: bool
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (x.shape, weight.shape, weight.shape[:1])
    return tuple(x.new_empty(shape) for shape in shapes)  # type: ignore[return-value]


@register_flop_formula(torch.ops.dit_pretrain.mix)
def _flops(x: torch.Size, *args: Any, **kwargs: Any) -> int:
    return 2 * KERNEL * KERNEL * x.numel()


@register_flop_formula(torch.ops.dit_pretrain.mix_backward)
def _backward_flops(grad: torch.Size, x: torch.Size, *args: Any, **kwargs: Any) -> int:
    return 4 * KERNEL * KERNEL * x.numel()


def _shape(x: Tensor, split: bool) -> tuple[int, ...]:
    batch, height, width, channels = x.shape
    return (4 * batch, height * width // 4, channels) if split else tuple(x.shape)


def _plain(x: Tensor, weight: Tensor, bias: Tensor, gelu: bool, split: bool) -> Tensor:
    a = F.gelu(x) if gelu else x
    mixed = F.conv2d(a.permute(0, 3, 1, 2), weight, bias, _ONE, _PAD, _ONE, weight.shape[0])
    out = a + mixed.permute(0, 2, 3, 1)
    return split_phases(out) if split else out.contiguous()


def _plain_backward(
    grad: Tensor, x: Tensor, weight: Tensor, gelu: bool, split: bool
) -> tuple[Tensor, Tensor, Tensor]:
    if split:
        grad = join_phases(grad, x.shape[1], x.shape[2])
    a = F.gelu(x) if gelu else x
    images, channels = a.permute(0, 3, 1, 2), weight.shape[0]
    of_a, of_weight, of_bias = torch.ops.aten.convolution_backward(
        grad.permute(0, 3, 1, 2),
        images,
        weight,
        [channels],
        _ONE,
        _PAD,
        _ONE,
        False,
        [0, 0],
        channels,
        [True, True, True],
    )
    of_x = grad + of_a.permute(0, 2, 3, 1)
    if gelu:
        of_x = torch.ops.aten.gelu_backward(of_x, x)
    return of_x.contiguous(), of_weight.contiguous(), of_bias
