"""Tensors on disk: `torch.distributed.checkpoint`, each rank its own bytes, and checksums beside.

Knows names, tensors and files; not what they mean. A folder written here is complete only once its
owner has put a manifest into it.
"""

import hashlib
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from parallel.shards import Box, Piece


class _Boxes(torch.Tensor):
    """A piece as DCP wants it: the boxes of the logical tensor that it covers.

    Why a tensor: DCP looks for its three methods on tensors only.
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
        """Of the logical tensor: DCP compares it with what was saved."""
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

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        parts = self._parts.items()
        return [ChunkStorageMetadata(at, torch.Size(box.sizes)) for at, (box, _) in parts]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None
        return self._parts[index.offset][1]


def _for_dcp(tensors: Mapping[str, Tensor | Piece]) -> dict[str, Tensor]:
    return {n: _Boxes(t) if isinstance(t, Piece) else t for n, t in tensors.items()}


def write(tensors: Mapping[str, Tensor | Piece], folder: Path) -> dict[str, dict[str, int | str]]:
    """Writes pieces and whole tensors into `folder`; returns name → {bytes, sha256} of every file.

    Every rank calls it; all get the same answer, once everything is on the disk (fsync).
    """
    dcp.save(_for_dcp(tensors), storage_writer=FileSystemWriter(folder, sync_files=True))
    mine = {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(folder.iterdir())
        if _written_by(path) == dist.get_rank()
    }
    everyone: list[dict[str, dict[str, int | str]]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, mine)  # dist: every rank, once a save
    return {name: entry for part in everyone for name, entry in sorted(part.items())}


def _written_by(path: Path) -> int:
    """DCP names a rank's files `__RANK_n.distcp`; the metadata is rank 0's."""
    return int(path.name.split("_")[2]) if path.suffix == ".distcp" else 0


def read(tensors: Mapping[str, Tensor | Piece], folder: Path) -> None:
    """Fills pieces and tensors in place, each rank reading what it needs, whatever cut wrote it."""
    dcp.load(_for_dcp(tensors), storage_reader=FileSystemReader(folder))


def read_alone(names: list[str], folder: Path) -> dict[str, Tensor]:
    """Full tensors of `folder` by name, on the CPU, without a process group."""
    kinds = contents(folder)
    full = {name: torch.empty(kinds[name][0], dtype=kinds[name][1]) for name in names}
    with warnings.catch_warnings():
        # why: DCP warns that there is no process group, which is what is wanted here.
        warnings.simplefilter("ignore", UserWarning)
        dcp.load(dict(full), storage_reader=FileSystemReader(folder), no_dist=True)
    return full


def contents(folder: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every tensor in `folder`, by name."""
    entries = FileSystemReader(folder).read_metadata().state_dict_metadata
    return {
        name: (tuple(entry.size), entry.properties.dtype)
        for name, entry in sorted(entries.items())
        if isinstance(entry, TensorStorageMetadata)
    }


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush(path: Path) -> None:
    """fsync of a file or of a directory's entries."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
