"""Every family behind one name: its config, its model, and the model built as published."""

from typing import Annotated

from pydantic import Field

from pretrain.models.dit import DiT, DiTConfig, DiTMoEConfig
from pretrain.models.rep import Form
from pretrain.models.udit import UDiT, UDiTConfig

ModelConfig = Annotated[DiTConfig | DiTMoEConfig | UDiTConfig, Field(discriminator="family")]
Model = DiT | UDiT


def build_form(cfg: DiTConfig | DiTMoEConfig | UDiTConfig, form: Form) -> Model:
    """The model of a config in one form of its re-parameterised parts, which only U-DiT has
    (`rep.Form`); every parameter declares the start of the standard parametrisation."""
    return UDiT(cfg, form) if isinstance(cfg, UDiTConfig) else DiT(cfg)
