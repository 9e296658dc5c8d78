"""What collectives reach between ranks, and what one rank computes and copies.

Three spans: `inside`, the ranks of one node; `across`, one rank of each node with the same local
rank, all these groups at once, as training uses them; `world`, where it is none of the two. A span
of one rank is left out. Every rank calls every function that does not say otherwise.

Bandwidth is bus bandwidth, what the slowest link of a rank carries: bytes ÷ seconds × `bus_factor`.
Source: NCCL-tests, doc/PERFORMANCE.md. Their sizes too: the buffer of an all-reduce, what a rank
sends in an all-to-all, the whole that is gathered or scattered.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from parallel.errors import LayoutError
from parallel.launch import Place

Collective = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all"]
COLLECTIVES: tuple[Collective, ...] = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
SIZES = {"cuda": (1.0, 16.0, 256.0), "cpu": (0.0625, 1.0, 8.0)}  # MiB, by type of device
_SIDE = {"cuda": 8192, "cpu": 512}  # of the square matrices that are multiplied
_COPIED = {"cuda": 1 << 30, "cpu": 1 << 26}  # bytes
_WARM = 2  # calls before any is timed: connections are made, clocks rise
_CALLS = 5  # in one timed round
# why: torch 2.13 warns of the older names, torch 2.11 knows no others.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(frozen=True)
class Link:
    """One collective at one size over one span."""

    span: str
    collective: Collective
    ranks: int  # of one group
    bytes: int
    seconds: float  # a call, of the slowest rank; median of rounds
    gb_per_s: float  # bus bandwidth, 10⁹ bytes


@dataclass(frozen=True)
class Rank:
    """What one rank reaches while all do the same; the slowest."""

    matmul_tflops: float  # a large square product in bfloat16
    copy_gb_per_s: float  # in its own memory; bytes read plus bytes written


def bus_factor(collective: str, ranks: int) -> float:
    """Bytes that pass a rank's link ÷ bytes of the collective. Source: NCCL-tests."""
    return (2 if collective == "all_reduce" else 1) * (ranks - 1) / ranks


def nodes_of(place: Place) -> int:
    """Raises LayoutError if the nodes do not have the same number of ranks."""
    if place.world % place.local_world:
        raise LayoutError(
            f"{place.world} ranks, {place.local_world} of them on this node: start the same number "
            "of ranks on every node"
        )
    return place.world // place.local_world


def slowest(
    work: Callable[[], object],
    device: torch.device | None = None,
    group: dist.ProcessGroup | None = None,
) -> float:
    """Seconds until the slowest rank has done it, and its device too if one is given.

    group: the ranks that do it; None: all.
    """
    _settle(device)
    dist.barrier(group)  # dist: the group
    took = torch.tensor(_own(work, device), dtype=torch.float64)
    dist.all_reduce(took, dist.ReduceOp.MAX, group)  # dist: the group
    return float(took)


def _own(work: Callable[[], object], device: torch.device | None) -> float:
    """Seconds until this rank has done it."""
    _settle(device)
    begin = time.perf_counter()
    work()
    _settle(device)
    return time.perf_counter() - begin


def _settle(device: torch.device | None) -> None:
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize()  # sync: what is timed begins and ends here


def measure(
    place: Place, device: torch.device, sizes: Sequence[int], rounds: int
) -> tuple[Link, ...]:
    """Every collective at every size (bytes) over every span of more than one rank."""
    groups = _spans(place, device)
    most = max(sizes) // 4 + place.world
    source, target = (torch.zeros(most, device=device) for _ in range(2))
    cases = [
        (span, collective, size // 4 // group.size() * group.size() or group.size())
        for span, group in groups.items()
        for collective in COLLECTIVES
        for size in sizes
    ]
    works = [_call(name, groups[span], source[:n], target[:n]) for span, name, n in cases]
    for work in works:
        for _ in range(_WARM):
            work()
    times: list[list[float]] = [[] for _ in cases]
    for _ in range(rounds):
        for taken, work in zip(times, works, strict=True):
            taken.append(slowest(_repeated(work), device) / _CALLS)
    return tuple(
        _link(*case, groups[case[0]].size(), statistics.median(taken))
        for case, taken in zip(cases, times, strict=True)
    )


def compute(device: torch.device, rounds: int) -> Rank:
    """Every rank at once, so that a node runs as hot as in training."""
    source = torch.zeros(_COPIED[device.type] // 4, device=device)
    copy = torch.zeros_like(source)
    works = (_product(device), lambda: copy.copy_(source))
    times: tuple[list[float], ...] = ([], [])
    for turn in range(1 + rounds):
        for taken, work in zip(times, works, strict=True):
            seconds = slowest(_repeated(work), device) / _CALLS
            if turn:  # the first one warms up
                taken.append(seconds)
    multiplied, copied = (statistics.median(taken) for taken in times)
    return Rank(_tflops(device, multiplied), 2 * _COPIED[device.type] / copied / 1e9)


def own_tflops(device: torch.device, rounds: int) -> float:
    """What this rank alone reaches in the product of `compute`; it talks to nobody."""
    work = _repeated(_product(device))
    return _tflops(device, _median(lambda: _own(work, device), rounds))


def bus_bandwidth(group: dist.ProcessGroup, device: torch.device, size: int, rounds: int) -> float:
    """GB/s of an all-reduce of `size` bytes; the ranks of the group call it, and get the same."""
    values = torch.zeros(size // 4, device=device)
    work = _repeated(_call("all_reduce", group, values, values))
    seconds = _median(lambda: slowest(work, device, group), rounds)
    return _link("", "all_reduce", size // 4, group.size(), seconds).gb_per_s


def _median(timed: Callable[[], float], rounds: int) -> float:
    """Seconds of one call of `_repeated`; a round before those that count warms up."""
    return statistics.median([timed() for _ in range(1 + rounds)][1:]) / _CALLS


def _product(device: torch.device) -> Callable[[], object]:
    side = _SIDE[device.type]
    # why: a product of equal numbers needs less power than one of training, and runs faster.
    a, b = (torch.randn(side, side, dtype=torch.bfloat16, device=device) for _ in range(2))
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out)


def _tflops(device: torch.device, seconds: float) -> float:
    return 2 * _SIDE[device.type] ** 3 / seconds / 1e12


def _spans(place: Place, device: torch.device) -> dict[str, dist.ProcessGroup]:
    shape = (nodes_of(place), place.local_world)
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=("across", "inside"))
    groups = {name: mesh.get_group(name) for name in ("inside", "across")}
    if 1 not in shape:
        assert dist.group.WORLD is not None
        groups["world"] = dist.group.WORLD
    return {name: group for name, group in groups.items() if group.size() > 1}


def _call(
    collective: Collective, group: dist.ProcessGroup, source: torch.Tensor, target: torch.Tensor
) -> Callable[[], object]:
    """One call over the group. source, target: (n,), n a multiple of its size."""
    share = len(source) // group.size()
    calls: dict[Collective, Callable[[], object]] = {  # dist: the group
        "all_reduce": lambda: dist.all_reduce(target, group=group),
        "all_gather": lambda: _all_gather(target, source[:share], group=group),
        "reduce_scatter": lambda: _reduce_scatter(target[:share], source, group=group),
        "all_to_all": lambda: dist.all_to_all_single(target, source, group=group),
    }
    return calls[collective]


def _repeated(work: Callable[[], object]) -> Callable[[], None]:
    def run() -> None:
        for _ in range(_CALLS):
            work()

    return run


def _link(span: str, collective: Collective, numel: int, ranks: int, seconds: float) -> Link:
    size = 4 * numel
    rate = size / seconds * bus_factor(collective, ranks) / 1e9
    return Link(span, collective, ranks, size, seconds, rate)
