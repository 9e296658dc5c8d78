"""Checkpoints of tiny models with random values, written by one process without training."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain import config
from pretrain.layouts.official import shapes_of
from pretrain.manifest import write_alone
from pretrain.models.build import build
from pretrain.models.init import initialise

LATENTS = {
    "codec": "haar2",
    "codec_hash": "",
    "codec_source": None,
    "image_shape": [1, 32, 32],
    "latent_shape": [16, 8, 8],
    "stored_shape": [16, 8, 8],
    "posterior": False,
    "dtype": "float16",
    "shift": [0.0] * 16,
    "scale": [1.0] * 16,
    "mean": [0.0] * 16,
    "std": [1.0] * 16,
    "class_names": [str(i) for i in range(10)],
    "num_classes": 10,
    "lanes": 1024,
    "flips": False,
    "seed": 0,
    "splits": {},
    "quarantined": 0,
    "quarantine": None,
}


def values(cfg: config.Config, seed: int) -> dict[str, Tensor]:
    """Every tensor of the model, none of them zero."""
    model = build(cfg.model)
    initialise(model, seed, zero_std=0.05)
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


def write(
    folder: Path,
    cfg: config.Config,
    *,
    step: int = 1,
    averages: Sequence[str] = ("ema",),
    updates: int | None = None,
    **biases: Any,
) -> Path:
    """A checkpoint of `cfg` at `step` in the run `folder`; each average has values of its own.

    The weights are `values(cfg, step)`, average i is `values(cfg, 100·step + i)`.
    """
    _, trained = shapes_of(cfg.model)
    tensors = {f"model.{name}": tensor for name, tensor in values(cfg, step).items()}
    for number, average in enumerate(averages):
        other = values(cfg, 100 * step + number)
        tensors |= {f"{average}.{name}": other[name] for name in trained}
    tensors["optim.updates"] = torch.tensor(float(step if updates is None else updates))
    tensors |= biases
    facts = {
        "model": cfg.model.model_dump(mode="json"),
        "objective": cfg.objective.model_dump(mode="json"),
        "data": None,
        "latents": LATENTS,
        "config": cfg.model_dump(mode="json"),
    }
    out = folder / "checkpoints" / f"step_{step:08d}"
    write_alone(out, tensors.items(), {"step": step, "seed": 0}, facts)
    return out
