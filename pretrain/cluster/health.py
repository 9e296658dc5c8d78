"""The pre-flight check of a job: is every node fit to train on, before any hour is paid for.

    srun … python -m pretrain train CONFIG --health DIR

Every rank looks at its own node, all hear what all have found, and only then do they talk to each
other with large messages: first the ranks of a node, then neighbouring nodes in pairs, so that a
slow link has a name. Each rank leaves DIR/NODE.rankN, with a line `check TAB why` for all that it
found wrong; `passed` says that training went on. slurm/lib.sh reads them, names the nodes and ends
the job. It runs in the trainer's own processes: a second start of Python would cost as much.

HEALTH_FLOORS="45,12" in the environment sets the least bus bandwidth of an all-reduce, GB/s: inside
a node, and between two.
"""

import os
import platform
import re
import shutil
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from data_pipeline.errors import DataError
from data_pipeline.loader import check
from parallel import launch, links
from parallel.watch import is_consequence
from pretrain import preflight
from pretrain.config import Config, ConfigError
from pretrain.models.build import build
from pretrain.wrong_input import INPUT_ERRORS

T = TypeVar("T")
PASSED = "passed"  # file in DIR
PATIENCE = timedelta(minutes=3)  # for ranks that are slow to start, and for one message
COPIES = 2  # of a checkpoint must fit on the disk beside those that are there
SHARED, SHARED_LEAST = Path("/dev/shm"), 64 << 20  # bytes that NCCL needs
SIDE = 256  # of a product whose sums bf16 holds exactly
_DATA = "data"
# Below which a link counts as broken, without HEALTH_FLOORS: a tenth of NVLink 4, a quarter of one
# 400 Gb/s NIC; on CPUs that bytes arrive at all.
FLOORS = {"cuda": (45.0, 12.0), "cpu": (0.01, 0.01)}
MESSAGE = {"cuda": 256 << 20, "cpu": 1 << 20}  # bytes that are reduced
ROUNDS = 3  # of what is timed
SLOW = 0.7  # of the median matrix product, below which a device counts as sick
DRIVER = Path("/proc/driver/nvidia/gpus")  # what the node has, whatever torch can see


@dataclass(frozen=True)
class Problem:
    check: str
    why: str


def fit(cfg: Config, report: Path) -> bool:
    """Whether all nodes are fit. Every rank calls it; they have met and parted when it returns.

    Data that no node can read, and whatever else preflight finds, is no node's fault: rank 0
    raises it, the others SystemExit(2). Raises ConfigError for a wrong HEALTH_FLOORS.
    """
    floors = _floors()
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
            nodes = [name for name, _ in everyone]
            found += _together(nodes, place.rank, device, floors or FLOORS[device.type])
            _write(own, found)
        all_fit = not any(_gathered(bool(found)))
        launch.leave()
        launch.meet_elsewhere()
    except RuntimeError as error:
        _write(own, [*found, _broken(error)])
        return False
    if place.rank == 0 and all_fit:
        (report / PASSED).touch()
    return all_fit


def _floors() -> tuple[float, float] | None:
    text = os.environ.get("HEALTH_FLOORS")
    if not text:
        return None
    match = re.fullmatch(r"(\d+\.?\d*),(\d+\.?\d*)", text)
    if match is None:
        raise ConfigError(
            f"HEALTH_FLOORS={text!r}: expected two numbers, the least GB/s of an all-reduce inside "
            "a node and between two, such as 45,12"
        )
    return float(match[1]), float(match[2])


def _broken(error: RuntimeError) -> Problem:
    """What an error between ranks says of this node; of `meet` slurm/lib.sh blames nobody."""
    if is_consequence(error):
        return Problem("meet", f"the ranks did not meet: {error}")
    return Problem("devices", str(error))


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
    nodes: list[str], rank: int, device: torch.device, floors: tuple[float, float]
) -> list[Problem]:
    """What only shows between ranks. nodes: the node of each rank; floors: inside, across."""
    found = []
    versions = _gathered(f"torch {torch.__version__}, Python {platform.python_version()}")
    if versions[rank] != versions[0]:
        found.append(Problem("versions", f"{versions[rank]} beside {versions[0]} on {nodes[0]}"))
    if device.type == "cuda":
        found += _product_is_quick(device)
    if any(_gathered(bool(found))):
        return found  # why: with a sick device among them, large messages may never end
    rates = _rates(nodes, nodes[rank], device)
    slow = {met: rate < floors[len(met) - 1] for met, rate in rates.items()}
    if nodes[rank] in at_fault(slow):
        found += [
            Problem(
                "all-reduce",
                f"{' and '.join(met)}: {rate:.3g} GB/s, at least {floors[len(met) - 1]:g} wanted",
            )
            for met, rate in rates.items()
            if slow[met] and nodes[rank] in met
        ]
    return found


def _product_is_quick(device: torch.device) -> list[Problem]:
    """A large product, beside the time that the others need. Every rank calls it."""
    rate, found = 0.0, []
    try:
        rate = links.own_tflops(device, ROUNDS)
    except RuntimeError as error:
        found = [Problem("matrix product", f"{device}: {error}")]
    usual = statistics.median(_gathered(rate))
    if not found and rate < SLOW * usual:
        why = f"{device}: {rate:.0f} TFLOP/s, the others {usual:.0f}"
        found = [Problem("matrix product", why)]
    return found


def _rates(nodes: list[str], mine: str, device: torch.device) -> dict[tuple[str, ...], float]:
    """Bus bandwidth, GB/s, of every meeting of more than one rank; every rank gets all."""
    own = {}
    for met in _meetings(list(dict.fromkeys(nodes))):
        ranks = [rank for rank, name in enumerate(nodes) if name in met]
        group = dist.new_group(ranks, timeout=PATIENCE)  # dist: every rank, also those outside
        if mine in met and len(ranks) > 1:
            assert isinstance(group, dist.ProcessGroup)
            own[met] = links.bus_bandwidth(group, device, MESSAGE[device.type], ROUNDS)
    return {met: rate for each in _gathered(own) for met, rate in each.items()}


def _meetings(names: list[str]) -> list[tuple[str, ...]]:
    """Every node alone, then neighbours in a ring, in rounds in which no node is in two pairs."""
    pairs = list(zip(names, (*names[1:], names[0]), strict=True))[: None if len(names) > 2 else -1]
    even = len(pairs) // 2 * 2
    return [*((name,) for name in names), *pairs[:even:2], *pairs[1:even:2], *pairs[even:]]


def at_fault(slow: Mapping[tuple[str, ...], bool]) -> set[str]:
    """The nodes that slow meetings speak against.

    A node that is slow alone, or in all its pairs with nodes that are not; of a slow pair which
    that leaves open, both. slow: by meeting, of one node or two.
    """
    alone = {met[0] for met, is_slow in slow.items() if is_slow and len(met) == 1}
    pairs = {met: is_slow for met, is_slow in slow.items() if len(met) == 2 and not alone & {*met}}
    names = {name for pair in pairs for name in pair}
    sick = alone | {n for n in names if all(is_slow for p, is_slow in pairs.items() if n in p)}
    unclear = {n for p, is_slow in pairs.items() if is_slow and not sick & {*p} for n in p}
    return sick | unclear
