"""Published weights as the start of a run: a run directory with a checkpoint at step 0.

Everything that does not match is named before a byte is written. No code of the file is run.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from data_pipeline import loader
from data_pipeline.shards import Manifest
from pretrain import config
from pretrain.config import Config
from pretrain.guard import Guard
from pretrain.layouts import official, rules
from pretrain.layouts.rules import Layout, WeightsError
from pretrain.manifest import root, stored, write_alone, write_whole
from pretrain.preflight import identity
from pretrain.weights import Weights, open_weights

# why: the authors' code adds the small kernels to the large one in place when it evaluates, and a
# file saved then has the keys and shapes of a good one.
_UDIT_TRAP = (
    "a U-DiT saved by its authors' code after evaluating has merged kernels, and no file shows it; "
    "look at samples before training goes on"
)
# What the published models were trained on, where no data set tells: latents of Stable Diffusion.
_VAE = "stabilityai/sd-vae-ft-ema"
_VAE_CHANNELS, _VAE_FACTOR, _VAE_SCALE = 4, 8, 0.18215


def import_weights(
    file: Path, family: str, *, path: Path | None, out: Path | None, overrides: list[str]
) -> list[str]:
    """Writes a run directory from a weight file; what was done and assumed, in lines.

    path: of the configuration; without one it is told by the file. out: by default runs/ and the
    file's stem. Raises WeightsError for weights that do not fit, ConfigError, DataError or
    CheckpointError.
    """
    official.check_family(family)
    weights = open_weights(file)
    folder = out or Path("runs") / file.name.partition(".")[0]
    if stored(folder):
        raise WeightsError(f"{folder} holds checkpoints already; give another --out")
    cfg, said = _config(weights, family, path, overrides, folder)
    layout = _layout(cfg, weights)
    shapes, trained = official.shapes_of(cfg.model)
    advice = "give the --config that the weights were trained with, or KEY=VALUE such as model.size"
    rules.check(rules.keys(layout, shapes), weights.shapes, str(weights.path), advice)
    for rule in layout:
        if not rule.ours:  # why: only compared, so before anything is written
            rule.read([_read(weights, key) for key in rule.theirs])
    latents, where = _latents(cfg, given=path is not None)
    facts = {
        **identity(cfg, None),
        "latents": latents.model_dump(mode="json") | {"splits": {}},
        "config": cfg.model_dump(mode="json"),
    }
    tensors = _tensors(cfg, layout, weights, trained)
    write_alone(root(folder) / f"step_{0:08d}", tensors, _scalars(cfg.seed), facts)
    write_whole(folder / "config.yaml", config.to_yaml(cfg))
    write_whole(folder / "latest", "0\n")
    under = f" under {weights.under!r}" if weights.under else ""
    return [
        f"{folder}: {len(weights.shapes)} tensors of {weights.path}{under}",
        f"latents: {where}",
        *said,
        *[_UDIT_TRAP] * (family == "udit" and _stated(weights) is None),
    ]


def _config(
    weights: Weights, family: str, path: Path | None, overrides: list[str], folder: Path
) -> tuple[Config, list[str]]:
    """The configuration, and what was assumed of it."""
    if path is not None:
        cfg = config.load(path, [*overrides, f"run_dir={folder}"])
        if cfg.model.family != family:
            raise WeightsError(
                f"--family {family}, but {path} has model.family={cfg.model.family}; "
                "change one of the two"
            )
        return cfg, []
    model, assumed = _told(weights, family, _keys(overrides))
    tree: dict[str, Any] = {
        "model": model,
        "objective": {"kind": "ddpm" if model.get("learn_sigma", True) else "flow"},
        "data": {"path": "data/none", "global_batch": 256},
        "steps": 0,
        "schedule": {"kind": "constant"},
        "run_dir": str(folder),
    }
    stated = _stated(weights)
    if stated is not None:
        tree |= {key: stated[key] for key in ("objective", "parametrisation")}
    elif not any(key.startswith("objective") for key in _keys(overrides)):
        assumed.append(f"objective.kind={tree['objective']['kind']}: as published")
    merged = OmegaConf.merge(OmegaConf.create(tree), OmegaConf.from_dotlist(overrides))
    cfg = config.validate(OmegaConf.to_container(merged, resolve=True))
    return cfg, [f"assumed {line}" for line in assumed]


def _keys(overrides: list[str]) -> list[str]:
    for item in overrides:
        if not item.partition("=")[0] or "=" not in item:
            raise WeightsError(f"{item!r} is not KEY=VALUE; write such as model.num_heads=16")
    return [item.partition("=")[0] for item in overrides]


def _told(weights: Weights, family: str, given: list[str]) -> tuple[dict[str, Any], list[str]]:
    """The model's settings from the file's own metadata or its shapes; given: keys of overrides."""
    stated = _stated(weights)
    if stated is not None:
        model = stated["model"]
        if model.get("family") == family:
            return model, []
        raise WeightsError(
            f"{weights.path} says that it is of family {model.get('family')}, not {family}; "
            f"set --family {model.get('family')}"
        )
    guess = official.infer(family, weights.shapes, str(weights.path))
    if "model.head_dim" in given:
        guess.values.pop("num_heads", None)
    elif "num_heads" not in guess.values and "model.num_heads" not in given:
        raise WeightsError(
            f"{weights.path} does not tell the attention heads of width {guess.values['width']}; "
            "give model.num_heads=…"
        )
    values = dict(guess.values)
    size = official.published_size(guess)
    if size is not None and not any(key.startswith("model.") for key in given):
        values["size"] = size  # why: as a configuration that names its size would have it
    assumed = [
        f"model.{key}={_at(guess.values, key)}: {why}"
        for key, why in guess.assumed.items()
        if f"model.{key}" not in given and _at(guess.values, key) is not None
    ]
    return values, assumed


def _stated(weights: Weights) -> dict[str, Any] | None:
    """The configuration that `pretrain export` put into the file, None in files of others."""
    if not {"names", "config"} <= weights.metadata.keys():
        return None
    try:
        tree = json.loads(weights.metadata["config"])
        return {
            "model": dict(tree["model"]),
            "objective": dict(tree["objective"]),
            "parametrisation": tree.get("parametrisation", "standard"),
        }
    except (ValueError, KeyError, TypeError) as error:
        raise WeightsError(
            f"{weights.path} states a configuration that cannot be read ({error!r}); give --config"
        ) from error


def _at(values: Mapping[str, Any], key: str) -> Any:
    first, _, rest = key.partition(".")
    return _at(values[first], rest) if rest else values.get(first)


def _layout(cfg: Config, weights: Weights) -> Layout:
    if weights.metadata.get("names") == "own":
        stated = _stated(weights) or {}
        then, now = stated.get("model", {}).get("mup"), cfg.model.model_dump(mode="json")["mup"]
        if then != now:
            raise WeightsError(
                f"{weights.path} has our own names and weights made with model.mup={then}, which "
                f"mean another model with {now}; leave parametrisation and model.mup as they were"
            )
        return official.own(cfg.model)
    layout, other = official.layout_of(cfg.model)
    if other:
        raise WeightsError(
            f"no published {cfg.model.family} has {', '.join(other)}; leave these settings out to "
            "import, and set them in a run of its own"
        )
    return layout


def _latents(cfg: Config, *, given: bool) -> tuple[Manifest, str]:
    """What latents the model is for: of the data set, else of the published models' autoencoder."""
    model = cfg.model
    if given and Path(cfg.data.path).is_dir():
        manifest = loader.check(
            cfg.data,
            num_classes=model.num_classes,
            channels=model.in_channels,
            input_size=model.input_size,
        )
        return manifest, f"as in {cfg.data.path}"
    if model.in_channels != _VAE_CHANNELS:
        raise WeightsError(
            f"model.in_channels={model.in_channels}, and the autoencoder of the published models "
            f"has {_VAE_CHANNELS}; give --config with data.path of the latents it was trained on"
        )
    side, channels = model.input_size, model.in_channels
    manifest = Manifest(
        codec="kl",
        codec_hash="",
        codec_source=_VAE,
        image_shape=(3, side * _VAE_FACTOR, side * _VAE_FACTOR),
        latent_shape=(channels, side, side),
        stored_shape=(2 * channels, side, side),
        posterior=True,
        dtype="float16",
        shift=[0.0] * channels,
        scale=[_VAE_SCALE] * channels,
        mean=[0.0] * channels,
        std=[1 / _VAE_SCALE] * channels,
        class_names=[str(i) for i in range(model.num_classes)],
        num_classes=model.num_classes,
        lanes=1024,
        flips=False,
        seed=0,
        splits={},
        quarantined=0,
        quarantine=None,
    )
    return manifest, f"of {_VAE} (as published)"


def _scalars(seed: int) -> dict[str, Any]:
    """The clock before the first step."""
    nothing = dict.fromkeys(("step", "position", "skipped", "skipped_in_a_row", "skipped_from"), 0)
    return nothing | {"seed": seed, "passed_over": []}


def _tensors(
    cfg: Config, layout: Layout, weights: Weights, trained: set[str]
) -> Iterator[tuple[str, Tensor]]:
    """All that a fresh training state holds, a rule at a time."""
    yield "optim.updates", torch.zeros(())
    yield "guard.statistics", Guard(cfg.guard, torch.device("cpu")).statistics
    for rule in layout:
        if not rule.ours:
            continue
        read = rule.read([_read(weights, key) for key in rule.theirs])
        for name, tensor in zip(rule.ours, read, strict=True):
            values = tensor.float()
            yield f"model.{name}", values
            if name not in trained:
                continue
            for average in cfg.ema.names:
                yield f"{average}.{name}", values
            for moment in ("exp_avg", "exp_avg_sq"):
                yield f"optim.{moment}.{name}", torch.zeros(()).expand_as(values)


def _read(weights: Weights, key: str) -> Tensor:
    tensor = weights.read(key)
    if not tensor.is_floating_point():
        raise WeightsError(f"{key} is {tensor.dtype}, expected floating-point values")
    return tensor
