"""From a model config to a model; the one place that knows all families."""

from typing import Annotated

from pydantic import Field

from pretrain.models.dit import DiT, DiTConfig, DiTMoEConfig
from pretrain.models.udit import UDiT, UDiTConfig

ModelConfig = Annotated[DiTConfig | DiTMoEConfig | UDiTConfig, Field(discriminator="family")]
Model = DiT | UDiT


def build(cfg: DiTConfig | DiTMoEConfig | UDiTConfig) -> Model:
    """The model of a config, on the current default device (meta too), its values undefined until
    `init.initialise`."""
    return UDiT(cfg) if isinstance(cfg, UDiTConfig) else DiT(cfg)


def build_merged(cfg: DiTConfig | DiTMoEConfig | UDiTConfig) -> Model:
    """The same in the form that inference runs, re-parameterised parts merged (`udit.merge`)."""
    return UDiT(cfg, merged=True) if isinstance(cfg, UDiTConfig) else DiT(cfg)
