"""What a rank really holds at its peak: a few training steps under torch's memory profiler."""

import json
from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_pipeline.batch import Batch
from parallel import launch
from parallel.mesh import Mesh, degrees
from pretrain import config
from pretrain.config import Config
from pretrain.engine import Engine
from pretrain.parallelize import parallelize
from pretrain.state import TrainState
from pretrain.train import step_config

STEPS = 3
_SIGN = 104_729  # bytes that nothing but the mark of a step has


@dataclass(frozen=True)
class Peak:
    """Bytes of tensors of one rank."""

    standing: int  # after a step: weights, moments, averages
    steps: int  # the most at any time of a step


def assembled(cfg: Config) -> tuple[TrainState, Engine, Mesh]:
    """A run as the page assembles it, in ranks that have joined."""
    place = launch.Place.here()
    mesh = Mesh(degrees(cfg.mesh, place.world), "cpu", ordered=cfg.deterministic)
    device = torch.device("cpu")
    backend = parallelize(cfg.model, cfg.mesh, mesh, cfg.compute, seed=0, device=device)
    state = TrainState.new(backend, cfg.optim, cfg.ema, cfg.guard, seed=0)
    engine = Engine(state, cfg.objective, cfg.schedule, step_config(cfg), mesh, print)
    return state, engine, mesh


def batch_of(cfg: Config, mesh: Mesh) -> Batch:
    """Noise in the place of latents."""
    size, share = cfg.model.input_size, cfg.data.global_batch // mesh.data.size
    slots = np.arange(share) + mesh.data.rank * share
    x = torch.randn(share, cfg.model.in_channels, size, size)
    return Batch(x, torch.arange(share) % cfg.model.num_classes, slots, slots)


def peak(tree: Mapping[str, Any], out: Path) -> None:
    """Trains as one rank of several; writes its Peak to OUT/RANK.json."""
    from torch.profiler import ProfilerActivity, profile

    cfg = config.validate(dict(tree))
    place = launch.Place.here()
    launch.join(place, threads=1, timeout=timedelta(seconds=100))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        state, engine, mesh = assembled(cfg)
        batch = batch_of(cfg, mesh)
        for _ in range(STEPS):
            torch.empty(_SIGN, dtype=torch.int8)
            engine.step(batch)
            engine.settle(everything=True)
            state.step += 1
    moves = _moves(seen.profiler.kineto_results.experimental_event_tree())
    begun = [time for time, _, size in moves if size == _SIGN]
    # why the least: a tensor that is given back unseen stays until its place is taken.
    most = [0] * len(begun)
    last = 0
    for (time, _, _), held in zip(moves, _held(moves), strict=True):
        step = bisect_right(begun, time) - 1
        if step >= 0:
            most[step] = max(most[step], held)
        last = held
    found = {"standing": last, "steps": min(most[1:])}
    (out / f"{place.rank}.json").write_text(json.dumps(found))
    launch.leave()


def _moves(events: Any) -> list[tuple[int, int, int]]:
    """Time, address and bytes of every allocation, negative of one that was given back."""
    found, left = [], list(events)
    while left:
        event = left.pop()
        if str(event.tag).endswith("Allocation"):
            fields = event.extra_fields
            found.append((event.start_time_ns, fields.ptr, fields.alloc_size))
        left += event.children
    return sorted(found)


def _held(moves: Iterable[tuple[int, int, int]]) -> Iterator[int]:
    """Bytes held after each move.

    Why by address: a tensor whose last user is a thread of gloo is given back unseen. Whatever a
    new one lies on was.
    """
    starts: list[int] = []
    sizes: dict[int, int] = {}
    total = 0
    for _, address, size in moves:
        low = bisect_left(starts, address)
        if size < 0:
            gone = range(low, low + (address in sizes))
        else:
            low -= low > 0 and starts[low - 1] + sizes[starts[low - 1]] > address
            gone = range(low, bisect_left(starts, address + size))
        for start in starts[gone.start : gone.stop]:
            total -= sizes.pop(start)
        del starts[gone.start : gone.stop]
        if size > 0:
            insort(starts, address)
            sizes[address] = size
            total += size
        yield total
