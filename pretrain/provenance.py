"""Where values of a configuration come from. No effect on training, and none on what resumes."""

from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt


class TuningConfig(BaseModel):
    """A search on proxies: written by `pretrain tune`, its cost read by `pretrain plan`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    proxy: str  # configuration that was trained
    overrides: tuple[str, ...] = ()  # of it, for all trials
    sweep: str  # directory of the trials
    parameters: dict[str, str]  # what was searched, by key
    values: dict[str, int | float | str]  # the best of the widest proxy, as set here
    widths: tuple[PositiveInt, ...]  # of the proxies
    loss: float  # of these values, the mean over seeds
    seeds: PositiveInt  # of that loss
    spread: float | None  # of that loss over its seeds
    at_edge: tuple[str, ...]  # keys whose value is the first or last that was tried
    transfers: bool | None  # from the narrowest proxy to the widest; null: cannot be said
    trials: PositiveInt
    diverged: NonNegativeInt  # of these
    flops: NonNegativeInt  # of all trials, counted as those of a run are
    date: str
    commit: str | None  # null: not known
