"""Experts without a loop: one grouped matrix product over all of a layer's experts, and the token
order it needs.

`grouped_mm` is our own operator around `F.grouped_mm`: fp32 and bf16 on any device, a fake kernel,
both gradients, FLOP formulas. `order_by_expert`, `dispatch` and `combine` bring tokens into the
order of their experts and back by gathers only, forward and backward, so the sums are the same in
every run. Nothing here waits for the device or talks to another rank.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

_ALIGN = 16  # bytes; the grouped kernels refuse other strides


class Order(NamedTuple):
    """The order of all token picks by expert. T tokens, k picks each."""

    forth: Tensor  # (T*k,) int64: which pick stands at this row
    back: Tensor  # (T*k,) int64: at which row this pick stands
    counts: Tensor  # (E,) int64: rows of each expert


def order_by_expert(experts: Tensor, num_experts: int) -> Order:
    """Sort token picks by expert, equal experts staying in token order. experts: (T, k) int64."""
    picks = experts.reshape(-1)
    forth = torch.argsort(picks, stable=True)
    rows = torch.arange(picks.numel(), device=picks.device)
    # why: forth is a permutation, so each place is written once and the result has one value.
    back = torch.empty_like(forth).scatter_(0, forth, rows)
    return Order(forth, back, count_picks(picks, num_experts))


def count_picks(picks: Tensor, num_experts: int) -> Tensor:
    """How often each expert stands in the last dim of picks: (..., P) int64 -> (..., E) int64.

    Why: bincount has no meta kernel and counts with atomics.
    """
    names = torch.arange(num_experts, device=picks.device)
    return (picks.unsqueeze(-1) == names).sum(-2)


def dispatch(x: Tensor, order: Order, k: int) -> Tensor:
    """Copy each token to the rows of its k picks: (T, D) -> (T*k, D), rows in order of expert."""
    return _Dispatch.apply(x, order.forth, order.back, k)


def combine(rows: Tensor, weights: Tensor, order: Order) -> Tensor:
    """Weighted sum of each token's k rows. rows: (T*k, D) in order of expert; weights: (T, k) ->
    (T, D).
    """
    picked = _Reorder.apply(rows, order.back, order.forth)
    picked = picked.view(*weights.shape, rows.shape[-1])  # (T, k, D)
    return (picked * weights.unsqueeze(-1).to(rows.dtype)).sum(1)


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, forth: Tensor, back: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(back)
        ctx.k = k
        return x[forth // k]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (grad,), (back,) = grads, ctx.saved_tensors
        # why: gather k rows and sum; index_add would add in any order on a GPU.
        return grad[back].view(-1, ctx.k, grad.shape[-1]).sum(1), None, None, None


class _Reorder(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return rows[index]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad,), (inverse,) = grads, ctx.saved_tensors
        return grad[inverse], None, None


def grouped_mm(x: Tensor, w: Tensor, counts: Tensor) -> Tensor:
    """Multiply each run of rows with its own expert's matrix: y[rows of e] = x[rows of e] @ w[e].T.

    x: (T, K), rows in order of expert; w: (E, N, K), the layout of `nn.Linear`; counts: (E,) rows
    of each expert, zero allowed, summing to T. Returns (T, N).
    """
    return torch.ops.dit_pretrain.grouped_mm(x, w, counts)


@torch.library.custom_op("dit_pretrain::grouped_mm", mutates_args=())
def _grouped_mm(x: Tensor, w: Tensor, counts: Tensor) -> Tensor:
    n = w.shape[1]
    if x.shape[0] == 0:
        return x.new_zeros(0, n)
    x, w = _pad(x, 1), _pad(_pad(w, 2), 1)
    return _unpad(F.grouped_mm(x, w.transpose(1, 2), offs=_ends(counts)), n)


@torch.library.custom_op("dit_pretrain::grouped_mm_weight_grad", mutates_args=())
def _grouped_mm_weight_grad(grad: Tensor, x: Tensor, counts: Tensor) -> Tensor:
    """grad: (T, N), x: (T, K) -> (E, N, K), zero for an expert without rows."""
    n, k = grad.shape[1], x.shape[1]
    if x.shape[0] == 0:
        return x.new_zeros(counts.shape[0], n, k)
    grad, x = _pad(grad, 1), _pad(x, 1)
    out = F.grouped_mm(grad.t(), x, offs=_ends(counts))
    return out[:, :n, :k].contiguous()


@_grouped_mm.register_fake
def _(x: Tensor, w: Tensor, counts: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], w.shape[1])


@_grouped_mm_weight_grad.register_fake
def _(grad: Tensor, x: Tensor, counts: Tensor) -> Tensor:
    return x.new_empty(counts.shape[0], grad.shape[1], x.shape[1])


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x, w, counts = ctx.saved_tensors
    grad = grad.contiguous()
    grad_x = grad_w = None
    if ctx.needs_input_grad[0]:
        grad_x = torch.ops.dit_pretrain.grouped_mm(grad, w.transpose(1, 2), counts)
    if ctx.needs_input_grad[1]:
        grad_w = torch.ops.dit_pretrain.grouped_mm_weight_grad(grad, x, counts)
    return grad_x, grad_w, None


_grouped_mm.register_autograd(_backward, setup_context=_keep)


@register_flop_formula(torch.ops.dit_pretrain.grouped_mm)
def _flops(x: torch.Size, w: torch.Size, *args: Any, **kwargs: Any) -> int:
    return 2 * x[0] * w[1] * w[2]


@register_flop_formula(torch.ops.dit_pretrain.grouped_mm_weight_grad)
def _weight_grad_flops(grad: torch.Size, x: torch.Size, *args: Any, **kwargs: Any) -> int:
    return 2 * grad[0] * grad[1] * x[1]


def _ends(counts: Tensor) -> Tensor:
    return counts.cumsum(0).to(torch.int32)


def _pad(x: Tensor, dim: int) -> Tensor:
    """dim padded with zeros to a multiple of 16 bytes, and one of the last two dims of stride 1."""
    missing = -x.shape[dim] % (_ALIGN // x.element_size())
    if missing:
        return F.pad(x, (0, 0) * (x.ndim - 1 - dim) + (0, missing))
    # why: the weight comes in transposed in backward, and the kernels take it as it is,
    # without a copy.
    return x if x.ndim == 3 and x.transpose(1, 2).is_contiguous() else x.contiguous()


def _unpad(x: Tensor, size: int) -> Tensor:
    return x if x.shape[1] == size else x[:, :size].contiguous()
