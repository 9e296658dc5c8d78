"""A layer of experts beside a dense feed-forward of equal active FLOPs, forward and backward.

    pretrain bench moe --tokens 4096 --width 1024 --experts 64 --top-k 4

The dense layer is a SwiGLU as wide as the experts that a token sees together. Balanced: a fresh
router, whose choice is even on average. Skewed: its bias falls with the number of the expert, so
that few experts get most tokens. Dispatch is `exact` on one rank.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from parallel import launch
from parallel.errors import LayoutError
from pretrain.benches.record import record
from pretrain.models.layers import SwiGLU
from pretrain.models.moe import MoE, MoEConfig


@dataclass(frozen=True)
class Sizes:
    tokens: int
    width: int
    hidden: int  # channels inside an expert
    experts: int
    top_k: int

    def check(self) -> None:
        """Raises LayoutError if there are fewer experts than a token wants."""
        if self.top_k > self.experts:
            raise LayoutError(
                f"top_k={self.top_k} of {self.experts} experts; lower --top-k or raise --experts"
            )

    @property
    def flops(self) -> int:
        """Of one forward and backward of what both compute: three products, 2 a MAC, 3 passes."""
        return 18 * self.tokens * self.top_k * self.width * self.hidden


def moe(sizes: Sizes, rounds: int) -> dict[str, Any]:
    """TFLOP/s of the same FLOPs by each, medians of interleaved rounds; `share` of the dense one's.

    The FLOPs of the router are not counted: what it costs is part of what experts cost.
    """
    sizes.check()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    works = _works(sizes, device, dtype)
    times: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(2 + rounds):
        for name, work in works.items():
            _settle(device)
            begin = time.perf_counter()
            work()
            _settle(device)
            if turn > 1:  # the first ones warm up
                times[name].append(time.perf_counter() - begin)
    median = {name: statistics.median(taken) for name, taken in times.items()}
    rows = [
        {
            "layer": name,
            "seconds": seconds,
            "tflops": sizes.flops / seconds / 1e12,
            "share": median["dense"] / seconds,
        }
        for name, seconds in median.items()
    ]
    place = launch.Place.here()
    return (
        record("moe", place) | vars(sizes) | {"dtype": str(dtype), "rounds": rounds, "rows": rows}
    )


def _works(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], None]]:
    cfg = MoEConfig(
        experts=sizes.experts, top_k=sizes.top_k, hidden=sizes.hidden, router_time=False
    )
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(1, sizes.tokens, sizes.width, generator=draws).to(device, dtype)
    time_of_image = torch.zeros(1, sizes.width, device=device, dtype=dtype)
    even, skewed = (_filled(MoE(sizes.width, cfg, None), device, dtype) for _ in range(2))
    skewed.router.bias.copy_(torch.linspace(1.0, 0.0, sizes.experts))
    dense = _filled(SwiGLU(sizes.width, sizes.hidden * sizes.top_k), device, dtype)
    return {
        "dense": _both_ways(dense, lambda inputs: dense(inputs), x),
        "balanced": _both_ways(even, lambda inputs: even(inputs, inputs, time_of_image)[0], x),
        "skewed": _both_ways(skewed, lambda inputs: skewed(inputs, inputs, time_of_image)[0], x),
    }


def _filled(layer: Any, device: torch.device, dtype: torch.dtype) -> Any:
    draws = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.02, generator=draws)
        for buffer in layer.buffers():
            buffer.zero_()
    layer.to(device, dtype)
    for part in layer.modules():
        if hasattr(part, "router"):
            part.router.float()
    return layer


def _both_ways(layer: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], None]:
    inputs, grad = x.clone().requires_grad_(), torch.ones_like(x)

    def work() -> None:
        run(inputs).backward(grad)
        inputs.grad = None
        layer.zero_grad(set_to_none=True)

    return work


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()  # sync: what is timed begins and ends here
