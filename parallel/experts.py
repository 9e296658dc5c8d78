"""Experts without a loop: one grouped matrix product over all of a layer's experts, and the token
order it needs.

`grouped_mm` is our own operator around `F.grouped_mm`: fp32 and bf16 on any device, a fake kernel,
both gradients, FLOP formulas. `order_by_expert`, `spread` and `combine` bring tokens into the order
of their experts and back by gathers and segment sums only, forward and backward, so the sums are
the same in every run. Nothing here waits for the device or talks to another rank.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

_ALIGN = 16  # bytes; the grouped kernels refuse other strides


class Picks(NamedTuple):
    """Which experts read which tokens: P picks of T tokens, in order of token.

    A pick of expert E (one past the last) is nobody's. Such picks stand at the end, and `lengths`
    does not count them.
    """

    experts: Tensor  # (P,) int64
    weights: Tensor  # (P,) float32: what the expert's output is multiplied with
    tokens: Tensor  # (P,) int64
    lengths: Tensor | int  # picks of each token: (T,) int64, or one number for all


class Order(NamedTuple):
    """P picks laid out in R rows, in order of expert."""

    forth: Tensor  # (R,) int64: which pick stands at this row
    back: Tensor  # (P,) int64: at which row this pick stands
    counts: Tensor  # (E,) int64: rows of each expert
    real: Tensor | None = None  # (R,) bool: rows that hold a pick; None: all do
    kept: Tensor | None = None  # (P,) bool: picks that have a row; None: all have


def order_by_expert(experts: Tensor, num_experts: int) -> Order:
    """Sort token picks by expert, equal experts staying in token order. experts: any shape."""
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


def spread(x: Tensor, picks: Picks, order: Order) -> Tensor:
    """Copy each token to the rows of its picks: (T, D) -> (R, D). Rows not real hold any token."""
    return _Spread.apply(x, picks.tokens[order.forth], order.back, order.kept, picks.lengths)


def combine(rows: Tensor, picks: Picks, order: Order) -> Tensor:
    """Weighted sum of the rows of each token: (R, D) -> (T, D). A pick without a row adds zero."""
    weights = picks.weights
    if order.kept is not None:
        weights = torch.where(order.kept, weights, 0.0)
    weights = weights.unsqueeze(-1).to(rows.dtype)
    picked = take(rows, order.back, order.forth, order.real)  # (P, D)
    if isinstance(picks.lengths, int):
        # perf: cut by token before the product; after it the gradient would be copied to P rows.
        by_token = (-1, picks.lengths)
        return (picked.unflatten(0, by_token) * weights.unflatten(0, by_token)).sum(1)
    return _Sum.apply(picked * weights, picks.tokens, picks.lengths)


def take(rows: Tensor, index: Tensor, inverse: Tensor, taken: Tensor | None = None) -> Tensor:
    """rows[index], whose gradient is a gather too: grad[inverse], zero where not `taken`.

    rows: (R, ...); index: (Q,); inverse: (R,), where each row went; taken: (R,) bool, None for all.
    """
    return _Take.apply(rows, index, inverse, taken)


def _sum(picked: Tensor, lengths: Tensor | int) -> Tensor:
    """Sum over the picks of each token, in their order: (P, D) -> (T, D)."""
    if isinstance(lengths, int):
        return picked.view(-1, lengths, picked.shape[-1]).sum(1)
    # why: unsafe only skips a check that would wait for the device.
    return torch.segment_reduce(picked, "sum", lengths=lengths, axis=0, initial=0, unsafe=True)


def _masked(rows: Tensor, real: Tensor | None) -> Tensor:
    """rows, (R, ...), set to zero in place where they are not real."""
    return rows if real is None else rows.masked_fill_(~real.view(-1, *[1] * (rows.ndim - 1)), 0)


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        source: Tensor,
        back: Tensor,
        kept: Tensor | None,
        lengths: Tensor | int,
    ) -> Tensor:
        ctx.fixed = lengths if isinstance(lengths, int) else None
        ctx.save_for_backward(back, kept, None if isinstance(lengths, int) else lengths)
        # perf: index_select copies whole rows; x[source] took a fifth of the layer on a CPU.
        return x.index_select(0, source)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        back, kept, lengths = ctx.saved_tensors
        # why: gather the rows and sum; index_add would add in any order on a GPU.
        rows = _masked(grads[0].index_select(0, back), kept)
        return _sum(rows, ctx.fixed or lengths), None, None, None, None


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, index: Tensor, inverse: Tensor, taken: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(inverse, taken)
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        inverse, taken = ctx.saved_tensors
        return _masked(grads[0].index_select(0, inverse), taken), None, None, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, picked: Tensor, tokens: Tensor, lengths: Tensor) -> Tensor:
        ctx.save_for_backward(tokens)
        return _sum(picked, lengths)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (tokens,) = ctx.saved_tensors
        return grads[0].index_select(0, tokens), None, None


def grouped_mm(x: Tensor, w: Tensor, counts: Tensor) -> Tensor:
    """Multiply each run of rows with its own expert's matrix: y[rows of e] = x[rows of e] @ w[e].T.

    x: (T, K), rows in order of expert; w: (E, N, K), the layout of `nn.Linear`; counts: (E,) rows
    of each expert, zero allowed, summing to T. Or (E + 1,): the last rows are nobody's; they are
    not read and give zeros. Returns (T, N).
    """
    return torch.ops.dit_pretrain.grouped_mm(x, w, counts)


@torch.library.custom_op("dit_pretrain::grouped_mm", mutates_args=())
def _grouped_mm(x: Tensor, w: Tensor, counts: Tensor) -> Tensor:
    n = w.shape[1]
    if x.shape[0] == 0:
        return x.new_zeros(0, n)
    num_experts, rows = w.shape[0], x.shape[0]
    x, w = _pad(x, 1), _pad(_pad(w, 2), 1)
    out = F.grouped_mm(x, w.transpose(1, 2), offs=_ends(counts, num_experts))
    if counts.shape[0] > num_experts:
        # why: the kernel leaves rows past the last end as the memory was, perhaps not finite.
        real = torch.arange(rows, device=x.device) < rows - counts[num_experts]
        out = _masked(out, real)
    return _unpad(out, n)


@torch.library.custom_op("dit_pretrain::grouped_mm_weight_grad", mutates_args=())
def _grouped_mm_weight_grad(grad: Tensor, x: Tensor, counts: Tensor, num_experts: int) -> Tensor:
    """grad: (T, N), x: (T, K) -> (E, N, K), zero for an expert without rows."""
    n, k = grad.shape[1], x.shape[1]
    if x.shape[0] == 0:
        return x.new_zeros(num_experts, n, k)
    grad, x = _pad(grad, 1), _pad(x, 1)
    out = F.grouped_mm(grad.t(), x, offs=_ends(counts, num_experts))
    return out[:, :n, :k].contiguous()


@_grouped_mm.register_fake
def _(x: Tensor, w: Tensor, counts: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], w.shape[1])


@_grouped_mm_weight_grad.register_fake
def _(grad: Tensor, x: Tensor, counts: Tensor, num_experts: int) -> Tensor:
    return x.new_empty(num_experts, grad.shape[1], x.shape[1])


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x, w, counts = ctx.saved_tensors
    grad = grad.contiguous()
    grad_x = grad_w = None
    if ctx.needs_input_grad[0]:
        grad_x = torch.ops.dit_pretrain.grouped_mm(grad, w.transpose(1, 2), counts)
    if ctx.needs_input_grad[1]:
        grad_w = torch.ops.dit_pretrain.grouped_mm_weight_grad(grad, x, counts, w.shape[0])
    return grad_x, grad_w, None


_grouped_mm.register_autograd(_backward, setup_context=_keep)


@register_flop_formula(torch.ops.dit_pretrain.grouped_mm)
def _flops(x: torch.Size, w: torch.Size, *args: Any, **kwargs: Any) -> int:
    return 2 * x[0] * w[1] * w[2]


@register_flop_formula(torch.ops.dit_pretrain.grouped_mm_weight_grad)
def _weight_grad_flops(grad: torch.Size, x: torch.Size, *args: Any, **kwargs: Any) -> int:
    return 2 * grad[0] * grad[1] * x[1]


def _ends(counts: Tensor, num_experts: int) -> Tensor:
    ends = counts.cumsum(0).to(torch.int32)
    return ends if ends.shape[0] == num_experts else ends[:num_experts]


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
