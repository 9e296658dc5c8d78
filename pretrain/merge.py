"""Checkpoints merged into one: a weighted mean, or a power-function average of another length.

One process; some tensors at a time, summed in float64.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from parallel import storage
from parallel.index import INDEX
from pretrain import averaging
from pretrain.holding import RAW, Holding
from pretrain.layouts.rules import WeightsError
from pretrain.manifest import changes_of, stored, write_alone
from pretrain.weights import groups

_POWER = "ema_p"  # what the names of power-function averages begin with
_FACTS = ("model", "objective", "data", "latents", "config")  # of a manifest, beside the state
_SHOWN = 4  # changes named in one message
Part = tuple[Holding, str, float]  # checkpoint, average, factor


def merge(
    places: Sequence[Path],
    out: Path,
    *,
    weights: str | None = None,
    by: str | None = None,
    std: float | None = None,
) -> list[str]:
    """Writes a checkpoint directory whose weights and average are the merge; its parts, in lines.

    A run directory stands for all its whole checkpoints. weights: the average taken out of each
    (default ema). by: factors, such as 1,2,3, one a checkpoint; they are divided by their sum.
    std: relative standard deviation of the average that is rebuilt, as of the newest checkpoint,
    from all power-function averages held. Buffers, the clock and the configuration are the
    newest's; there are no moments, so a run cannot go on from it. Raises WeightsError,
    CheckpointError or DamagedError.
    """
    held = [Holding.of(folder) for place in places for folder in _folders(place)]
    newest = max(held, key=lambda h: h.step)
    for other in held:
        _check_same(newest, other)
    if std is None:
        parts = _mean(held, weights or "ema", by)
    elif weights is None and by is None:
        parts = _rebuilt(held, std)
    else:
        raise WeightsError("--std rebuilds from power-function averages; leave out --weights, --by")
    facts = {name: newest.manifest[name] for name in _FACTS}
    write_alone(out, _tensors(parts, newest), newest.manifest["state"], facts)
    lines = [f"  {factor:+.6f} x {average} of {h.folder}" for h, average, factor in parts]
    return [f"{out}: the sum of", *lines]


def _folders(place: Path) -> list[Path]:
    if (place / INDEX).is_file():
        return [place]
    folders = [f for f in stored(place) if (f / INDEX).is_file()]
    if not folders:
        raise WeightsError(
            f"{place} holds no checkpoint; give run directories with checkpoints/step_*/, "
            "or such step directories"
        )
    return folders


def _check_same(newest: Holding, other: Holding) -> None:
    changes = changes_of("model", other.manifest["model"], newest.manifest["model"])
    if changes:
        raise WeightsError(
            f"{other.folder} holds another model than {newest.folder}: "
            f"{', '.join(changes[:_SHOWN])}; merge checkpoints of one model"
        )


def _mean(held: Sequence[Holding], weights: str, by: str | None) -> list[Part]:
    factors = [1.0] * len(held) if by is None else _numbers(by)
    if len(factors) != len(held):
        raise WeightsError(f"--by {by}: {len(factors)} factors for {len(held)} checkpoints")
    whole = math.fsum(factors)
    if not math.isfinite(whole) or whole == 0:
        raise WeightsError(f"--by {by}: the factors sum to {whole}; give finite ones that do not")
    for one in held:
        one.at(weights)
    return [(one, weights, f / whole) for one, f in zip(held, factors, strict=True)]


def _numbers(text: str) -> list[float]:
    try:
        return [float(item) for item in text.split(",")]
    except ValueError:
        raise WeightsError(f"--by {text}: write factors as 1,2,3") from None


def _rebuilt(held: Sequence[Holding], std: float) -> list[Part]:
    """The sum of snapshots that is nearest to the average of this length."""
    found: list[tuple[Holding, str, int]] = []
    for one in held:
        names = [name for name in one.averages if name.startswith(_POWER)]
        updates = _updates(one) if names else 0
        found += [(one, name, updates) for name in names if updates > 0]
    if not found:
        raise WeightsError(
            "--std needs power-function averages after one update or more, and none of the "
            "checkpoints holds one; train with ema.power=[0.05,0.1]"
        )
    snapshots = [(updates, float(name.removeprefix(_POWER))) for _, name, updates in found]
    target = (max(updates for updates, _ in snapshots), std)
    try:
        factors = averaging.coefficients(snapshots, target)
    except ValueError as error:
        raise WeightsError(f"--std {std:g}: {error}") from error
    return [(one, name, f) for (one, name, _), f in zip(found, factors, strict=True)]


def _updates(held: Holding) -> int:
    """How many updates the optimizer had made."""
    name = "optim.updates"
    if name not in storage.contents(held.folder):
        raise WeightsError(
            f"{held.folder} was merged, so its averages are of no one moment; give checkpoints "
            "that training wrote"
        )
    return int(storage.read_alone([name], held.folder)[name])


def _tensors(parts: Sequence[Part], newest: Holding) -> Iterator[tuple[str, Tensor]]:
    kept = {name: math.prod(shape) for name, shape in newest.shapes.items()}
    sizes = {name: 4 * size for name, size in kept.items() if name in newest.trained}
    for names in groups(sizes):
        totals = {n: torch.zeros(newest.shapes[n], dtype=torch.float64) for n in names}
        for held, average, factor in parts:
            at = held.at(average)
            full = storage.read_alone([at[name] for name in names], held.folder)
            for name, total in totals.items():
                total.add_(full.pop(at[name]), alpha=factor)
        for name in names:
            values = totals.pop(name).float()
            yield f"{RAW}.{name}", values
            yield f"ema.{name}", values
    buffers = [s for n, s in newest.at(RAW).items() if n not in newest.trained]
    yield from storage.read_alone(buffers, newest.folder).items()
