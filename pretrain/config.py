"""Config: one frozen tree that composes the parts' own configs, read from YAML and dot-lists.

Only `train.py` and the commands see the root; every part gets its own branch.
"""

import difflib
import types
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic import ValidationError, model_validator

from data_pipeline.loader import LoaderConfig
from parallel.mesh import Degrees, MeshConfig
from parallel.precision import Precision
from pretrain.checkpoint import CheckpointConfig
from pretrain.ema import EMAConfig
from pretrain.metrics import LogConfig
from pretrain.models.build import ModelConfig
from pretrain.objectives import DDPM, ObjectiveConfig
from pretrain.optim import OptimConfig
from pretrain.preview import PreviewConfig
from pretrain.schedules import ScheduleConfig


T = TypeVar("T", bound=BaseModel)


class ConfigError(ValueError):
    """What somebody typed is wrong: what came, what was expected, what to change."""


class Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    model: ModelConfig
    objective: ObjectiveConfig
    data: LoaderConfig
    steps: PositiveInt  # optimizer updates
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig
    ema: EMAConfig = EMAConfig()
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    sample: PreviewConfig = PreviewConfig()
    engine: Literal["fsdp2"] = "fsdp2"
    precision: Precision = "fp32"
    parametrisation: Literal["standard"] = "standard"
    run_dir: str  # default: runs/NAME of the YAML file
    seed: NonNegativeInt = 0
    accum: PositiveInt = 1  # micro-batches a step
    clip: PositiveFloat | None = 1.0  # largest gradient norm; null: no clipping
    max_skips: PositiveInt = 20  # skipped steps in a row that end the run
    threads: PositiveInt | None = None  # CPU threads a rank; null: its share of the cores
    timeout: PositiveInt = 600  # seconds a collective may take

    @model_validator(mode="after")
    def _parts_fit(self) -> "Config":
        if isinstance(self.objective, DDPM) and not self.model.learn_sigma:
            raise ValueError(
                "objective.kind=ddpm learns the variance, so the model needs twice the channels; "
                "set model.learn_sigma=true or objective.kind=flow"
            )
        return self


def load(path: str | Path, overrides: list[str]) -> Config:
    """Reads one YAML file and applies `key=value` overrides.

    Raises ConfigError for a missing file, broken YAML, an unknown key or a wrong value.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"config file {path} does not exist; give a YAML file, see configs/")
    bad = [item for item in overrides if "=" not in item]
    if bad:
        raise ConfigError(f"override {bad[0]!r} is not key=value; write for example optim.lr=1e-4")
    try:
        tree = OmegaConf.merge(
            {"run_dir": f"runs/{path.stem}"},
            OmegaConf.load(path),
            OmegaConf.from_dotlist([_yaml_number(item) for item in overrides]),
        )
        plain = OmegaConf.to_container(tree, resolve=True)
    except (OmegaConfBaseException, ValueError, OSError) as error:
        raise ConfigError(f"{path} with {overrides} is not readable: {error}") from error
    except Exception as error:
        if type(error).__module__.startswith("yaml"):
            raise ConfigError(f"{path} or an override is not YAML: {error}") from error
        raise
    return validate(plain)


def _yaml_number(item: str) -> str:
    """Why: YAML 1.1 reads 1e-4 as a string; a number needs a point before the exponent."""
    key, value = item.split("=", 1)
    mantissa, mark, exponent = value.partition("e")
    if mark and mantissa.lstrip("+-").isdigit() and exponent.lstrip("+-").isdigit():
        value = f"{mantissa}.0e{exponent}"
    return f"{key}={value}"


def validate(tree: Any) -> Config:
    """Builds the Config from plain dicts. Raises ConfigError naming each bad key."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(dict(e)) for e in error.errors())) from error


def part(model: type[T], tree: dict[str, Any]) -> T:
    """Builds one part from plain values. Raises ConfigError naming each bad key."""
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(dict(e)) for e in error.errors())) from error


def _explain(error: dict[str, Any]) -> str:
    tags = {"dit", "dit-moe", "udit", "ddpm", "flow", "constant", "cosine", "wsd"}
    parts = [str(p) for p in error["loc"]]
    where = ".".join(p for i, p in enumerate(parts) if not (i and p in tags)) or "config"
    if error["type"] == "extra_forbidden":
        known = _keys(Config, parts[:-1])
        close = difflib.get_close_matches(parts[-1], known, n=1)
        hint = f'did you mean "{close[0]}"?' if close else f"known keys: {', '.join(sorted(known))}"
        return f"unknown key {where}: {hint}"
    if error["type"] == "missing":
        return f"{where} is missing; set it in the YAML file or as {where}=…"
    message = str(error["msg"]).removeprefix("Value error, ")
    if error["type"] == "value_error":
        return f"{where}: {message}" if parts else message
    return f"{where} = {error['input']!r}: {message[0].lower()}{message[1:]}; change {where}"


def _keys(model: Any, path: list[str]) -> list[str]:
    """Field names of the model at `path`; tags of unions in the path choose their member."""
    for depth, part in enumerate(path):
        fields = getattr(model, "model_fields", {})
        if part not in fields:
            continue
        members = _members(fields[part].annotation)
        chosen = path[depth + 1] if depth + 1 < len(path) else None
        model = next((m for m in members if _tag(m) == chosen), members[0] if members else model)
    return list(getattr(model, "model_fields", {}))


def _members(annotation: Any) -> list[type[BaseModel]]:
    if get_origin(annotation) in (Union, types.UnionType) or hasattr(annotation, "__metadata__"):
        return [m for part in get_args(annotation) for m in _members(part)]
    is_model = isinstance(annotation, type) and issubclass(annotation, BaseModel)
    return [annotation] if is_model else []


def _tag(model: type[BaseModel]) -> Any:
    for name in ("family", "kind"):
        if name in model.model_fields:
            return model.model_fields[name].default
    return None


def check_batch(cfg: Config, sizes: Degrees) -> None:
    """Raises ConfigError if the global batch does not split evenly over ranks and micro-batches."""
    whole = sizes.data * cfg.accum
    got = cfg.data.global_batch
    if got % whole:
        good = max(whole, round(got / whole) * whole)
        raise ConfigError(
            f"data.global_batch={got} must be a multiple of data ranks·accum = "
            f"{sizes.data}·{cfg.accum} = {whole}; set data.global_batch={good} or change accum"
        )


def to_yaml(cfg: Config) -> str:
    return OmegaConf.to_yaml(OmegaConf.create(cfg.model_dump(mode="json")))


