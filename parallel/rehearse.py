"""A world in one process: process groups of any size that talk to nobody.

Meshes and sharding are built in it exactly as in the real world of that size, on meta, so that a
plan can be held against what would stand on a rank. No collective in it means anything.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist


@contextmanager
def rehearsed(rank: int, world: int) -> Iterator[None]:
    """Inside, this process is `rank` of `world`; not for a process that has joined.

    Cut a model for one rank a process only: torch remembers placements of an equal mesh.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()
