"""The pre-flight check of a job: is every node fit to train on, before any hour is paid for.

    srun … python -m pretrain train CONFIG --health DIR

Every rank looks at its own node, all hear what all have found, and only then do they talk to each
other with large messages: first the ranks of a node, then neighbouring nodes in pairs, so that a
slow link has a name. Each rank leaves DIR/NODE.rankN, with a line `check TAB why` for all that it
found wrong; `passed` says that training went on. slurm/lib.sh reads them, names the nodes and ends
the job. It runs in the trainer's own processes: a second start of Python would cost as much.
"""

import os
import platform
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from data_pipeline.errors import DataError
from data_pipeline.loader import check
from parallel import launch
from pretrain import preflight
from pretrain.config import Config
from pretrain.models.build import build
from pretrain.wrong_input import INPUT_ERRORS

T = TypeVar("T")
PASSED = "passed"  # file in DIR
PATIENCE = timedelta(minutes=3)  # for ranks that are slow to start, and for one message
COPIES = 2  # of a checkpoint must fit on the disk beside those that are there
SHARED, SHARED_LEAST = Path("/dev/shm"), 64 << 20  # bytes that NCCL needs
SIDE = 256  # of a product whose sums bf16 holds exactly
_DATA = "data"
# Bus bandwidth of an all-reduce inside a node and between two, GB/s, below which a link counts as
# broken: a tenth of NVLink 4, a quarter of one 400 Gb/s NIC; on CPUs that bytes arrive at all.
FLOORS = {"cuda": (45.0, 12.0), "cpu": (0.01, 0.01)}
SLOW = 0.7  # of the median matrix product, below which a device counts as sick
DRIVER = Path("/proc/driver/nvidia/gpus")  # what the node has, whatever torch can see


@dataclass(frozen=True)
class Problem:
    check: str
    why: str


def fit(
    cfg: Config, report: Path, *, inside: float | None = None, across: float | None = None
) -> bool:
    """Whether all nodes are fit. Every rank calls it; they have met and parted when it returns.

    Data that no node can read, and whatever else preflight finds, is no node's fault: rank 0
    raises it, the others SystemExit(2). inside, across: floors of the bus bandwidth of an
    all-reduce inside a node and between two, GB/s; None: those of the kind of device.
    """
    place = launch.Place.here()
    node = os.environ.get("SLURMD_NODENAME", platform.node())
    report.mkdir(parents=True, exist_ok=True)
    own = report / f"{node}.rank{place.rank}"
    found = own_node(cfg, place)
    _write(own, found)  # why: before the ranks meet; a rank that cannot start leaves no file
    wrong = _wrong_input(cfg, place)
    try:
        device = launch.join(place, threads=1, timeout=PATIENCE)
        everyone = _gathered((node, found))
        nowhere = all(_DATA in {p.check for p in problems} for _, problems in everyone)
        refused = wrong is not None and (nowhere or not isinstance(wrong, DataError))
        if any(_gathered(refused)):
            launch.leave()
            raise wrong or SystemExit(2)
        if not any(problems for _, problems in everyone):
            usual = FLOORS[device.type]
            floors = (inside or usual[0], across or usual[1])
            found += _together(place, [name for name, _ in everyone], device, floors)
            _write(own, found)
        all_fit = not any(_gathered(bool(found)))
        launch.leave()
        launch.meet_elsewhere()
    except RuntimeError as error:
        _write(own, [*found, Problem("meet", f"the ranks did not meet: {error}")])
        return False
    if place.rank == 0 and all_fit:
        (report / PASSED).touch()
    return all_fit


def _write(path: Path, found: list[Problem]) -> None:
    path.write_text("".join(f"{p.check}\t{' '.join(p.why.split())}\n" for p in found))


def _wrong_input(cfg: Config, place: launch.Place) -> Exception | None:
    if place.rank == 0:
        try:
            preflight.preflight(cfg, place.world)
        except INPUT_ERRORS as error:
            return error
    return None


def own_node(cfg: Config, place: launch.Place) -> list[Problem]:
    """What can be seen without the others."""
    found = [*_devices(place), *_product_is_right(place)]
    try:
        check(
            cfg.data,
            num_classes=cfg.model.num_classes,
            channels=cfg.model.in_channels,
            input_size=cfg.model.input_size,
        )
    except (DataError, OSError) as error:
        found.append(Problem(_DATA, f"data.path={cfg.data.path}: {error}"))
    shared = shutil.disk_usage(SHARED).free if SHARED.is_dir() else 0
    if shared < SHARED_LEAST:
        found.append(
            Problem("shared memory", f"{SHARED} has {shared:,} bytes free, NCCL needs 64 MiB")
        )
    return found + _disk(cfg)


def _devices(place: launch.Place) -> list[Problem]:
    seen, present = torch.cuda.device_count(), len(list(DRIVER.iterdir())) if DRIVER.is_dir() else 0
    if torch.version.cuda is None and present:
        return [
            Problem(
                "devices",
                f"the node has {present} GPUs, but torch {torch.__version__} is a CPU build; "
                "run make setup DEVICE_BUILD=gpu",
            )
        ]
    if torch.version.cuda is not None and seen < place.local_world:
        return [
            Problem("devices", f"torch sees {seen} GPUs, {place.local_world} ranks need one each")
        ]
    return []


def _product_is_right(place: launch.Place) -> list[Problem]:
    """A product whose values are known: ones times ones, each sum exact in bf16."""
    if torch.version.cuda is not None and torch.cuda.device_count() <= place.local_rank:
        return []
    device = f"cuda:{place.local_rank}" if torch.cuda.is_available() else "cpu"
    try:
        ones = torch.ones(SIDE, SIDE, dtype=torch.bfloat16, device=device)
        wrong = int((ones @ ones != SIDE).sum())
    except RuntimeError as error:
        return [Problem("matrix product", f"{device}: {error}")]
    return (
        [Problem("matrix product", f"{device}: {wrong} of {SIDE}² values wrong")] if wrong else []
    )


def _disk(cfg: Config) -> list[Problem]:
    """Room for the next checkpoints where this node sees the run directory."""
    with torch.device("meta"):
        weights = sum(p.numel() for p in build(cfg.model).parameters())
    needed = COPIES * weights * 4 * (3 + len(cfg.ema.names))
    folder = Path(cfg.run_dir)
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        why = f"{there} has {free / 1e9:.3g} GB free, {COPIES} checkpoints are {needed / 1e9:.3g}"
        return [Problem("disk space", why)]
    probe = there / f".health-{platform.node()}-{os.getpid()}"
    try:
        probe.write_bytes(b"x" * 4096)
        probe.unlink()
    except OSError as error:
        return [Problem("disk space", f"{there} cannot be written to: {error}")]
    return []


def _gathered(value: T) -> list[T]:
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)  # dist: every rank
    return values


def _together(
    place: launch.Place, nodes: list[str], device: torch.device, floors: tuple[float, float]
) -> list[Problem]:
    """What only shows between ranks. nodes: the node of each rank; floors: inside, across."""
    names, mine = list(dict.fromkeys(nodes)), nodes[place.rank]
    found = []
    versions = _gathered(f"torch {torch.__version__}, Python {platform.python_version()}")
    if versions[place.rank] != versions[0]:
        found.append(
            Problem("versions", f"{versions[place.rank]} beside {versions[0]} on {names[0]}")
        )
    if device.type == "cuda":
        rates = _gathered(_product_rate(device))
        rate, usual = rates[place.rank], statistics.median(rates)
        if rate < SLOW * usual:
            found.append(
                Problem("matrix product", f"{device}: {rate:.0f} TFLOP/s, the others {usual:.0f}")
            )
    for pair, members in _meetings(names):
        ranks = [rank for rank, name in enumerate(nodes) if name in members]
        group = dist.new_group(ranks, timeout=PATIENCE)  # dist: every rank, also those outside
        if mine not in members or len(ranks) == 1:
            continue
        assert isinstance(group, dist.ProcessGroup)
        reached = _bus_bandwidth(group, device)
        least = floors[pair]
        if reached < least:
            why = f"{' and '.join(members)}: {reached:.3g} GB/s, at least {least:g} wanted"
            found.append(Problem("all-reduce", why))
    return found


def _meetings(names: list[str]) -> Iterator[tuple[bool, tuple[str, ...]]]:
    """Every node alone, then neighbours in a ring; those side by side do not share a node.

    Yields whether it is a pair, and its nodes.
    """
    yield from ((False, (name,)) for name in names)
    pairs = list(zip(names, (*names[1:], names[0]), strict=True)) if len(names) > 2 else []
    if len(names) == 2:
        pairs = [(names[0], names[1])]
    for first in (0, 1):
        yield from ((True, pair) for pair in pairs[first::2])


def _product_rate(device: torch.device) -> float:
    """TFLOP/s of a bf16 product of 8192², median of five."""
    side = 8192
    a = torch.randn(side, side, dtype=torch.bfloat16, device=device)
    times = [_seconds(lambda: a @ a, device) for _ in range(7)][2:]
    return 2 * side**3 / statistics.median(times) / 1e12


def _bus_bandwidth(group: dist.ProcessGroup, device: torch.device) -> float:
    """GB/s of an all-reduce, slowest rank, median of five: bytes × 2 (n - 1) / n ÷ seconds.

    Source: NCCL tests, PERFORMANCE.md, "Bus bandwidth".
    """
    size, count = (256 << 20 if device.type == "cuda" else 1 << 20), group.size()
    values = torch.zeros(size, dtype=torch.uint8, device=device)
    times = [_seconds(lambda: dist.all_reduce(values, group=group), device) for _ in range(7)][2:]
    slowest = torch.tensor(statistics.median(times), dtype=torch.float64, device=device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX, group=group)  # dist: the group
    return size * 2 * (count - 1) / count / float(slowest) / 1e9


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # sync: what is timed begins here
    begin = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # sync: and ends here
    return time.perf_counter() - begin
