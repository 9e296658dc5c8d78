"""Weights of a checkpoint as files for other programs: safetensors, or a diffusers directory.

One process; no more than one part of the output is in memory. The directory appears whole or not at
all.
"""

import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from parallel import storage
from pretrain.holding import Holding
from pretrain.layouts import diffusers_dit, official, rules
from pretrain.layouts.rules import Layout, WeightsError
from pretrain.models.dit import DiTConfig
from pretrain.weights import groups, write

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def export(
    place: Path,
    to: str,
    *,
    weights: str = "ema",
    names: str = "official",
    out: Path | None = None,
    dtype: str = "fp32",
    shard_gb: float = 4.0,
) -> list[str]:
    """Writes a directory with the weights of one average; what was written, in lines.

    to: safetensors | diffusers. names: official (our own where there is no published form of the
    model) | own. out: by default in the run's `export`. Raises WeightsError for what cannot be,
    CheckpointError or DamagedError where there is nothing to read.
    """
    _check_choice("--to", to, ("safetensors", "diffusers"))
    _check_choice("--names", names, ("official", "own"))
    _check_choice("--dtype", dtype, tuple(DTYPES))
    if shard_gb <= 0:
        raise WeightsError(f"--shard-gb {shard_gb}: give more than 0")
    held = Holding.of(place)
    held.at(weights)
    target = out or _default(held.folder, weights, to)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise WeightsError(f"{target} exists; give another --out, or remove it")
    limit = int(shard_gb * 1e9)
    if to == "diffusers":
        return _whole(target, lambda folder: _diffusers(held, weights, folder, dtype, limit))
    return _whole(target, lambda folder: _safetensors(held, weights, names, folder, dtype, limit))


def _safetensors(
    held: Holding, weights: str, names: str, folder: Path, dtype: str, limit: int
) -> list[str]:
    layout, other = official.layout_of(held.model)
    said = []
    if names == "official" and other:
        names = "own"
        said = [f"names are our own: no published {held.model.family} has {', '.join(other)}"]
    if names == "own":
        layout = official.own(held.model)
    facts = _facts(held, weights) | {"names": names}
    files = _write(held, layout, weights, folder, "model", dtype, limit, facts)
    return [f"{len(files)} file{'s' * (len(files) > 1)}, {names} names, {dtype}, {weights}", *said]


def _diffusers(held: Holding, weights: str, folder: Path, dtype: str, limit: int) -> list[str]:
    cfg = held.model
    other = diffusers_dit.unlike(cfg)
    if other or not isinstance(cfg, DiTConfig):
        raise WeightsError(
            f"diffusers has a class for plain DiT only, without {', '.join(other)}; "
            "use --to safetensors"
        )
    layout = diffusers_dit.rules(cfg)
    facts = _facts(held, weights)
    _write(held, layout, weights, folder, diffusers_dit.STEM, dtype, limit, facts)
    (folder / "config.json").write_text(json.dumps(diffusers_dit.config(cfg), indent=2) + "\n")
    if cfg.sinusoid_shift:
        return ["load it with diffusers.DiTTransformer2DModel.from_pretrained(DIRECTORY)"]
    shutil.copyfile(diffusers_dit.CODE, folder / diffusers_dit.CODE.name)
    return [
        "load it with diffusers.AutoModel.from_pretrained(DIRECTORY, trust_remote_code=True); "
        "DiTTransformer2DModel itself loads it too, but has time frequencies 10000^(-i/127) for "
        "the published 10000^(-i/128), which only a model trained with model.sinusoid_shift=1 has"
    ]


def _facts(held: Holding, weights: str) -> dict[str, str]:
    return {
        "family": held.model.family,
        "weights": weights,
        "step": str(held.step),
        "config": json.dumps(held.manifest["config"]),
    }


def _write(
    held: Holding,
    layout: Layout,
    weights: str,
    folder: Path,
    stem: str,
    dtype: str,
    limit: int,
    facts: dict[str, str],
) -> list[str]:
    expected = rules.keys(layout, held.shapes)
    stream = _stream(held, layout, weights)
    return write(folder, stem, stream, expected, DTYPES[dtype], limit, facts)


def _stream(held: Holding, layout: Layout, weights: str) -> Iterator[tuple[str, Tensor]]:
    """Their keys and tensors in order of the layout, read some rules at a time."""
    stored = held.at(weights)
    numbers = {name: math.prod(shape) for name, shape in held.shapes.items()}
    sizes = {i: 4 * sum(numbers[n] for n in rule.ours) for i, rule in enumerate(layout)}
    for chosen in groups(sizes):
        ours = [stored[name] for i in chosen for name in layout[i].ours]
        full = storage.read_alone(ours, held.folder)
        for i in chosen:
            rule = layout[i]
            tensors = rule.write([full[stored[name]] for name in rule.ours])
            yield from zip(rule.theirs, tensors, strict=True)


def _whole(target: Path, fill: Callable[[Path], list[str]]) -> list[str]:
    """Has a new directory filled under another name, then gives it its own."""
    partial = target.with_name(f".{target.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        said = fill(partial)
        partial.replace(target)
    except OSError as error:
        raise WeightsError(f"{target} cannot be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    first, *more = said
    return [f"{target}: {first}", *more]


def _default(folder: Path, weights: str, to: str) -> Path:
    """In the directory of the run, if the checkpoint lies in one."""
    inside = folder.parent.name == "checkpoints"
    home = folder.parent.parent if inside else folder.parent
    return home / "export" / f"{folder.name}-{weights}-{to}"


def _check_choice(option: str, came: str, choices: tuple[str, ...]) -> None:
    if came not in choices:
        raise WeightsError(f"{option} {came}: use one of {', '.join(choices)}")
