"""From a model config to the model that is trained."""

from pretrain.models.families import Model, ModelConfig, build_form
from pretrain.models.mup import declare


def build(cfg: ModelConfig) -> Model:
    """The model of a config, on the current default device (meta too), its values undefined until
    `init.initialise`. Under muP its parameters declare the starts of muP."""
    model = build_form(cfg, "trained")
    declare(model, cfg)
    return model
