"""One rank of a large world on one device: every other rank is taken to do just what this one does.

Collectives give what they would give if all ranks had this rank's tensors, by copies in local
memory: shapes, memory and computing are a true rank's, values stay finite, and the time of links is
left out. So one shard of a run can be measured without the others; their links are to be added by
arithmetic. Losses mean nothing.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

from parallel.launch import Place

_NAME = "echo"
_SUMS = (dist.ReduceOp.SUM,)


@contextmanager
def alone_as(place: Place, device: torch.device) -> Iterator[None]:
    """Inside, this process is the rank `place` of a world; not for a process that has joined."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if _NAME not in dist.Backend.backend_list:
        dist.Backend.register_backend(_NAME, _create, devices=["cpu", "cuda"])
    # why: DeepSpeed and torch ask the environment who they are.
    names = {"RANK": place.rank, "WORLD_SIZE": place.world, "LOCAL_RANK": device.index or 0}
    before = {name: os.environ.get(name) for name in names}
    os.environ.update({name: str(value) for name, value in names.items()})
    dist.init_process_group(_NAME, store=FakeStore(), rank=place.rank, world_size=place.world)
    try:
        yield
    finally:
        dist.destroy_process_group()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value


def _create(_store: Any, rank: int, world: int, _timeout: timedelta) -> dist.ProcessGroup:
    return _Echo(rank, world)


def _done(result: Any) -> Any:
    future: Future[Any] = Future()
    future.set_result(result)
    c10d: Any = torch._C._distributed_c10d
    return c10d._create_work_from_future(future)


# why untyped: methods are found by name, and torch has renamed some of them since 2.11.
_Group: Any = dist.ProcessGroup


class _Echo(_Group):
    """A group whose other ranks hold what this one holds. Names are torch's, new and old."""

    def __init__(self, rank: int, world: int) -> None:
        super().__init__(rank, world)
        self._rank, self._world = rank, world

    def getBackendName(self) -> str:  # noqa: N802  (torch's name)
        return _NAME

    @property
    def pg_name(self) -> str:
        return dist.distributed_c10d._world.pg_names[self]

    @property
    def group_name(self) -> str:
        return self.pg_name

    @torch.no_grad()
    def allreduce(self, tensors: Sequence[Tensor], opts: Any = None) -> Any:
        op = opts.reduceOp if opts is not None else dist.ReduceOp.SUM
        if op in _SUMS:
            for tensor in tensors:
                tensor.mul_(self._world)
        return _done(tensors)

    allreduce_coalesced = allreduce

    def barrier(self, opts: Any = None) -> Any:
        return _done([])

    def broadcast(self, tensors: Sequence[Tensor], opts: Any = None) -> Any:
        return _done(tensors)

    @torch.no_grad()
    def allgather(
        self, outputs: Sequence[Sequence[Tensor]], inputs: Sequence[Tensor], opts: Any = None
    ) -> Any:
        for parts, mine in zip(outputs, inputs, strict=True):
            for part in parts:
                part.copy_(mine)
        return _done(outputs)

    @torch.no_grad()
    def all_gather_single(self, output: Tensor, mine: Tensor, opts: Any = None) -> Any:
        output.view(self._world, -1).copy_(mine.reshape(1, -1).expand(self._world, -1))
        return _done(output)

    _allgather_base = all_gather_single

    def all_gather_single_coalesced(
        self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], opts: Any = None
    ) -> Any:
        for output, mine in zip(outputs, inputs, strict=True):
            self.all_gather_single(output, mine)
        return _done(outputs)

    allgather_into_tensor_coalesced = all_gather_single_coalesced

    @torch.no_grad()
    def reduce_scatter(
        self, outputs: Sequence[Tensor], inputs: Sequence[Sequence[Tensor]], opts: Any = None
    ) -> Any:
        for output, parts in zip(outputs, inputs, strict=True):
            torch.mul(parts[self._rank], self._world, out=output)
        return _done(outputs)

    @torch.no_grad()
    def reduce_scatter_single(self, output: Tensor, mine: Tensor, opts: Any = None) -> Any:
        part = mine.view(self._world, -1)[self._rank]
        torch.mul(part, self._world, out=output.view(-1))
        return _done(output)

    _reduce_scatter_base = reduce_scatter_single

    def reduce_scatter_single_coalesced(
        self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], opts: Any = None
    ) -> Any:
        for output, mine in zip(outputs, inputs, strict=True):
            self.reduce_scatter_single(output, mine)
        return _done(outputs)

    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced

    @torch.no_grad()
    def all_to_all_single(
        self,
        output: Tensor,
        mine: Tensor,
        output_sizes: Sequence[int] | None,
        input_sizes: Sequence[int] | None,
        opts: Any = None,
    ) -> Any:
        """What every other rank sends to this one is what this one sends to itself.

        On the way back of an uneven exchange that is more or fewer rows than are awaited: then the
        same rows again, or some of them.
        """
        sizes = list(input_sizes or []) or [len(mine) // self._world] * self._world
        wanted = list(output_sizes or []) or [len(output) // self._world] * self._world
        own = mine.split(sizes)[self._rank]
        for part in output.split(wanted):
            if len(part) == len(own):
                part.copy_(own)
            elif len(own):
                rows = torch.arange(len(part), device=own.device) % len(own)
                part.copy_(own[rows])
            else:
                part.zero_()
        return _done(output)

    alltoall_base = all_to_all_single
