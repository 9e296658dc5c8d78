"""Saving and loading beside what the disk and memory give, interleaved, medians of rounds.

    pretrain bench checkpoint --params 2e8 --nproc 2 --dir runs

Trains nothing. Every rank calls every function.
"""

import shutil
import statistics
import subprocess
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from parallel import launch, storage
from parallel.index import Index
from parallel.links import slowest
from parallel.shards import Box, Extent, Piece
from pretrain.benches.record import record
from pretrain.checkpoint import Checkpoint
from pretrain.manifest import CheckpointConfig, root
from pretrain.state import TrainState

ROW = 1 << 10  # values of a row of the tensors that stand for a model
LARGEST = 1 << 12  # rows of one of them
COPIES = ("model", "ema", "optim.exp_avg", "optim.exp_avg_sq")


@dataclass
class _Held:
    """What stands for a TrainState: as many bytes, no model."""

    pieces: dict[str, Piece]
    step: int = 0
    facts: dict[str, Any] = field(default_factory=dict)

    def tensors(self) -> dict[str, Piece]:
        return self.pieces

    def scalars(self) -> dict[str, int]:
        return {"step": self.step}


def checkpoint(params: int, where: Path, rounds: int) -> dict[str, Any]:
    """Times of saving and loading weights, average and moments of a model of `params` parameters.

    Seconds are those of the slowest rank. `blocked_over_copy`: what training waits for, beside a
    plain copy of the same bytes into warm memory. `written_over_dd`: bytes a second beside one
    `dd conv=fsync` a rank, together of the same bytes. The first save, which plans, is apart.
    """
    place = launch.Place.here()
    device = launch.join(place, threads=1, timeout=timedelta(minutes=10))
    folder = where / f"bench-{params}"
    held = _Held(_pieces(params, place, device))
    cfg = CheckpointConfig(keep=rounds + 2)
    facts = dict.fromkeys(("model", "objective", "data", "latents", "config"), {})
    saver = Checkpoint(cfg, folder, facts, lambda _: None)
    sources = [piece.values for piece in held.pieces.values()]
    copies = [torch.zeros_like(source, device="cpu") for source in sources]
    own = sum(source.numel() * 4 for source in sources)

    def save() -> None:
        held.step += 1
        saver.save(cast(TrainState, held))

    def load() -> None:
        newest = root(folder) / f"step_{held.step:08d}"
        storage.read(held.pieces, newest, Index.of(newest))

    times: dict[str, list[float]] = {"copy": [], "blocked": [], "written": [], "dd": [], "read": []}
    first = slowest(save)
    saver.wait()
    try:
        for _ in range(rounds):
            _clear(folder)
            times["copy"].append(slowest(lambda: _copy(sources, copies)))
            times["blocked"].append(slowest(save))
            times["written"].append(slowest(saver.wait))
            times["read"].append(slowest(load))
            times["dd"].append(slowest(lambda: _dd(folder / f"dd{place.rank}", own)))
    finally:
        dist.barrier()
        if place.rank == 0:
            shutil.rmtree(folder)
    launch.leave()
    median = {name: statistics.median(values) for name, values in times.items()}
    total = own * place.world
    return record("checkpoint", place) | {
        "bytes": total,
        "rounds": rounds,
        "first_save_s": first,
        **{f"{name}_s": value for name, value in median.items()},
        "blocked_over_copy": median["blocked"] / median["copy"],
        "written_over_dd": median["dd"] / median["written"],
        "written_gb_per_s": total / median["written"] / 1e9,
        "read_gb_per_s": total / median["read"] / 1e9,
    }


def _pieces(params: int, place: launch.Place, device: torch.device) -> dict[str, Piece]:
    pieces: dict[str, Piece] = {}
    rows = -(-params // ROW)
    for number, start in enumerate(range(0, rows, LARGEST)):
        shape = (min(LARGEST, rows - start), ROW)
        size = shape[0] * ROW
        begin, end = (size * r // place.world for r in (place.rank, place.rank + 1))
        extent = Extent(Box(shape, (0, 0), shape), begin, end)
        for copy in COPIES:
            values = torch.full((end - begin,), float(number), device=device)
            pieces[f"{copy}.{number}"] = Piece(values, extent)
    return pieces


def _copy(sources: list[Tensor], copies: list[Tensor]) -> None:
    for copy, source in zip(copies, sources, strict=True):
        copy.copy_(source)


def _dd(path: Path, size: int) -> None:
    block = 16 << 20
    words = ["dd", "if=/dev/zero", f"of={path}", f"bs={block}", f"count={-(-size // block)}"]
    subprocess.run([*words, "conv=fsync"], check=True, capture_output=True)


def _clear(folder: Path) -> None:
    """Why: room on the disk, and removing is no part of writing."""
    dist.barrier()
    if dist.get_rank() == 0:
        for old in (*root(folder).glob("step_*"), *folder.glob("dd*")):
            shutil.rmtree(old) if old.is_dir() else old.unlink()
    dist.barrier()
