"""From a model config to a model; the one place that knows all families."""

from typing import Annotated

from pydantic import Field

from pretrain.models.dit import DiT, DiTConfig, DiTMoEConfig
from pretrain.models.rep import Form
from pretrain.models.udit import UDiT, UDiTConfig

ModelConfig = Annotated[DiTConfig | DiTMoEConfig | UDiTConfig, Field(discriminator="family")]
Model = DiT | UDiT


def build(cfg: DiTConfig | DiTMoEConfig | UDiTConfig) -> Model:
    """The model of a config, on the current default device (meta too), its values undefined until
    `init.initialise`."""
    return build_form(cfg, "trained")


def build_form(cfg: DiTConfig | DiTMoEConfig | UDiTConfig, form: Form) -> Model:
    """The same in another form of its re-parameterised parts, which only U-DiT has (`rep.Form`)."""
    return UDiT(cfg, form) if isinstance(cfg, UDiTConfig) else DiT(cfg)
