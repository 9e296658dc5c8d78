"""adaLN in one pass: the residual gate and the modulated norm behind it, forward and backward.

x1 = x + gate·out; h = norm(x1)·(1 + scale) + shift, in float32. Sums over the tokens of an image
do not depend on the other images. In C for float32 on a CPU, in Triton on a
GPU; else plain torch operators.
"""

from typing import Any

import torch
from torch import Tensor

from parallel.kernels import gpu, native
from parallel.kernels.depthwise import join_phases, split_phases
from parallel.kernels.operators import fake, operator

EPS = 1e-6
_WIDEST = 8192  # channels that a program of triton_norm.py holds
_aten = torch.ops.aten


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Layer norm without affine, then shift and scale. x: (B, ..., C); shift, scale:
    (B, 1, ..., C), zero = identity; computed in float32, given back in the dtype of shift.

    Keeps x alone for backward: the normed tokens in float32 would be four times its bytes. Source:
    DiT, section 3.2 (adaLN). Why float32: 1 + scale in bf16 loses scales below 2^-8.
    """
    return _Modulate.apply(x, shift, scale)


def gated(x: Tensor, out: Tensor, gate: Tensor) -> Tensor:
    """x + gate·out. x, out: (B, ..., C); gate: (B, 1, ..., C)."""
    if _fused_by_compiler(x):
        return x + gate * out
    return _Gated.apply(x, out, gate)


def gated_norm(
    x: Tensor, out: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, *, phases: bool = False
) -> tuple[Tensor, Tensor]:
    """x1 = x + gate·out, and modulate(x1, shift, scale).

    x: (B, ..., C); gate, shift, scale: (B, 1, ..., C). out: as x, or with `phases`, for x of
    (B, H, W, C), the phase grids (4B, H/2·W/2, C).
    """
    if _fused_by_compiler(x):
        out = join_phases(out, x.shape[1], x.shape[2]) if phases else out
        x = x + gate * out
        return x, modulate(x, shift, scale)
    return _GatedNorm.apply(x, out, gate, shift, scale, phases)


def _fused_by_compiler(x: Tensor) -> bool:
    """Whether plain operators are given to a compiler that fuses them: all but what C takes."""
    in_c = x.device.type == "cpu" and x.dtype == torch.float32
    return torch.compiler.is_compiling() and not in_c


class _Modulate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        h, mean, rstd = _norm(x, shift, scale)
        ctx.save_for_backward(x, scale, mean, rstd)
        return h

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, scale, mean, rstd = ctx.saved_tensors
        if _fused_by_compiler(x):
            return _plain_norm_backward(grads[0], x, scale, mean, rstd)
        of_x, vectors = torch.ops.dit_pretrain.norm_backward(grads[0], x, _flat(scale), mean, rstd)
        return of_x, _as(scale, vectors[:, 0]), _as(scale, vectors[:, 1])


def _norm(x: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if _fused_by_compiler(x):
        return _plain_norm(x, shift, scale)
    return torch.ops.dit_pretrain.norm(x, _flat(shift), _flat(scale))


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, out: Tensor, gate: Tensor) -> Tensor:
        ctx.save_for_backward(out, gate)
        return torch.ops.dit_pretrain.gated(x, out, _flat(gate))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        out, gate = ctx.saved_tensors
        of_out, of_gate = torch.ops.dit_pretrain.gated_backward(grads[0], out, _flat(gate))
        return grads[0], of_out, _as(gate, of_gate)


class _GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, out: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, phases: bool
    ) -> tuple[Tensor, Tensor]:
        vectors = (_flat(gate), _flat(shift), _flat(scale))
        x1, h, mean, rstd = torch.ops.dit_pretrain.gated_norm(x, out, *vectors, phases)
        ctx.save_for_backward(x1, out, gate, scale, mean, rstd)
        ctx.phases = phases
        return x1, h

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x1, out, gate, scale, mean, rstd = ctx.saved_tensors
        of_x, of_out, vectors = torch.ops.dit_pretrain.gated_norm_backward(
            *grads, x1, out, _flat(gate), _flat(scale), mean, rstd, ctx.phases
        )
        return of_x, of_out, *(_as(gate, vectors[:, i]) for i in (0, 1, 2)), None


def _flat(vector: Tensor) -> Tensor:
    """(B, 1, ..., C) -> (B, C), a view."""
    return vector.flatten(0, -2)


def _as(vector: Tensor, grad: Tensor) -> Tensor:
    return grad.to(vector.dtype).view(vector.shape)


def _wide(vector: Tensor, ndim: int) -> Tensor:
    """(B, C) -> (B, 1, ..., C) float32."""
    return vector.float().view(vector.shape[0], *(1,) * (ndim - 2), vector.shape[-1])


def _sizes(x: Tensor) -> tuple[int, int, int]:
    """Images, tokens of an image, channels."""
    return x.shape[0], x.numel() // (x.shape[0] * x.shape[-1]), x.shape[-1]


def _rows(*vectors: Tensor) -> tuple[Tensor, ...]:
    """Vectors of images whose rows lie equally far apart: chunks of one matrix, or copies."""
    if len({v.stride(0) for v in vectors}) == 1 and all(v.stride(1) == 1 for v in vectors):
        return vectors
    return tuple(v.contiguous() for v in vectors)


def _fits(tokens: tuple[Tensor, ...], vectors: tuple[Tensor, ...]) -> bool:
    return native.fits(*tokens) and native.takes(*vectors)


def _fits_gpu(tokens: tuple[Tensor, ...], vectors: tuple[Tensor, ...]) -> bool:
    return gpu.fits(*tokens) and gpu.takes(*vectors) and tokens[0].shape[-1] <= _WIDEST


@operator("norm")
def norm(x: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x: (B, ..., C); shift, scale: (B, C). Returns h, and mean and rstd (B, ..., 1) float32."""
    x, (shift, scale) = x.contiguous(), _rows(shift, scale)
    if _fits_gpu((x,), (shift, scale)):
        results = _like(x, shift)
        given = (x, None, (None, shift, scale), (None, *results))
        gpu.kernels("norm").forward(*given, 0, EPS)
        return results
    if not _fits((x,), (shift, scale)):
        return _plain_norm(x, _wide(shift, x.ndim).to(shift.dtype), scale=_wide(scale, x.ndim))
    h, mean, rstd = _like(x, shift)
    sizes = (*_sizes(x), shift.stride(0), 0, EPS)
    native.call("gated_norm", x, None, shift, shift, scale, None, h, mean, rstd, *sizes)
    return h, mean, rstd


@operator("norm_backward")
def norm_backward(
    grad: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of x, and of shift and scale as (B, 2, C) float32."""
    grad, x, (scale,) = grad.contiguous(), x.contiguous(), _rows(scale)
    images, tokens, channels = _sizes(x)
    if _fits_gpu((grad, x), (scale,)):
        of_x = torch.empty_like(x)
        given = ((None, grad), x, None, (None, scale), (mean, rstd), (of_x, None))
        return of_x, gpu.kernels("norm").backward(*given, 0)[:, 1:].contiguous()
    if not _fits((grad, x), (scale,)):
        of_x, *rest = _plain_norm_backward(grad, x, _wide(scale, x.ndim), mean, rstd)
        return of_x, torch.stack([v.flatten(1) for v in rest], 1)
    of_x, grads, parts = torch.empty_like(x), *_room(x)
    sizes = (images, tokens, channels, scale.stride(0), 0)
    given = (None, grad, x, None, scale, scale, mean, rstd)
    native.call("gated_norm_backward", *given, of_x, None, grads, parts, *sizes)
    return of_x, grads[:, 1:].contiguous()


@operator("gated")
def _gated_op(x: Tensor, out: Tensor, gate: Tensor) -> Tensor:
    x, out, (gate,) = x.contiguous(), out.contiguous(), _rows(gate)
    if _fits_gpu((x, out), (gate,)):
        x1 = torch.empty_like(x)
        given = (x, out, (gate, None, None), (x1, None, None, None))
        gpu.kernels("norm").forward(*given, 0, EPS)
        return x1
    if not _fits((x, out), (gate,)):
        return x + gate.view(gate.shape[0], *(1,) * (x.ndim - 2), -1) * out
    x1 = torch.empty_like(x)
    native.call("gated", x, out, gate, x1, *_sizes(x), gate.stride(0), 0)
    return x1


@operator("gated_backward")
def _gated_backward(grad: Tensor, out: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of out and of gate, the second (B, C) float32."""
    grad, out, (gate,) = grad.contiguous(), out.contiguous(), _rows(gate)
    if _fits_gpu((grad, out), (gate,)):
        of_out = torch.empty_like(out)
        given = ((grad, None), grad, out, (gate, None), (None, None), (None, of_out))
        return of_out, gpu.kernels("norm").backward(*given, 0)[:, 0].contiguous()
    if not _fits((grad, out), (gate,)):
        wide = gate.view(gate.shape[0], *(1,) * (out.ndim - 2), -1)
        return grad * wide, (grad.float() * out.float()).flatten(1, -2).sum(1)
    of_out, (_, parts) = torch.empty_like(out), _room(out)
    of_gate = torch.empty(gate.shape, dtype=torch.float32)
    sizes = (*_sizes(out), gate.stride(0), 0)
    native.call("gated_backward", grad, out, gate, of_out, of_gate, parts, *sizes)
    return of_out, of_gate


@operator("gated_norm")
def _gated_norm_op(
    x: Tensor, out: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, phases: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, out, vectors = x.contiguous(), out.contiguous(), _rows(gate, shift, scale)
    if _fits_gpu((x, out), vectors):
        results = (torch.empty_like(x), *_like(x, shift))
        given = (x, out, vectors, results)
        gpu.kernels("norm").forward(*given, x.shape[2] if phases else 0, EPS)
        return results
    if not _fits((x, out), vectors):
        out = join_phases(out, x.shape[1], x.shape[2]) if phases else out
        x1 = x + gate.view(gate.shape[0], *(1,) * (x.ndim - 2), -1) * out
        return x1, *norm(x1, shift, scale)
    x1, (h, mean, rstd) = torch.empty_like(x), _like(x, shift)
    sizes = (*_sizes(x), vectors[0].stride(0), x.shape[2] if phases else 0, EPS)
    native.call("gated_norm", x, out, *vectors, x1, h, mean, rstd, *sizes)
    return x1, h, mean, rstd


@operator("gated_norm_backward")
def _gated_norm_backward(
    grad_x1: Tensor,
    grad_h: Tensor,
    x1: Tensor,
    out: Tensor,
    gate: Tensor,
    scale: Tensor,
    mean: Tensor,
    rstd: Tensor,
    phases: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, of out, and of gate, shift and scale as (B, 3, C) float32."""
    grad_x1, grad_h, vectors = grad_x1.contiguous(), grad_h.contiguous(), _rows(gate, scale)
    x1, out = x1.contiguous(), out.contiguous()
    if _fits_gpu((grad_x1, grad_h, x1, out), vectors):
        of_x, of_out = torch.empty_like(x1), torch.empty_like(out)
        given = ((grad_x1, grad_h), x1, out, vectors, (mean, rstd), (of_x, of_out))
        width = x1.shape[2] if phases else 0
        return of_x, of_out, gpu.kernels("norm").backward(*given, width)
    if not _fits((grad_x1, grad_h, x1, out), vectors):
        of_x, of_norm = norm_backward(grad_h, x1, scale, mean, rstd)
        of_x = of_x + grad_x1
        grad = split_phases(of_x) if phases else of_x
        flat = of_x.float() * (join_phases(out, *x1.shape[1:3]) if phases else out).float()
        wide = gate.repeat_interleave(4, 0) if phases else gate
        of_out = grad * wide.view(wide.shape[0], *(1,) * (grad.ndim - 2), -1)
        return of_x, of_out, torch.cat([flat.flatten(1, -2).sum(1, keepdim=True), of_norm], 1)
    of_x, of_out, (grads, parts) = torch.empty_like(x1), torch.empty_like(out), _room(x1)
    sizes = (*_sizes(x1), vectors[0].stride(0), x1.shape[2] if phases else 0)
    given = (grad_x1, grad_h, x1, out, *vectors, mean, rstd)
    native.call("gated_norm_backward", *given, of_x, of_out, grads, parts, *sizes)
    return of_x, of_out, grads


def _like(x: Tensor, shift: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    ones = (*x.shape[:-1], 1)
    mean = torch.empty(ones, dtype=torch.float32, device=x.device)
    return torch.empty_like(x, dtype=shift.dtype), mean, torch.empty_like(mean)


def _room(x: Tensor) -> tuple[Tensor, Tensor]:
    images, tokens, channels = _sizes(x)
    runs = -(-tokens // 64)  # as ROWS in norm.c
    return (
        torch.empty(images, 3, channels, dtype=torch.float32, device=x.device),
        torch.empty(images, runs, 3, channels, dtype=torch.float32, device=x.device),
    )


def _plain_norm(x: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    normed, mean, rstd = torch.native_layer_norm(x.float(), x.shape[-1:], None, None, EPS)
    return (normed * (1 + scale.float()) + shift.float()).to(shift.dtype), mean, rstd


def _plain_norm_backward(
    grad: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Of x, shift, scale, the last two in the dtype of scale."""
    wide, grad = x.float(), grad.float()
    tokens = tuple(range(1, x.ndim - 1))
    to_scale = (grad * ((wide - mean) * rstd)).sum(tokens, keepdim=True)
    to_x = _aten.native_layer_norm_backward(
        grad * (1 + scale.float()),
        wide,
        x.shape[-1:],
        mean,
        rstd,
        None,
        None,
        [True, False, False],
    )[0]
    to_shift = grad.sum(tokens, keepdim=True)
    return to_x.to(x.dtype), to_shift.to(scale.dtype), to_scale.to(scale.dtype)


@fake("norm")
def _(x: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _like(x, shift)


@fake("norm_backward")
def _(grad: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    grads, _ = _room(x)
    return torch.empty_like(x), grads[:, 1:].contiguous()


@fake("gated")
def _(x: Tensor, out: Tensor, gate: Tensor) -> Tensor:
    return torch.empty_like(x)


@fake("gated_backward")
def _(grad: Tensor, out: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(out), torch.empty_like(gate, dtype=torch.float32)


@fake("gated_norm")
def _(
    x: Tensor, out: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, phases: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.empty_like(x), *_like(x, shift)


@fake("gated_norm_backward")
def _(
    grad_x1: Tensor,
    grad_h: Tensor,
    x1: Tensor,
    out: Tensor,
    gate: Tensor,
    scale: Tensor,
    mean: Tensor,
    rstd: Tensor,
    phases: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x1), torch.empty_like(out), _room(x1)[0]
