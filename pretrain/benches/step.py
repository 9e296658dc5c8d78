"""Training steps of any configuration on latents of random numbers: what one rank does, measured.

    pretrain bench step configs/dit_xl2_in256.yaml
    pretrain bench step configs/udit_xl_moe.yaml --as-rank 0 --of 16

With `--as-rank R --of N` one process holds the true shard of rank R of N and computes what that
rank computes; the other ranks are taken to do the same (parallel.echo). Its computing and memory
are measured, what its links would take is modelled, and the result says which is which.
"""

import statistics
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any

import torch

from data_pipeline.batch import Batch
from parallel import chips, clock, echo, launch
from parallel.mesh import Mesh, degrees
from parallel.precision import COMPUTE, make_deterministic
from pretrain import train as page
from pretrain.benches.record import record
from pretrain.config import Config, ConfigError, check_batch
from pretrain.engine import Engine
from pretrain.meter import KINDS
from pretrain.parallelize import parallelize
from pretrain.planning import planned
from pretrain.planning.macs import flops_per_image
from pretrain.preflight import check_axes, check_engine
from pretrain.state import TrainState

WARM = 3  # steps before any is timed


def step(
    cfg: Config, *, rounds: int, steps: int, as_rank: tuple[int, int] | None = None
) -> dict[str, Any]:
    """Medians of `rounds` times `steps` training steps. Every rank calls it.

    as_rank: rank and world of which this process alone takes the place of one.
    Raises ConfigError, LayoutError.
    """
    place = launch.Place.here()
    if as_rank is not None:
        place = _other_place(place, *as_rank)
    sizes = degrees(cfg.mesh, place.world)
    check_batch(cfg, sizes)
    check_engine(cfg, sizes)
    check_axes(cfg, sizes)
    if cfg.deterministic:
        make_deterministic()
    threads = cfg.threads or launch.default_threads(place)
    world: AbstractContextManager[None] = nullcontext()
    if as_rank is None:
        device = launch.join(place, threads=threads, timeout=timedelta(minutes=10))
    else:
        if cfg.engine != "fsdp2":
            raise ConfigError(f"--as-rank with engine={cfg.engine}: only fsdp2 runs alone")
        torch.set_num_threads(threads)
        device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        world = echo.alone_as(place, device)
    with world:
        seconds, parts, peak = _measure(cfg, Mesh(sizes, device.type), device, rounds, steps)
    if as_rank is None:
        launch.leave()
    return (
        record("step", place)
        | _figures(cfg, place.world, device, as_rank is not None, seconds)
        | {
            "spread": max(seconds) / min(seconds),
            "parts": parts,
            "peak_gb": None if peak is None else peak / 1e9,
            "as_rank": None if as_rank is None else list(as_rank),
        }
    )


def _other_place(here: launch.Place, rank: int, world: int) -> launch.Place:
    if here.world > 1 or not 0 <= rank < world:
        raise ConfigError(
            f"--as-rank {rank} --of {world} on {here.world} processes: one process takes the place "
            "of one rank; give a rank from 0 to below --of, and leave --nproc out"
        )
    return launch.Place(rank, world, rank % 8, min(world, 8))


def _measure(
    cfg: Config, mesh: Mesh, device: torch.device, rounds: int, steps: int
) -> tuple[list[float], dict[str, float], int | None]:
    """Seconds a step of each round, seconds a step by kind, and peak bytes of a GPU."""
    backend = parallelize(cfg.model, cfg.mesh, mesh, cfg.compute, seed=cfg.seed, device=device)
    state = TrainState.new(backend, cfg.optim, cfg.ema, cfg.guard, seed=cfg.seed)
    said: list[str] = []
    engine = Engine(state, cfg.objective, cfg.schedule, page.step_config(cfg), mesh, said.append)
    shape = (cfg.model.in_channels, cfg.model.input_size, cfg.model.input_size)
    if cfg.compile:
        engine.warm_up(shape)
    timer, batches = clock.start(device), _batches(cfg, mesh, shape)
    times, loss = [], torch.zeros(())
    for turn in range(1 + rounds):
        count = steps if turn else WARM
        begin = time.perf_counter()
        for _ in range(count):
            loss = engine.step(next(batches)).loss
            state.advance(state.cursor.advance(cfg.data.global_batch))
            engine.settle()
        float(loss)  # sync: the device has done them
        if turn:
            times.append((time.perf_counter() - begin) / count)
        else:
            timer.read()
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
    found = timer.read()
    parts = {kind: found.get(kind, 0.0) / (rounds * steps) for kind in KINDS if kind != "data"}
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    return times, parts, peak


def _batches(cfg: Config, mesh: Mesh, shape: tuple[int, ...]) -> Iterator[Batch]:
    """The same random latents again and again, as a loader would hand them over."""
    size = cfg.data.global_batch // mesh.sizes.data
    draws = torch.Generator().manual_seed(cfg.seed)
    x = torch.randn(size, *shape, generator=draws)
    labels = torch.randint(cfg.model.num_classes, (size,), generator=draws)
    slots = torch.arange(size).numpy() + mesh.data.rank * size
    while True:
        yield Batch(x, labels, slots, slots)


def _figures(
    cfg: Config, world: int, device: torch.device, alone: bool, seconds: list[float]
) -> dict[str, Any]:
    """Measured, and beside it what the plan makes of the same step.

    alone: links were left out of what was measured, so the plan's seconds of links count beside it,
    at once with computing as far as the plan takes them to be.
    """
    median = statistics.median(seconds)
    plan = planned.counted(cfg, world, planned.name_of(device))
    took = planned.hours_of(plan, planned.name_of(device))
    links = took.communication_seconds if alone else None
    whole = max(median, links or 0.0)
    flops = flops_per_image(cfg.model, plan.layout.micro_batch) * cfg.data.global_batch / world
    best, basis = chips.peak(device, COMPUTE[cfg.precision])
    roofline = sum(part.total for part in took.compute) or None
    return {
        "model": cfg.model.family,
        "size": getattr(cfg.model, "size", None),
        "precision": cfg.precision,
        "compile": cfg.compile,
        "engine": cfg.engine,
        "device": device.type,
        "global_batch": cfg.data.global_batch,
        "step_seconds": whole,
        "computing_seconds": median,  # measured
        "links_seconds_modelled": links,  # None: they were measured with the rest
        "images_per_s": cfg.data.global_batch / whole,
        "tflops_per_rank": flops / whole / 1e12,
        "mfu": flops / whole / best,
        "mfu_basis": basis,
        "roofline_seconds": roofline,  # of computing, by the plan
        "of_roofline": roofline / median if roofline else None,
        "planned_gb": plan.plan.per_rank.total / 1e9,
    }
