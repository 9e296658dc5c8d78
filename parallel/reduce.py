"""Sums over ranks, where it matters in a fixed order, so that they do not depend on topology."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.clock import spending
from parallel.mesh import Axis
from parallel.shards import Piece


def ordered_sum(values: Tensor, axis: Axis | None = None) -> Tensor:
    """Sum over an axis (None: over all ranks), added in rank order. values: (n,), any float dtype.

    Why: an all-reduce adds in the order of its ring, which changes with the nodes a job gets.
    """
    group = None if axis is None else axis.group
    size = dist.get_world_size() if axis is None else axis.size
    if size == 1:
        return values.clone()
    parts = values.new_empty(size, values.numel())
    with spending("communication"):
        dist.all_gather(list(parts), values.contiguous(), group=group)  # dist: the axis, or all
    return parts.sum(dim=0)


def ordered_sum_and_max(values: Tensor, maxima: Tensor) -> tuple[Tensor, Tensor]:
    """The same over all ranks, and beside it maxima of others, (m,), of the same dtype."""
    size = dist.get_world_size()
    if size == 1:
        return values.clone(), maxima.clone()
    both = torch.cat([values, maxima])
    parts = both.new_empty(size, both.numel())
    dist.all_gather(list(parts), both)  # dist: every rank
    return parts[:, : len(values)].sum(0), parts[:, len(values) :].amax(0)


def sum_over(x: Tensor, axis: Axis) -> Tensor:
    """Sum over an axis, any shape, a new tensor, equal bit for bit on its ranks."""
    if axis.ordered:
        return ordered_sum(x.flatten(), axis).view_as(x)
    out = x.clone(memory_format=torch.contiguous_format)
    with spending("communication"):
        dist.all_reduce(out, group=axis.group)  # dist: the axis
    return out


def sum_of_squares(gradients: Iterable[tuple[Piece, Tensor]], device: torch.device) -> Tensor:
    """Sum of squares of this rank's gradients, (), float64; an element counts on one rank only."""
    parts = [gradient for piece, gradient in gradients if piece.counted and gradient.numel()]
    norms = torch._foreach_norm(parts, 2) if parts else []
    if not norms:
        return torch.zeros((), dtype=torch.float64, device=device)
    return torch.stack(norms).double().square().sum().to(device)


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on any rank; all get the same answer."""
    found = torch.tensor(int(flag))
    dist.all_reduce(found, dist.ReduceOp.MAX)  # dist: every rank
    return bool(found)
