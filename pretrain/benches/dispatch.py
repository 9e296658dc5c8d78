"""Tokens to experts on other ranks and back, forward and backward, with both dispatchers.

    pretrain bench dispatch --tokens 4096 --width 1024 --experts 64 --top-k 4 --nproc 2

The picks are even on average, as a balanced router makes them. Every rank calls every function.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn

from parallel import launch
from parallel.dispatch import Dispatcher, Exact, Static
from parallel.errors import LayoutError
from parallel.experts import Picks
from parallel.links import slowest
from parallel.mesh import Mesh, MeshConfig, degrees
from pretrain.benches.record import record
from pretrain.models.moe import Experts

_PASSES = 4  # of the all-to-all: dispatch and combine, forward and backward


@dataclass(frozen=True)
class Sizes:
    tokens: int  # of a rank
    width: int
    hidden: int  # channels inside an expert
    experts: int  # of all ranks together
    top_k: int
    ep: int  # ranks that share the experts; 0: those of a node
    capacity: float  # of the static dispatcher

    def check(self, world: int) -> None:
        """Raises LayoutError if experts, picks or ranks do not split."""
        if self.top_k > self.experts or self.experts % self.ep:
            raise LayoutError(
                f"top_k={self.top_k} and ep={self.ep} do not fit {self.experts} experts: top_k "
                "must be at most their number, ep must divide it"
            )
        if world % self.ep:
            raise LayoutError(f"ep={self.ep} must divide the {world} ranks; change --ep")


def dispatch(sizes: Sizes, rounds: int) -> dict[str, Any]:
    """Rates of both dispatchers, in bfloat16 on a GPU and float32 on a CPU.

    `gb_per_s`: bytes of picks that leave a rank for others ÷ seconds; the spare rows of the static
    buffers are not counted. `gemm_share`: seconds of the same experts on the same rows alone ÷
    seconds of the whole. Seconds are those of the slowest rank, medians of interleaved rounds.
    """
    place = launch.Place.here()
    sizes = Sizes(**vars(sizes) | {"ep": sizes.ep or place.local_world})
    sizes.check(place.world)
    device = launch.join(place, threads=1, timeout=timedelta(minutes=10))
    axis = Mesh(degrees(MeshConfig(ep=sizes.ep), place.world), device.type).ep
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    work = _Work(sizes, place.rank, device, dtype)
    ways: dict[str, Dispatcher] = {
        "exact": Exact(sizes.experts, axis),
        "static": Static(sizes.experts, sizes.capacity, axis),
    }
    works: dict[str, Callable[[], object]] = {}
    dropped = {}
    for name, way in ways.items():
        dropped[name] = float(work.whole(way))
        works[name] = lambda way=way: work.whole(way)
        works[f"{name} alone"] = work.alone(*work.seen)
    times: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(1 + rounds):
        for name, one in works.items():
            seconds = slowest(one, device)
            if turn:  # the first one warms up
                times[name].append(seconds)
    launch.leave()
    median = {name: statistics.median(taken) for name, taken in times.items()}
    picks = sizes.tokens * sizes.top_k
    sent = picks * (sizes.ep - 1) / sizes.ep * sizes.width * dtype.itemsize * _PASSES
    rows = [
        {
            "dispatcher": name,
            "seconds": median[name],
            "tokens_per_s": sizes.tokens * place.world / median[name],
            "gb_per_s": sent / median[name] / 1e9,
            "gemm_share": median[f"{name} alone"] / median[name],
            "dropped": dropped[name] / picks,  # share of this rank's picks
        }
        for name in ways
    ]
    return record("dispatch", place) | vars(sizes) | {"rounds": rounds, "dispatchers": rows}


class _Work:
    """One rank's tokens, picks and experts."""

    def __init__(self, sizes: Sizes, rank: int, device: torch.device, dtype: torch.dtype) -> None:
        draws = torch.Generator().manual_seed(rank)
        scores = torch.rand(sizes.tokens, sizes.experts, generator=draws)
        tokens = torch.arange(sizes.tokens).repeat_interleave(sizes.top_k)
        chosen = scores.topk(sizes.top_k, dim=1).indices.flatten()
        weights = torch.full(chosen.shape, 1 / sizes.top_k)
        self._picks = Picks(chosen.to(device), weights.to(device), tokens.to(device), sizes.top_k)
        x = torch.randn(sizes.tokens, sizes.width, generator=draws)
        self._x = x.to(device, dtype).requires_grad_()
        self._grad = torch.ones_like(self._x)
        self._experts = Experts(sizes.width, sizes.hidden, sizes.experts // sizes.ep)
        for parameter in self._experts.parameters():
            nn.init.normal_(parameter, std=0.02, generator=draws)
        self._experts.to(device, dtype)
        self.seen: tuple[Tensor, Tensor]  # rows and counts that the experts got last

    def whole(self, way: Dispatcher) -> Tensor:
        """Forward and backward; returns how many picks were dropped, ()."""
        found = way(self._x, self._picks, self._spied, None)
        found.out.backward(self._grad)
        self._forget(self._x)
        return found.dropped

    def alone(self, rows: Tensor, counts: Tensor) -> Callable[[], None]:
        """The experts on these rows, forward and backward, without a way there and back."""
        rows = rows.clone().requires_grad_()
        grad = torch.ones_like(rows)

        def run() -> None:
            self._experts(rows, counts).backward(grad)
            self._forget(rows)

        return run

    def _spied(self, rows: Tensor, counts: Tensor) -> Tensor:
        self.seen = rows.detach(), counts
        return self._experts(rows, counts)

    def _forget(self, x: Tensor) -> None:
        x.grad = None
        self._experts.zero_grad(set_to_none=True)
