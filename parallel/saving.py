"""Writing tensors: planned once by `torch.distributed.checkpoint`, copied, written by a thread.

A rank's file is laid out once, with all that `torch.load` wants around the values, in memory that
stays. A save then copies values into it, which is all that training waits for, and a thread writes
it out as it lies. Replicated values are shared out among the ranks that hold them.
"""

import io
import os
import pickle
import weakref
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.serialization import get_crc32_options, set_crc32_options

from parallel.index import BLOCK, DTYPES, Chunk, File, Index, Stored
from parallel.shards import Box, Piece, box_of

ALIGNED = 64  # bytes to which torch aligns values inside a saved tensor
GROUP = 1 << 28  # bytes of tensors that one process holds while it writes all of them
METADATA = ".metadata"  # for DCP's own reader; ours does not look at it


class _Boxes(torch.Tensor):
    """A piece as DCP wants it: the boxes of the logical tensor that it covers.

    Why a tensor: DCP looks for its methods on tensors only.
    """

    def __new__(cls, piece: Piece) -> "_Boxes":
        return torch.Tensor._make_subclass(cls, piece.values)

    def __init__(self, piece: Piece) -> None:
        self._shape = piece.extent.box.shape
        self._parts: dict[torch.Size, tuple[Box, Tensor]] = {}
        for box, place in piece.extent.boxes():
            view = piece.values[place : place + box.numel].view(box.sizes)
            self._parts[torch.Size(box.offset)] = (box, view)

    def size(self, dim: int | None = None) -> Any:
        shape = torch.Size(self._shape)
        return shape if dim is None else shape[dim]

    def __create_write_items__(self, name: str, _whole: Any) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(name, offset),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=ChunkStorageMetadata(offset, torch.Size(box.sizes)),
                    properties=TensorProperties.create_from_tensor(view),
                    size=torch.Size(box.shape),
                ),
            )
            for offset, (box, view) in self._parts.items()
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None
        return self._parts[index.offset][1]


@dataclass(frozen=True)
class _Item:
    """One part of one tensor in a file."""

    name: str
    box: Box
    dtype: torch.dtype
    start: int  # byte of what torch.load reads
    values: int  # byte of the first value
    stop: int


class _Image:
    """A file as it will lie on the disk, in memory that is used again for every save."""

    def __init__(self, name: str, parts: Iterable[tuple[str, Box, torch.dtype]]) -> None:
        self.name = name
        self.items: list[_Item] = []
        around: list[tuple[int, bytes]] = []
        place = 0
        for tensor, box, dtype in parts:
            assert dtype in DTYPES.values(), f"{tensor} is {dtype}, which no index knows"
            before, after = _container(dtype, box.sizes)
            values = place + len(before)
            end = values + box.numel * dtype.itemsize
            around += [(place, before), (end, after)]
            self.items.append(_Item(tensor, box, dtype, place, values, end + len(after)))
            place = -(-(end + len(after)) // ALIGNED) * ALIGNED
        self.bytes = torch.zeros(place, dtype=torch.uint8)
        if torch.cuda.is_available() and place:
            self._lock()
        whole = self.bytes.numpy().data
        for start, text in around:
            whole[start : start + len(text)] = text
        self.targets = [
            self.bytes[i.values : i.values + i.box.numel * i.dtype.itemsize]
            .view(i.dtype)
            .view(i.box.sizes)
            for i in self.items
        ]

    def _lock(self) -> None:
        """Locks the memory, so that a device copies straight into it.

        Why not pin_memory: torch rounds what it pins up to the next power of two.
        """
        cudart: Any = torch.cuda.cudart()
        place = self.bytes.data_ptr()
        torch.cuda.check_error(int(cudart.cudaHostRegister(place, self.bytes.numel(), 0)))
        weakref.finalize(self, cudart.cudaHostUnregister, place)

    def write(self, folder: Path) -> File:
        """Writes and syncs the file."""
        return write_file(folder / self.name, self.bytes.numpy().data)


def write_file(path: Path, whole: memoryview) -> File:
    """Writes and syncs bytes; each block is summed beside the writing of it."""
    with ThreadPoolExecutor(1) as pool, path.open("wb", buffering=0) as file:
        sums = []
        for start in range(0, len(whole), BLOCK):
            block = whole[start : start + BLOCK]
            sums.append(pool.submit(zlib.crc32, block))
            done = 0
            while done < len(block):
                done += file.write(block[done:])
        os.fsync(file.fileno())
        return File(len(whole), tuple(s.result() for s in sums))


@cache
def _container(dtype: torch.dtype, sizes: tuple[int, ...]) -> tuple[bytes, bytes]:
    """What torch.save writes before and after the values of such a tensor."""
    tensor = torch.empty(sizes, dtype=dtype)
    sink = _Around(tensor)
    before = get_crc32_options()
    # why: the sum of values that are not known yet; torch.load does not look at it.
    set_crc32_options(False)
    try:
        torch.save(tensor, cast(IO[bytes], sink))
    finally:
        set_crc32_options(before)
    assert sink.seen == bool(tensor.numel())
    return sink.before.getvalue(), sink.after.getvalue()


class _Around:
    """A file that keeps all but the values of one tensor."""

    def __init__(self, tensor: Tensor) -> None:
        self._place = tensor.data_ptr()
        self.seen = False
        self._after = not tensor.numel()  # why: nothing is written of no values
        self.before, self.after = io.BytesIO(), io.BytesIO()

    def write(self, data: bytes | memoryview) -> int:
        if isinstance(data, memoryview) and _address(data) == self._place and not self._after:
            self.seen = self._after = True
            return len(data)
        return (self.after if self._after else self.before).write(data)

    def flush(self) -> None:
        pass


def _address(data: memoryview) -> int:
    return np.frombuffer(data, np.uint8).ctypes.data if len(data) else 0


class Writer:
    """Saves the same tensors again and again. Every rank calls every method, in the same order."""

    def __init__(self, tensors: Mapping[str, Tensor | Piece], group: dist.ProcessGroup) -> None:
        """Plans, lays out this rank's file, and tells rank 0 what will lie where.

        group: on CPUs, of all ranks, used by nobody else; `write` may run in a thread.
        """
        self._group = group
        rank, ranks = dist.get_rank(), dist.get_world_size()
        planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        planner.set_up_planner(_for_dcp(tensors), is_coordinator=rank == 0)
        plans = [SavePlan([])] * ranks if rank == 0 else None
        # dist: every rank, once a run
        dist.gather_object(planner.create_local_plan(), plans, dst=0, group=group)
        if plans is not None:
            plans, _ = planner.create_global_plan(plans)
        own: list[Any] = [None]
        dist.scatter_object_list(own, plans, src=0, group=group)  # dist: every rank, once a run
        plan: SavePlan = own[0]
        self._image = _Image(_file_of(rank), map(_part, plan.items))
        self._sources = [planner.resolve_data(item) for item in plan.items]
        self._held = {n: t.values for n, t in tensors.items() if isinstance(t, Piece)}
        items: list[Any] | None = [None] * ranks if rank == 0 else None
        dist.gather_object(self._image.items, items, dst=0, group=group)  # dist: once a run
        if items is not None:
            placed = {_file_of(r): of_rank for r, of_rank in enumerate(items)}
            self._tensors, self._metadata = _described(placed), _metadata(placed)

    @property
    def bytes(self) -> int:
        """Of this rank's file."""
        return self._image.bytes.numel()

    @torch.no_grad()
    def stage(self, tensors: Mapping[str, Tensor | Piece]) -> None:
        """Copies the values of now, which is all that the caller waits for."""
        for name, values in self._held.items():
            piece = tensors[name]
            assert isinstance(piece, Piece)
            assert piece.values.data_ptr() == values.data_ptr(), f"{name} has moved"
        copies = zip(self._image.items, self._image.targets, self._sources, strict=True)
        for item, target, source in copies:
            live = source if item.name in self._held else tensors[item.name]
            assert isinstance(live, Tensor)
            target.copy_(live, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # sync: the copies have left the device

    def write(self, folder: Path) -> Index | None:
        """Writes what was staged; the index at rank 0, once every rank's file is on the disk.

        Raises OSError on all ranks if one cannot, for whatever reason; nothing is cleaned up.
        """
        files: dict[str, File] = {}
        problem: str | None = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            files[self._image.name] = self._image.write(folder)
            if dist.get_rank() == 0:
                files[METADATA] = write_file(folder / METADATA, memoryview(self._metadata))
        except Exception as error:  # why: the others must hear of it, or they would wait
            problem = f"rank {dist.get_rank()} cannot write to {folder}: {error}"
        everyone: list[tuple[dict[str, File], str | None]] = [({}, None)] * dist.get_world_size()
        # dist: every rank, once a save
        dist.all_gather_object(everyone, (files, problem), group=self._group)
        for _, found in everyone:
            if found is not None:
                raise OSError(found)
        if dist.get_rank() > 0:
            return None
        return Index({n: f for part, _ in everyone for n, f in part.items()}, self._tensors)


def write_alone(tensors: Iterable[tuple[str, Tensor]], folder: Path) -> Index:
    """Writes full tensors from one process, about `GROUP` bytes of them in memory at a time.

    folder must exist. Raises OSError.
    """
    files: dict[str, File] = {}
    placed: dict[str, list[_Item]] = {}
    for number, group in enumerate(_groups(tensors)):
        image = _Image(_file_of(0, number), ((n, box_of(t), t.dtype) for n, t in group.items()))
        for item, target in zip(image.items, image.targets, strict=True):
            target.copy_(group[item.name])
        files[image.name] = image.write(folder)
        placed[image.name] = image.items
        del image, group  # why: else they live on while the next ones are made
    files[METADATA] = write_file(folder / METADATA, memoryview(_metadata(placed)))
    return Index(files, _described(placed))


def _groups(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    group: dict[str, Tensor] = {}
    held = 0
    for name, tensor in tensors:
        group[name] = tensor
        held += tensor.numel() * tensor.dtype.itemsize
        if held >= GROUP:
            yield group
            group, held = {}, 0
    if group:
        yield group


def _file_of(rank: int, number: int = 0) -> str:
    return f"__{rank}_{number}.distcp"  # as DCP names them


def _for_dcp(tensors: Mapping[str, Tensor | Piece]) -> dict[str, Tensor]:
    return {n: _Boxes(t) if isinstance(t, Piece) else t for n, t in tensors.items()}


def _part(item: WriteItem) -> tuple[str, Box, torch.dtype]:
    data = item.tensor_data
    assert data is not None, f"{item.index.fqn} is no tensor"
    box = Box(tuple(data.size), tuple(data.chunk.offsets), tuple(data.chunk.sizes))
    return item.index.fqn, box, data.properties.dtype


def _described(placed: Mapping[str, Sequence[_Item]]) -> dict[str, Stored]:
    """What the index says of each tensor. placed: what each file holds."""
    chunks: dict[str, list[Chunk]] = {}
    dtypes: dict[str, torch.dtype] = {}
    for file, items in placed.items():
        for item in items:
            chunks.setdefault(item.name, []).append(Chunk(file, item.values, item.box))
            dtypes[item.name] = item.dtype
    return {n: Stored(dtypes[n], held[0].box.shape, tuple(held)) for n, held in chunks.items()}


def _metadata(placed: Mapping[str, Sequence[_Item]]) -> bytes:
    """The same for DCP's own reader."""
    tensors: dict[str, TensorStorageMetadata] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    for file, items in placed.items():
        for item in items:
            offset, box = torch.Size(item.box.offset), item.box
            properties = TensorProperties(dtype=item.dtype)
            fresh = TensorStorageMetadata(properties, torch.Size(box.shape), [])
            whole = tensors.setdefault(item.name, fresh)
            whole.chunks.append(ChunkStorageMetadata(offset, torch.Size(box.sizes)))
            place = _StorageInfo(file, item.start, item.stop - item.start)
            places[MetadataIndex(item.name, offset)] = place
    return pickle.dumps(Metadata(dict(tensors), storage_data=places))
