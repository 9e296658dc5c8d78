"""Sample grids during training, from the averaged weights, drawn by all ranks together."""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor

from data_pipeline.codecs import open_codec
from data_pipeline.decode import decode
from data_pipeline.shards import Manifest
from parallel.mesh import Mesh
from parallel.tensor import gather
from pretrain import pictures, sampling
from pretrain.objectives import Objective
from pretrain.sampling import SampleConfig
from pretrain.state import TrainState


class PreviewConfig(SampleConfig):
    """How to sample, and how often while training."""

    every: NonNegativeInt = 0  # steps between sample grids; 0: none
    per_class: PositiveInt = 8  # pictures of each of the first classes
    classes: PositiveInt = 10  # classes shown


class Preview:
    """Draws the same labels from the same noise each time, so that grids can be compared."""

    def __init__(
        self,
        cfg: PreviewConfig,
        objective: Objective,
        manifest: Manifest,
        mesh: Mesh,
        *,
        null: int,
    ) -> None:
        """null: the label "no class". Opens the codec only if pictures are wanted."""
        self._cfg, self._objective, self._manifest, self._null = cfg, objective, manifest, null
        self._mesh = mesh
        self._codec = open_codec(manifest.codec, manifest.codec_source) if cfg.every else None
        shown = torch.arange(min(cfg.classes, manifest.num_classes))
        self._labels = shown.repeat_interleave(cfg.per_class)

    def save(self, state: TrainState, path: Path) -> None:
        """Writes one grid, a row a class. Every rank calls it; rank 0 writes."""
        assert self._codec is not None, "sample.every is 0"
        shape = self._manifest.latent_shape
        latents = draw_together(
            state,
            self._objective,
            self._cfg,
            self._labels,
            self._mesh,
            null=self._null,
            shape=shape,
        )
        if dist.get_rank() == 0:
            images = decode(latents, self._manifest, self._codec)
            pictures.save(path, images, columns=self._cfg.per_class)


def draw_together(
    state: TrainState,
    objective: Objective,
    cfg: SampleConfig,
    labels: Tensor,
    mesh: Mesh,
    *,
    null: int,
    shape: Sequence[int],
) -> Tensor:
    """Latents for `labels` from the averaged weights, (N, C, H, W), on every rank's CPU.

    Each data rank draws an equal share, so that all call the sharded model equally often.
    """
    model = state.model
    data = mesh.data
    share = -(-len(labels) // data.size)
    share += -share % mesh.tp.size  # ranks of a tp group cut the tokens of an MoE layer evenly
    indices = list(range(data.rank * share, (data.rank + 1) * share))  # those past the end fill up
    was_training = model.training
    model.eval()
    with state.ema.swapped():
        mine = sampling.sample(
            model,
            objective,
            cfg,
            labels[[index % len(labels) for index in indices]],
            null=null,
            shape=shape,
            seed=state.seed,
            indices=indices,
            device=state.backend.device,
        )
    model.train(was_training)
    parts = gather(mine, data, 0)  # dist: the data ranks, once a grid
    return parts[: len(labels)].cpu()
