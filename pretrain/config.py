"""Config: one frozen tree that composes the parts' own configs, read from YAML and dot-lists.

Only `train.py` and the commands see the root; every part gets its own branch.
"""

import difflib
import types
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import (
    BaseModel,
    ConfigDict,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from data_pipeline.loader import LoaderConfig
from parallel.fp8.recipes import FP8Config
from parallel.mesh import Degrees, MeshConfig
from parallel.precision import Precision
from parallel.remat import RematConfig
from pretrain.ema import EMAConfig
from pretrain.guard import GuardConfig
from pretrain.manifest import CheckpointConfig
from pretrain.metrics import LogConfig
from pretrain.models.build import ModelConfig
from pretrain.models.mup import at_width
from pretrain.objectives import DDPM, ObjectiveConfig
from pretrain.optim import OptimConfig
from pretrain.parallelize import Compute, EngineName
from pretrain.preview import PreviewConfig
from pretrain.profiling import ProfileConfig
from pretrain.provenance import TuningConfig
from pretrain.schedules import ScheduleConfig

T = TypeVar("T", bound=BaseModel)


class ConfigError(ValueError):
    """What somebody typed is wrong: what came, what was expected, what to change."""


class Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    model: ModelConfig
    objective: ObjectiveConfig
    data: LoaderConfig
    steps: NonNegativeInt  # optimizer updates; 0 only writes what a run starts from
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig
    ema: EMAConfig = EMAConfig()
    guard: GuardConfig = GuardConfig()
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    sample: PreviewConfig = PreviewConfig()
    profile: ProfileConfig = ProfileConfig()
    engine: EngineName = "fsdp2"
    precision: Precision = "fp32"
    fp8: FP8Config = FP8Config()
    remat: RematConfig = RematConfig()
    compile: bool = False  # blocks through torch.compile
    parametrisation: Literal["standard", "mup"] = "standard"
    run_dir: str  # default: runs/NAME of the YAML file
    seed: NonNegativeInt = 0
    accum: PositiveInt = 1  # micro-batches a step
    deterministic: bool = False  # sums over ranks in rank order, whatever the topology
    clip: PositiveFloat | None = 1.0  # largest gradient norm; null: no clipping
    threads: PositiveInt | None = None  # CPU threads a rank; null: its share of the cores
    timeout: PositiveInt = 600  # seconds a collective may take
    tuning: TuningConfig | None = None  # where `pretrain tune` has values from

    @property
    def compute(self) -> Compute:
        """How blocks compute, gathered for `parallelize`."""
        return Compute(self.engine, self.precision, self.remat, self.compile, self.fp8)

    @model_validator(mode="after")
    def _parts_fit(self) -> "Config":
        if isinstance(self.objective, DDPM) and not self.model.learn_sigma:
            raise ValueError(
                "objective.kind=ddpm learns the variance, so the model needs twice the channels; "
                "set model.learn_sigma=true or objective.kind=flow"
            )
        return self

    @model_validator(mode="after")
    def _parametrisation_is_whole(self) -> "Config":
        mup = self.model.mup
        if self.parametrisation == "mup":
            if mup is None:
                raise ValueError(
                    "parametrisation=mup needs model.mup.base_width, the width at which every "
                    "factor is 1, such as that of the proxies; this model has model.width="
                    f"{self.model.width}"
                )
            at_width(self.model, mup.base_width, "model.mup.base_width")
        elif mup is not None:
            if "parametrisation" not in self.model_fields_set:
                raise ValueError(
                    "model.mup is set, and parametrisation is standard, which has no use for it; "
                    "set parametrisation=mup, or say parametrisation=standard"
                )
            # why: so that one override, parametrisation=standard, gives the model as published.
            plain = self.model.model_copy(update={"mup": None})
            return self.model_copy(update={"model": plain})
        return self


def load(path: str | Path, overrides: list[str]) -> Config:
    """Reads one YAML file and applies `key=value` overrides.

    Raises ConfigError for a missing file, broken YAML, an unknown key or a wrong value.
    """
    return validate(read(path, overrides))


def read(path: str | Path, overrides: list[str]) -> dict[str, Any]:
    """The same as plain values, not yet checked."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"config file {path} does not exist; give a YAML file, see configs/")
    with _readable(str(path)):
        tree = OmegaConf.load(path)
    if not isinstance(tree, DictConfig):
        raise ConfigError(f"{path} holds {_short(tree)}, no keys; write KEY: VALUE, see configs/")
    tree = OmegaConf.merge({"run_dir": f"runs/{path.stem}"}, tree)
    for item in overrides:
        if not item.partition("=")[0].strip() or "=" not in item:
            raise ConfigError(f"override {item!r} is not KEY=VALUE; write such as optim.lr=1e-4")
        with _readable(f"override {item!r}"):
            tree = OmegaConf.merge(tree, OmegaConf.from_dotlist([_yaml_number(item)]))
    with _readable(f"the configuration in {path}"):
        plain = OmegaConf.to_container(tree, resolve=True, throw_on_missing=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


@contextmanager
def _readable(what: str) -> Iterator[None]:
    """Turns a complaint of the YAML reader or of OmegaConf into a ConfigError about `what`."""
    try:
        yield
    except (OmegaConfBaseException, ValueError, OSError) as error:
        key = getattr(error, "full_key", None)
        reason = (f"{key}: {error}" if key else str(error)).partition("\n")[0]
        raise ConfigError(f"{what} cannot be read: {reason}; correct it") from error
    except Exception as error:
        if not type(error).__module__.startswith("yaml"):
            raise
        mark = getattr(error, "problem_mark", None)
        in_file = mark is not None and Path(mark.name).is_file()
        place = f" in line {mark.line + 1}, column {mark.column + 1}" if in_file else ""
        reason = getattr(error, "problem", None) or str(error).partition("\n")[0]
        raise ConfigError(f"{what} is not YAML: {reason}{place}; correct it") from error


def _yaml_number(item: str) -> str:
    """Why: YAML 1.1 reads 1e-4 as a string; a number needs a point before the exponent."""
    key, value = item.split("=", 1)
    mantissa, mark, exponent = value.partition("e")
    if mark and mantissa.lstrip("+-").isdigit() and exponent.lstrip("+-").isdigit():
        value = f"{mantissa}.0e{exponent}"
    return f"{key}={value}"


def validate(tree: Any) -> Config:
    """Builds the Config from plain dicts. Raises ConfigError naming each bad key."""
    return part(Config, tree)


def part(model: type[T], tree: Any) -> T:
    """Builds one part from plain values. Raises ConfigError naming each bad key."""
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        lines = [_explain(model, dict(e)) for e in error.errors(include_url=False)]
        raise ConfigError("\n".join(dict.fromkeys(lines))) from error


# What each of pydantic's type errors wanted, in words for people.
_WANTED = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "text",
    "tuple": "a list",
    "model": "a group of keys",
    "dict": "a group of keys",
}


def _explain(model: type[BaseModel], error: dict[str, Any]) -> str:
    keys, owner = _follow(model, [str(part) for part in error["loc"]])
    where, last, kind = ".".join(keys), keys[-1] if keys else "", error["type"]
    if kind == "extra_forbidden":
        return f"unknown key {where}: {_nearest(last, owner.model_fields)}"
    if kind.startswith("union_tag"):
        return _explain_tag(where, _members(owner.model_fields[last].annotation), error)
    if kind == "missing" and last.isdigit():
        return f"{'.'.join(keys[:-1])}={_short(error['input'])} has too few values; add the others"
    if kind == "missing":
        return f"{where} is missing; set it in the YAML file or as {where}=…"
    message = str(error["msg"]).removeprefix("Value error, ")
    if kind == "value_error":
        return f"{where}: {message}" if where else message
    wanted = _WANTED.get(kind.partition("_")[0])
    must = f"must be {wanted}" if wanted else message.replace("Input should", "must", 1)
    return f"{where}={_short(error['input'])} {must}; change {where}"


def _explain_tag(where: str, members: list[type[BaseModel]], error: dict[str, Any]) -> str:
    """A choice between parts that was not made, or made of none of them."""
    field = error["ctx"]["discriminator"].strip("'")
    tags = [str(_tag(member)) for member in members]
    if error["type"] == "union_tag_not_found":
        return f"{where}.{field} is missing; set it to one of {', '.join(tags)}"
    came = str(error["ctx"]["tag"])
    return f"{where}.{field}={came} is not known: {_nearest(came, tags)}"


def _nearest(word: str, known: Iterable[str]) -> str:
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1)
    return f'did you mean "{close[0]}"?' if close else f"use one of {', '.join(known)}"


def _short(value: Any) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _follow(part: type[BaseModel], path: list[str]) -> tuple[list[str], type[BaseModel]]:
    """The keys as a person types them, and the part that holds the last of them.

    Why: pydantic puts the tag of the chosen member of a union into the path.
    """
    keys: list[str] = []
    steps = iter(path)
    for key in steps:
        keys.append(key)
        field = part.model_fields.get(key)
        members = _members(field.annotation) if field else []
        tag = next(steps, None) if len(members) > 1 else None
        part = next((m for m in members if len(members) == 1 or _tag(m) == tag), part)
    return keys, part


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
