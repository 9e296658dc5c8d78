"""Which published layout a model has, and what a file of one tells about the model."""

import torch

from pretrain.layouts import dit, dit_moe, udit
from pretrain.layouts.rules import Guess, Layout, Shape, Shapes, WeightsError, same
from pretrain.models.build import ModelConfig, build
from pretrain.models.dit import DiTConfig, DiTMoEConfig
from pretrain.models.udit import UDiTConfig

FAMILIES = ("dit", "dit-moe", "udit")
ABSENT = ("uvit", "skip-dit")  # known by name, their models are not here yet


def layout_of(cfg: ModelConfig) -> tuple[Layout, list[str]]:
    """The layout of the published form of this model, and the settings that it cannot hold: with
    one or more the layout is empty."""
    match cfg:
        case DiTConfig():
            other = dit.unlike(cfg)
            return ([] if other else dit.rules(cfg)), other
        case DiTMoEConfig():
            other = dit_moe.unlike(cfg)
            return ([] if other else dit_moe.rules(cfg)), other
        case UDiTConfig():
            other = udit.unlike(cfg)
            return ([] if other else udit.rules(cfg)), other


def check_family(family: str) -> None:
    """Raises WeightsError for a family that cannot be read."""
    if family in ABSENT:
        raise WeightsError(
            f"--family {family}: its model is not in this version; use one of {', '.join(FAMILIES)}"
        )
    if family not in FAMILIES:
        raise WeightsError(f"--family {family} is not known; use one of {', '.join(FAMILIES)}")


def infer(family: str, found: Shapes, where: str) -> Guess:
    """The configuration of a model of this family from the shapes in a file of it.

    Raises WeightsError if the keys that tell are not there. `num_heads` may be left open.
    """
    guess = {"dit": dit, "dit-moe": dit_moe, "udit": udit}[family].infer(found, where)
    if "num_heads" not in guess.values:
        dit.guess_heads(guess)
    return Guess({"family": family, **guess.values}, guess.assumed, guess.sizes)


def published_size(guess: Guess) -> str | None:
    """The published size that these values are, if they are one."""
    for name, size in guess.sizes.items():
        flat = {**guess.values, "moe": {"experts": guess.values.get("moe", {}).get("experts")}}
        if all(flat.get(key) == value for key, value in size.items()):
            return name
    return None


def shapes_of(cfg: ModelConfig) -> tuple[dict[str, Shape], set[str]]:
    """Shapes of the tensors that a checkpoint holds of a model, and which of them are trained."""
    with torch.device("meta"):
        model = build(cfg)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    return shapes, {name for name, _ in model.named_parameters()}


def own(cfg: ModelConfig) -> Layout:
    """Our own names, which every model has."""
    return [same(name, name) for name in shapes_of(cfg)[0]]
