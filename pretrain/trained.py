"""A trained model ready for use by one process: weights out of a checkpoint, pictures, scores.

Needs the checkpoint alone; the shards only for `score`, which compares with the real images.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from data_pipeline import remote
from data_pipeline.codecs import Codec, open_codec
from data_pipeline.decode import Images, decode, real_images
from data_pipeline.shards import Manifest
from parallel import storage
from pretrain import config, evaluate, sampling
from pretrain.holding import Holding
from pretrain.manifest import CheckpointError
from pretrain.models.build import build
from pretrain.models.init import initialise
from pretrain.models.udit import UDiT, merge
from pretrain.sampling import SampleConfig


@dataclass(frozen=True)
class Trained:
    """What a checkpoint holds, opened."""

    folder: Path
    step: int
    cfg: config.Config
    latents: Manifest  # of the training data, without its shards
    model: nn.Module  # in evaluation form
    codec: Codec

    @staticmethod
    def load(place: Path, weights: str = "ema") -> "Trained":
        """From a run directory (its newest whole checkpoint) or a checkpoint directory.

        weights: model, ema, or another average that it holds. Raises CheckpointError or
        DamagedError if there is nothing to read, WeightsError for an average that is not held.
        """
        held = Holding.of(place)
        stored = held.at(weights)
        cfg = config.validate(held.manifest["config"])
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        with torch.device("meta"):
            model = build(cfg.model)
        model.to_empty(device="cpu")
        initialise(model, cfg.seed)  # why: the tables, which no checkpoint holds
        full = storage.read_alone(list(stored.values()), held.folder)
        model.load_state_dict({name: full[key] for name, key in stored.items()})
        if isinstance(model, UDiT):
            model = merge(model)
        try:
            latents = Manifest.model_validate(held.manifest["latents"])
        except ValidationError as error:
            raise CheckpointError(
                f"{held.folder} states latents that this version does not know; "
                "use the version that wrote it"
            ) from error
        codec = open_codec(latents.codec, latents.codec_source, device=device)
        return Trained(held.folder, held.step, cfg, latents, model.to(device).eval(), codec)

    def sampling(self, **chosen: object) -> SampleConfig:
        """The run's own sampling settings with what was chosen put over them.

        Raises ConfigError for a wrong value, SamplingError for a sampler of another objective.
        """
        own = self.cfg.sample.model_dump(include=set(SampleConfig.model_fields))
        given = {name: value for name, value in chosen.items() if value is not None}
        cfg = config.part(SampleConfig, own | given)
        sampling.check(cfg, self.cfg.objective)
        return cfg

    def draw(self, labels: Tensor, cfg: SampleConfig, seed: int) -> Images:
        """Pictures of these classes, (N, c, h, w)."""
        device = next(self.model.parameters()).device
        latents = sampling.sample(
            self.model,
            self.cfg.objective,
            cfg,
            labels,
            null=self.cfg.model.num_classes,
            shape=self.latents.latent_shape,
            seed=seed,
            device=device,
        )
        return decode(latents, self.latents, self.codec)

    def score(
        self, cfg: SampleConfig, *, count: int, seed: int, data: str | None = None
    ) -> tuple[evaluate.Scores, Images]:
        """Scores `count` pictures, classes in equal numbers, against the training images.

        data: directory or address of the shards, by default the run's.
        """
        place = remote.here(data or self.cfg.data.path, self.cfg.data.cache)
        train, train_labels = real_images(place, "train", self.codec, seed=seed)
        held, held_labels = real_images(place, "val", self.codec, seed=seed)
        labels = torch.arange(count) % self.latents.num_classes
        pictures = self.draw(labels, cfg, seed)
        scores = evaluate.evaluate_samples(
            train, train_labels, held, held_labels, pictures, labels, seed=seed
        )
        return scores, pictures


def parse_labels(text: str, num_classes: int) -> Tensor:
    """Classes from `3,1,4` or `0-9`; empty means all. (N,) int64. Raises ConfigError."""
    if not text:
        return torch.arange(num_classes)
    labels: list[int] = []
    try:
        for item in text.split(","):
            first, _, last = item.partition("-")
            labels += range(int(first), int(last or first) + 1)
    except ValueError:
        raise config.ConfigError(f"--labels {text!r}: write classes as 3,1,4 or 0-9") from None
    wrong = [label for label in labels if not 0 <= label < num_classes]
    if not labels:
        raise config.ConfigError(f"--labels {text}: no class is meant; write 3,1,4 or 0-9")
    if wrong:
        raise config.ConfigError(f"--labels: {wrong[0]} is out of range; use 0-{num_classes - 1}")
    return torch.tensor(labels)
