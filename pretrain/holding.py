"""What one checkpoint holds of its model: which averages, under which names. Reads no tensors."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from parallel import storage
from pretrain.layouts.official import shapes_of
from pretrain.layouts.rules import Shape, WeightsError
from pretrain.manifest import CheckpointError, locate, read_manifest
from pretrain.models.build import ModelConfig

RAW = "model"  # what the weights themselves are called among the averages
_read_model = TypeAdapter(ModelConfig).validate_python


@dataclass(frozen=True)
class Holding:
    """A checkpoint, opened but not read."""

    folder: Path
    manifest: dict[str, Any]
    model: ModelConfig
    shapes: dict[str, Shape]  # of all tensors of the model
    trained: set[str]  # of these, parameters; the others are buffers
    averages: tuple[str, ...]  # model, ema and what else is held of every parameter

    @staticmethod
    def of(place: Path) -> "Holding":
        """Of a run directory (its newest whole checkpoint) or a checkpoint directory.

        Raises CheckpointError or DamagedError if there is none to read, or its model is not known.
        """
        folder = locate(place)
        manifest = read_manifest(folder)
        try:
            model = _read_model(manifest["config"]["model"])
            shapes, trained = shapes_of(model)
        except (ValidationError, KeyError, TypeError, RuntimeError) as error:
            reason = str(error).replace("\n", " ")
            raise CheckpointError(
                f"{folder} states a model that this version does not know ({reason}); "
                "use the version that wrote it"
            ) from error
        stored = storage.contents(folder)
        # why: told by one parameter; the name of an average may itself hold a dot.
        end = f".{min(trained)}"
        heads = {name.removesuffix(end) for name in stored if name.endswith(end)}
        averages = tuple(sorted(h for h in heads if not h.startswith("optim.")))
        for name, shape in shapes.items():
            for average in averages if name in trained else (RAW,):
                held = stored.get(f"{average}.{name}")
                if held is None or tuple(held[0]) != tuple(shape):
                    raise CheckpointError(
                        f"{folder} does not hold the model that it states: {average}.{name} is "
                        f"{'missing' if held is None else list(held[0])}, expected {list(shape)}"
                    )
        return Holding(folder, manifest, model, shapes, trained, averages)

    @property
    def step(self) -> int:
        return self.manifest["state"]["step"]

    def at(self, weights: str) -> dict[str, str]:
        """Under which name each tensor of the model is stored in one of the averages.

        Buffers are not averaged: they are the live ones. Raises WeightsError for an average that is
        not held.
        """
        if weights not in self.averages:
            *first, last = self.averages
            held = f"{', '.join(first)} and {last}" if first else last
            raise WeightsError(
                f"--weights {weights}: a checkpoint holds {held} (here {self.folder}); "
                "use one of them"
            )
        return {n: f"{weights if n in self.trained else RAW}.{n}" for n in self.shapes}
