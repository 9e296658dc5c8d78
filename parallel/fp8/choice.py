"""Which products are faster in FP8 on this machine, casts included: timed once, before training."""

import time
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.fp8 import transformer_engine
from parallel.fp8.grouped import grouped
from parallel.fp8.linear import linear
from parallel.fp8.product import Product, Switch
from parallel.fp8.recipes import TILE, Backend, Recipe

Shape = tuple[int, ...]  # rows, outer, inner, and for experts their number
Seconds = tuple[float, float]  # of forward and backward: in bf16, in FP8


def worthwhile(timings: Mapping[Shape, Seconds]) -> set[Shape]:
    """Shapes that are faster in FP8."""
    return {shape for shape, (plain, ours) in timings.items() if ours < plain}


def able(backend: Backend, recipe: Recipe, shape: Shape) -> bool:
    """Whether the kernels take a linear of this shape; torch's others are filled up with zeros."""
    _, outer, inner, *experts = shape
    if experts or backend == "emulated":
        return True
    if backend == "transformer_engine":
        return outer % transformer_engine.ROWS == inner % transformer_engine.ROWS == 0
    return recipe != "block" or min(shape) >= TILE


def too_slow(products: Mapping[str, Product], say: Callable[[str], None]) -> list[str]:
    """Names of products that stay in bf16, as rank 0 timed them; each shape is timed once, and
    said. Every rank calls it, after a forward in mode `measure`.
    """
    timings: dict[Shape, Seconds] = {}
    for product in products.values():
        for shape in product.shapes - timings.keys():
            if not able(product.backend, product.recipe, shape):
                continue
            timings[shape] = timed(product, shape)
            plain, ours = (1e6 * seconds for seconds in timings[shape])
            say(f"fp8: {'×'.join(map(str, shape))}: bf16 {plain:.0f} µs, fp8 {ours:.0f} µs")
    good = worthwhile(timings)
    slow = [[name for name, product in products.items() if not product.shapes <= good]]
    if dist.is_initialized():
        dist.broadcast_object_list(slow, src=0)  # dist: once a run
    return slow[0]


def timed(product: Product, shape: Shape, repeats: int = 10) -> Seconds:
    """Forward and backward of one shape, bf16 and FP8, on the product's device."""
    device = product.past.device
    rows, outer, inner, *experts = shape
    x = torch.randn(rows, inner, device=device, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(*experts, outer, inner, device=device, dtype=torch.bfloat16)
    weight.requires_grad_()
    grad = torch.randn(rows, outer, device=device, dtype=torch.bfloat16)
    counts = torch.full(experts, rows // experts[0], device=device) if experts else None
    if counts is not None:
        counts[-1] += rows - counts.sum()
    own = replace(
        product,
        past=torch.ones_like(product.past),
        seen=torch.zeros_like(product.seen),
        switch=Switch(),
    )

    def once(chosen: Product | None) -> None:
        out = (
            linear(x, weight, None, chosen)
            if counts is None
            else grouped(x, weight, counts, chosen)
        )
        torch.autograd.grad(out, (x, weight), grad)

    def seconds(chosen: Product | None) -> float:
        once(chosen)  # why: the first call chooses kernels
        _wait(x)
        begin = time.perf_counter()
        for _ in range(repeats):
            once(chosen)
        _wait(x)  # sync: a benchmark, before training
        return (time.perf_counter() - begin) / repeats

    return seconds(None), seconds(own)


def _wait(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
