"""What FP8 gains and what it costs, by recipe: a block's products against bf16, and a short run.

    precision(model, images=32, steps=100, rounds=5)

One process. The short run learns smooth random latents, the same in every precision, so that gaps
are paired; it shows that a recipe trains, not what a model of this size loses on images. Without an
FP8 chip both are of the emulation, whose times say nothing of a chip's.
"""

import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from parallel.fp8 import choice
from parallel.fp8.backends import backend_for, capability
from parallel.fp8.product import Product
from parallel.fp8.recipes import FP8Config, Recipe
from parallel.fp8.scaling import Scaling, attach
from parallel.launch import Place
from parallel.mesh import ALONE
from pretrain.benches.record import record
from pretrain.models.build import Model, ModelConfig, build
from pretrain.models.init import initialise

RECIPES: tuple[Recipe, ...] = ("delayed", "current", "block")
LR = 1e-3
LATENTS = 256  # that the short run learns


def precision(
    model: ModelConfig,
    *,
    images: int,
    steps: int,
    rounds: int = 5,
    recipes: Sequence[Recipe] = RECIPES,
    seed: int = 0,
) -> dict[str, Any]:
    """A row a recipe. `gain`: seconds of the products of the middle block, forward and backward, in
    bf16 ÷ FP8, casts included, uncompiled, medians of interleaved rounds; `gap`: of the loss of the
    last quarter of the steps, FP8 ÷ bf16 − 1.

    images: of a step.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backend = backend_for(FP8Config(), capability(device))
    plain = _run(_made(model, None, device, seed), images, steps, seed)
    rows = []
    for recipe in recipes:
        made = _made(model, FP8Config(recipe=recipe), device, seed)
        times = _times(made, images, rounds)
        ours = _run(made, images, steps, seed)
        tail = max(1, steps // 4)
        rows.append(
            {
                "recipe": recipe,
                "gain": times[0] / times[1],
                "bf16_seconds": times[0],
                "fp8_seconds": times[1],
                "loss": statistics.fmean(ours[-tail:]),
                "gap": statistics.fmean(ours[-tail:]) / statistics.fmean(plain[-tail:]) - 1,
            }
        )
    return record("precision", Place.here()) | {
        "backend": backend,
        "emulation": backend == "emulated",
        "images": images,
        "steps": steps,
        "rounds": rounds,
        "recipes": rows,
    }


def _made(cfg: ModelConfig, fp8: FP8Config | None, device: torch.device, seed: int) -> Model:
    with torch.device("meta"):
        model = build(cfg)
    model.to_empty(device=device)
    # why: from zeros the blocks say nothing for many steps, and FP8 costs nothing.
    initialise(model, seed, 0.05)
    model.dtype = torch.bfloat16
    if fp8 is not None:
        # why: a model of one or two blocks has no block between the first and the last.
        kept = 1 if len(model.units()) > 2 else 0
        fp8 = fp8.model_copy(update={"keep_first": kept, "keep_last": kept})
        backend = backend_for(fp8, capability(device))
        attach(model.units(), fp8, backend, ALONE, device)
    return model.train()


def _times(model: Model, images: int, rounds: int) -> tuple[float, float]:
    """Seconds of the middle block's products: in bf16, in FP8."""
    units = model.units()
    scaling = Scaling(units[len(units) // 2], next(model.parameters()).device)
    scaling.switch.mode = "measure"
    with torch.no_grad():
        model(*_batch(model, images, 0, 0))
    scaling.switch.mode = "train"
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        taken = [_timed(product) for product in scaling.products.values()]
        for into, of_one in zip(times, zip(*taken, strict=True), strict=True):
            into.append(sum(of_one))
    for product in Scaling(model, next(model.parameters()).device).products.values():
        product.compared.clear()
    return statistics.median(times[0]), statistics.median(times[1])


def _timed(product: Product) -> tuple[float, float]:
    found = [choice.timed(product, shape, repeats=3) for shape in sorted(product.shapes)]
    return sum(plain for plain, _ in found), sum(ours for _, ours in found)


def _batch(model: Model, images: int, seed: int, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Noised latents, times in sinusoid units, labels."""
    x, noise, t, labels = _drawn(model, images, seed, step)
    wide = t.view(-1, 1, 1, 1)
    return (1 - wide) * x + wide * noise, 1000 * t, labels


def _drawn(model: Model, images: int, seed: int, step: int) -> tuple[Tensor, ...]:
    """On the model's device, a function of seed and step."""
    cfg = model.cfg
    shape = (cfg.in_channels, cfg.input_size, cfg.input_size)
    draws = torch.Generator().manual_seed(seed)
    coarse = torch.randn(LATENTS, cfg.in_channels, 2, 2, generator=draws)
    smooth = torch.nn.functional.interpolate(coarse, size=shape[1:], mode="bilinear")
    draws.manual_seed(1 + seed + 1_000_003 * (1 + step))
    which = torch.randint(LATENTS, (images,), generator=draws)
    noise, t = torch.randn(images, *shape, generator=draws), torch.rand(images, generator=draws)
    device = next(model.parameters()).device
    return tuple(v.to(device) for v in (smooth[which], noise, t, which % cfg.num_classes))


def _run(model: Model, images: int, steps: int, seed: int) -> list[float]:
    """Losses of a velocity regression."""
    device = next(model.parameters()).device
    scaling = Scaling(model, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.99))
    losses = []
    for step in range(steps):
        x, noise, _, _ = _drawn(model, images, seed, step)
        pred = model(*_batch(model, images, seed, step))[:, : x.shape[1]]
        loss = (pred - (noise - x)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scaling.advance(scaling.maxima(), torch.zeros((), dtype=torch.bool, device=device))
        losses.append(loss.detach())
    return torch.stack(losses).tolist()  # sync: the end of a benchmark
