"""Tensors on disk: written at one cut, read at any other, each byte once, nothing unpickled."""

import json
import pickle
import resource
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

from parallel import index, launch, saving, storage
from parallel.errors import DamagedError
from parallel.index import Index
from parallel.shards import Box, Extent, Piece
from tests import ranks

SHAPES = {"wide": (6, 10), "odd": (7, 3, 5), "long": (37,), "few": (2,)}
Cut = Callable[[tuple[int, ...], int, int], Extent]


def full(name: str) -> Tensor:
    shape = SHAPES[name]
    return torch.arange(1.0, 1 + torch.Size(shape).numel()).view(shape) * (1 + len(name))


def flat(shape: tuple[int, ...], rank: int, world: int) -> Extent:
    """Even runs of the flattened tensor, as ZeRO cuts."""
    size = torch.Size(shape).numel()
    whole = Box(shape, (0,) * len(shape), shape)
    return Extent(whole, size * rank // world, size * (rank + 1) // world)


def last_dim(shape: tuple[int, ...], rank: int, world: int) -> Extent:
    """Stretches of the last dim, as a row-cut linear over a tensor axis."""
    start, stop = (shape[-1] * r // world for r in (rank, rank + 1))
    sizes = (*shape[:-1], stop - start)
    return Extent(
        Box(shape, (*(0,) * (len(shape) - 1), start), sizes), 0, torch.Size(sizes).numel()
    )


def replicated(shape: tuple[int, ...], _rank: int, _world: int) -> Extent:
    return flat(shape, 0, 1)


CUTS: dict[str, Cut] = {"flat": flat, "last dim": last_dim, "replicated": replicated}


def piece(name: str, cut: Cut, *, filled: bool) -> Piece:
    extent = cut(SHAPES[name], dist.get_rank(), dist.get_world_size())
    box = extent.box
    inside = tuple(slice(o, o + n) for o, n in zip(box.offset, box.sizes, strict=True))
    values = full(name)[inside].reshape(-1)[extent.start : extent.stop].clone()
    return Piece(values if filled else torch.zeros_like(values), extent)


def joined() -> None:
    launch.join(launch.Place.here(), threads=1, timeout=timedelta(seconds=60))


def save(cut: str, folder: Path) -> None:
    joined()
    tensors: dict[str, Tensor | Piece] = {n: piece(n, CUTS[cut], filled=True) for n in SHAPES}
    tensors["count"] = torch.tensor(5.0)
    group = dist.new_group(backend="gloo")
    assert isinstance(group, dist.ProcessGroup)
    writer = saving.Writer(tensors, group)
    writer.stage(tensors)
    for tensor in tensors.values():  # what training does while the file is written
        (tensor.values if isinstance(tensor, Piece) else tensor).zero_()
    found = writer.write(folder)
    if found is not None:
        (folder / index.INDEX).write_text(json.dumps(index.sealed(found.to_json())))
    launch.leave()


def load(cut: str, folder: Path) -> None:
    joined()
    tensors: dict[str, Tensor | Piece] = {n: piece(n, CUTS[cut], filled=False) for n in SHAPES}
    tensors["count"] = torch.zeros(())
    where = Index.of(folder)
    read = torch.tensor(storage.read(tensors, folder, where))
    for name in SHAPES:
        held = tensors[name]
        assert isinstance(held, Piece)
        assert torch.equal(held.values, piece(name, CUTS[cut], filled=True).values), name
    assert float(tensors["count"]) == 5.0  # type: ignore[arg-type]
    dist.all_reduce(read)
    assert int(read) == sum(file.bytes for file in where.files.values())
    launch.leave()


@pytest.mark.parametrize(
    ("written", "writers", "wanted", "readers"),
    [
        ("flat", 3, "last dim", 2),
        ("last dim", 4, "flat", 1),
        ("replicated", 4, "flat", 3),
        ("flat", 1, "replicated", 4),
    ],
)
def test_any_cut_is_read_at_any_other_and_every_byte_once(
    written: str, writers: int, wanted: str, readers: int, tmp_path: Path
) -> None:
    ranks.run(save, writers, written, tmp_path, log=tmp_path / "save.log")
    ranks.run(load, readers, wanted, tmp_path, log=tmp_path / "load.log")
    alone = storage.read_alone(list(SHAPES), tmp_path)
    assert all(torch.equal(alone[name], full(name)) for name in SHAPES)
    held = Index.of(tmp_path).tensors
    assert all(
        sum(chunk.box.numel for chunk in held[name].chunks) == full(name).numel() for name in SHAPES
    )
    stock = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    dcp.load(dict(stock), storage_reader=dcp.FileSystemReader(tmp_path), no_dist=True)
    assert all(torch.equal(stock[name], full(name)) for name in SHAPES)


def test_replicated_values_are_shared_out_among_the_writers(tmp_path: Path) -> None:
    ranks.run(save, 4, "replicated", tmp_path)
    held = [stored.chunks[0].file for stored in Index.of(tmp_path).tensors.values()]
    assert len(set(held)) == 4


def small(folder: Path) -> Path:
    found = saving.write_alone([("a", torch.randn(50, 7)), ("b", torch.arange(9))], folder)
    (folder / index.INDEX).write_text(json.dumps(index.sealed(found.to_json())))
    return folder


def refused(folder: Path) -> None:
    joined()
    tensors = {"a": torch.zeros(50, 7), "b": torch.zeros(9, dtype=torch.int64)}
    with pytest.raises(DamagedError, match=r"__0_0\.distcp|\.metadata"):
        storage.read(tensors, folder, Index.of(folder))
    launch.leave()


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata"])
def test_one_flipped_bit_is_seen_by_all_ranks(name: str, tmp_path: Path) -> None:
    path = small(tmp_path) / name
    for place in (0, path.stat().st_size // 2, path.stat().st_size - 1):
        whole = bytearray(path.read_bytes())
        whole[place] ^= 4
        path.write_bytes(whole)
        ranks.run(refused, 2, tmp_path)
        whole[place] ^= 4
        path.write_bytes(whole)


class Bomb:
    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.witness,)


def test_hostile_pickles_are_never_opened(tmp_path: Path) -> None:
    """With sums that fit: whoever writes the files writes the index too."""
    witness = tmp_path / "ran"
    bomb = pickle.dumps(Bomb(witness))
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    tree = json.loads((small(folder) / index.INDEX).read_text())
    for name in (".metadata", "__0_0.distcp"):
        old = (folder / name).read_bytes()
        written = saving.write_file(folder / name, memoryview(bomb + old[len(bomb) :]))
        tree["files"][name] = {"bytes": written.bytes, "crc32": written.crc32}
    (folder / index.INDEX).write_text(json.dumps(index.sealed(tree)))
    storage.read_alone(["a", "b"], folder)
    assert not witness.exists()
    pickle.loads(bomb)
    assert witness.exists(), "the bomb is no bomb"


@pytest.mark.parametrize(
    "spoil",
    [
        lambda tree: tree["files"].update({"../secret": tree["files"].pop("__0_0.distcp")}),
        lambda tree: tree["files"]["__0_0.distcp"].update(bytes=-1),
        lambda tree: tree["tensors"]["a"].update(dtype="object"),
        lambda tree: tree["tensors"]["a"]["chunks"][0].__setitem__(1, 1 << 40),
        lambda tree: tree["tensors"]["a"]["chunks"][0].__setitem__(2, [-1, 0]),
        lambda tree: tree["tensors"]["a"]["chunks"][0].__setitem__(0, "x"),
        lambda tree: tree["tensors"]["a"]["chunks"][0].__setitem__(0, -1),
        lambda tree: tree["tensors"]["a"]["chunks"][0].__setitem__(1, "704"),
        lambda tree: tree["tensors"]["a"]["chunks"][0].__setitem__(3, [50.0, 7.0]),
        lambda tree: tree["tensors"]["a"]["chunks"][0].__setitem__(3, [50]),
        lambda tree: tree["tensors"]["a"]["chunks"][0].__setitem__(3, [49, 7]),
        lambda tree: tree["tensors"]["a"].update(shape=[10**15, 7]),
        lambda tree: tree["tensors"]["a"].update(shape=[float("inf")], chunks=[]),
        lambda tree: tree["tensors"]["a"]["chunks"].append(tree["tensors"]["a"]["chunks"][0]),
        lambda tree: tree["tensors"]["a"].update(
            chunks=[[0, 768, [0, 0], [30, 7]], [0, 768 + 840, [10, 0], [20, 7]]]
        ),
        lambda tree: tree["tensors"]["b"].update(chunks=tree["tensors"]["a"]["chunks"]),
        lambda tree: tree["files"].update({"x" * 300: tree["files"].pop("__0_0.distcp")}),
        lambda tree: tree.update(tensors=[]),
    ],
)
def test_an_index_that_nobody_can_have_written_is_refused(
    spoil: Callable[[dict[str, dict]], object],  # type: ignore[type-arg]
    tmp_path: Path,
) -> None:
    tree = json.loads((small(tmp_path) / index.INDEX).read_text())
    Index.from_json(tree)
    spoil(tree)
    with pytest.raises(DamagedError):
        Index.from_json(tree)


def test_what_cannot_be_read_is_not_taken_as_damaged(tmp_path: Path) -> None:
    folder = small(tmp_path)
    (folder / "__0_0.distcp").unlink()
    with pytest.raises(OSError, match="cannot be read"):
        storage.read_alone(["a"], folder)


MANY = 48 << 20  # values of the large tensor: 192 MiB


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def modest(folder: Path) -> None:
    """Saves and loads a large tensor of which this rank owns a fourth."""
    joined()
    own = torch.ones(MANY // 4)
    extent = flat((MANY,), dist.get_rank(), 4)
    tensors = {"large": Piece(own, extent)}
    group = dist.new_group(backend="gloo")
    assert isinstance(group, dist.ProcessGroup)
    before = peak()
    writer = saving.Writer(tensors, group)
    writer.stage(tensors)
    found = writer.write(folder)
    copied = peak() - before
    del writer
    if found is not None:
        (folder / index.INDEX).write_text(json.dumps(index.sealed(found.to_json())))
    dist.barrier()
    storage.read(tensors, folder, Index.of(folder))
    share, blocks = own.numel() * 4, storage.AT_ONCE * index.BLOCK
    assert copied < 1.3 * share, f"{copied / share:.2f} of the rank's share"
    assert peak() - before < 1.3 * share + 3 * blocks
    launch.leave()


def test_no_rank_holds_what_it_does_not_own(tmp_path: Path) -> None:
    ranks.run(modest, 4, tmp_path, log=tmp_path / "log")
