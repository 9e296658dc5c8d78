"""Sums over ranks in a fixed order, so that they do not depend on topology."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.shards import local


def ordered_sum(values: Tensor) -> Tensor:
    """Sum over all ranks, added in rank order. values: (n,), any float dtype.

    Why: an all-reduce adds in the order of its ring, which changes with the nodes a job gets.
    """
    world = dist.get_world_size()
    parts = values.new_empty(world * len(values))
    dist.all_gather(list(parts.view(world, -1)), values.contiguous())  # dist: every rank
    return parts.view(world, -1).sum(dim=0)


def sum_of_squares(tensors: Iterable[Tensor], device: torch.device) -> Tensor:
    """Sum of squares of this rank's shards, (), float64; an element counts on one rank only."""
    parts = [part for part in map(local, tensors) if part.numel()]
    norms = torch._foreach_norm(parts, 2) if parts else []
    if not norms:
        return torch.zeros((), dtype=torch.float64, device=device)
    return torch.stack(norms).double().square().sum()


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on any rank; all get the same answer."""
    found = torch.tensor(int(flag))
    dist.all_reduce(found, dist.ReduceOp.MAX)  # dist: every rank
    return bool(found)
