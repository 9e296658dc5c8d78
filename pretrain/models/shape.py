"""What the configs of all families share: fields, and how a published size fills the rest."""

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

MANY = 12  # sizes; of more only the nearest are named in a message


class MupConfig(BaseModel):
    """muP, the parametrisation under which a learning rate holds at every width; see `mup`."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False)

    base_width: int = Field(ge=1)  # model.width at which every factor is 1
    # DiT and DiT-MoE: depth at which what blocks add and their rates are unscaled; null: at all
    base_depth: int | None = Field(None, ge=1)
    output_mult: float = Field(1.0, gt=0)  # multiplies what the readout reads
    # adaLN starts at zero, as in the standard parametrisation; null: U-DiT's does, DiT's does not
    adaln_zero: bool | None = None


class LatentConfig(BaseModel):
    """What goes in and what comes out, whatever the family."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False)

    input_size: int = Field(32, ge=2)  # latent height = width, pixels
    in_channels: int = Field(4, ge=1)  # latent channels
    num_classes: int = Field(1000, ge=1)  # labels; one more row is the null label
    learn_sigma: bool = True  # twice the channels out: the second half is the variance
    zero_init_std: float = Field(
        0.0, ge=0
    )  # given to zero-initialised tensors; parity tests use 0.05
    label_dropout: float = Field(0.1, ge=0, le=1)  # share of labels replaced by the null label
    width: int = Field(ge=2)  # channels
    mup: MupConfig | None = None  # of parametrisation=mup; standard drops it
    keeps_adaln_zero: ClassVar[bool] = False  # where mup.adaln_zero does not say

    @property
    def readout_scale(self) -> float:
        """Multiplies what the last linear or convolution reads."""
        return self.mup.output_mult * self.mup.base_width / self.width if self.mup else 1.0

    @property
    def residual_scale(self) -> float:
        """Multiplies what a block adds to the tokens."""
        return 1.0

    @property
    def out_channels(self) -> int:
        return self.in_channels * (2 if self.learn_sigma else 1)

    @property
    def dropout_draws(self) -> int:
        """Label-dropout draws a sample: 1, or one a label table where each has its own."""
        return 1

    def check_input(self, x_t: Tensor) -> None:
        """Raise ValueError unless x_t is (B, in_channels, input_size, input_size)."""
        want = (self.in_channels, self.input_size, self.input_size)
        if tuple(x_t.shape[1:]) != want:
            raise ValueError(
                f"latent of shape {tuple(x_t.shape)} given to a model of (B, C, H, W) = (B, "
                f"{', '.join(map(str, want))}); set in_channels and input_size to the data's"
            )


def fill_from_size(
    values: Mapping[str, Any],
    sizes: Mapping[str, Mapping[str, Any]],
    needed: tuple[str, ...],
    known: Mapping[str, Any],
) -> dict[str, Any]:
    """The values with what `size` says put under the explicit ones.

    needed: fields that must be there when no size is given; known: all fields of the config. Raises
    ValueError for an unknown size, or when neither a size nor the needed fields are given.
    """
    given = {name: value for name, value in values.items() if value is not None}
    if "size" in given:
        size = given["size"]
        if not isinstance(size, str) or size not in sizes:
            near = get_close_matches(str(size), sizes, n=3) if len(sizes) > MANY else []
            raise ValueError(
                f"size={size!r} is not a published size; use one of {', '.join(near or sizes)}"
            )
        return {**sizes[size], **given}
    missing = [name for name in needed if name not in given]
    # why: a misspelt `size` is better reported by pydantic as an unknown field.
    if missing and set(values) <= set(known):
        raise ValueError(
            f"neither size nor {', '.join(missing)} given; "
            f"set size to one of {', '.join(sizes)}, or give {', '.join(needed)}"
        )
    return given


def require_multiple(name: str, value: int, divisor: int, why: str) -> None:
    """Raise ValueError unless value is a multiple of divisor; why: what the divisor is."""
    if value % divisor:
        near = max(1, round(value / divisor)) * divisor
        raise ValueError(f"{name}={value} must be a multiple of {divisor} ({why}), such as {near}")
