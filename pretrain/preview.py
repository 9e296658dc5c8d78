"""Sample grids during training, from the averaged weights, drawn by all ranks together."""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor

from data_pipeline.codecs import Codec
from data_pipeline.decode import decode
from data_pipeline.shards import Manifest
from pretrain import pictures, sampling
from pretrain.objectives import Objective
from pretrain.sampling import SampleConfig
from pretrain.state import TrainState


class PreviewConfig(SampleConfig):
    """How to sample, and how often while training."""

    every: NonNegativeInt = 0  # steps between sample grids; 0: none
    per_class: PositiveInt = 8  # pictures of each of the first classes
    classes: PositiveInt = 10  # classes shown


def preview_labels(cfg: PreviewConfig, num_classes: int) -> Tensor:
    """Labels of a grid, a row a class. (N,) int64."""
    shown = torch.arange(min(cfg.classes, num_classes))
    return shown.repeat_interleave(cfg.per_class)


def draw_together(
    state: TrainState, objective: Objective, cfg: SampleConfig, labels: Tensor, shape: Sequence[int]
) -> Tensor:
    """Latents for `labels` from the averaged weights, (N, C, H, W), on every rank's CPU.

    Each rank draws an equal share, so that all call the sharded model equally often.
    """
    model = state.model
    rank, world = dist.get_rank(), dist.get_world_size()
    share = -(-len(labels) // world)
    indices = [i % len(labels) for i in range(rank * share, (rank + 1) * share)]
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    with state.ema.swapped():
        mine = sampling.sample(
            model,
            objective,
            cfg,
            labels[indices],
            null=model.cfg.num_classes,
            shape=shape,
            seed=state.seed,
            indices=indices,
            device=device,
        )
    model.train(was_training)
    parts = [torch.empty_like(mine) for _ in range(world)]
    dist.all_gather(parts, mine.contiguous())  # dist: once a grid
    return torch.cat(parts)[: len(labels)].cpu()


def save_grid(
    state: TrainState,
    objective: Objective,
    cfg: PreviewConfig,
    manifest: Manifest,
    codec: Codec,
    path: Path,
) -> None:
    """Draws the preview and writes it once. Every rank calls it."""
    labels = preview_labels(cfg, manifest.num_classes)
    latents = draw_together(state, objective, cfg, labels, manifest.latent_shape)
    if dist.get_rank() == 0:
        pictures.save(path, decode(latents, manifest, codec), columns=cfg.per_class)
