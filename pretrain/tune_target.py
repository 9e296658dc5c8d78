"""What a sweep found, written for the run it was made for: configs/X_tuned.yaml beside X.yaml."""

import shlex
from collections.abc import Iterator, Mapping
from datetime import date
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from pretrain import config
from pretrain.manifest import write_whole
from pretrain.models.mup import check_family
from pretrain.provenance import TuningConfig
from pretrain.run import commit
from pretrain.tune import Sweep
from pretrain.tune_search import Point, TuneError

# Beside the model: what a best value depends on.
_ALIKE = ("objective", "optim", "schedule.kind", "clip", "data.global_batch")


def check(sweep: Sweep, target: Path) -> Path:
    """The file that would be written.

    Raises ConfigError, TuneError or MupError, before anybody waits for trials, if what the proxies
    tell does not hold for the target, or if the file is there and not this sweep's.
    """
    if sweep.base.parametrisation != "mup":
        raise TuneError(
            f"{sweep.search.path} has parametrisation=standard, under which no best value carries "
            "over to another width; set parametrisation=mup, or leave --target out"
        )
    tuned = target.with_name(f"{target.stem}_tuned.yaml")
    for trial in sweep.firsts:
        filled, ours = _filled(sweep, target, trial.point), trial.cfg.model
        # why: in another family the proxy's base width is already wrong, and would be what is told.
        theirs = config.validate({**filled, "parametrisation": "standard"}).model
        check_family(ours, theirs.model_copy(update={"mup": ours.mup}))
        config.validate(filled)
    if tuned.exists():
        tuning = config.load(tuned, []).tuning
        if tuning is None or Path(tuning.sweep) != sweep.search.out:
            raise TuneError(
                f"{tuned} is there, and not from {sweep.search.out}; move it away, or give another "
                "--target"
            )
    return tuned


def write(sweep: Sweep, target: Path, found: dict[str, Any], command: list[str]) -> Path | None:
    """The target with the best point of the widest proxy, muP, and where that comes from.

    found: all of a sweep that is complete. None: every trial of the widest proxy diverged, so there
    is nothing to write.
    """
    tuned, spaces, verdict = check(sweep, target), sweep.search.spaces, found["verdict"]
    best = max(verdict["best"], key=lambda row: row["width"])
    if best["loss"] is None:
        return None
    tree = _filled(sweep, target, tuple(best["values"].values()))
    tree.pop("run_dir", None)
    tree["tuning"] = TuningConfig(
        proxy=str(sweep.search.path),
        overrides=sweep.search.overrides,
        sweep=str(sweep.search.out),
        parameters={one.key: one.text for one in spaces},
        values=best["values"],
        widths=sweep.search.widths,
        loss=best["loss"],
        seeds=best["seeds"],
        spread=best["spread"],
        at_edge=best["at_edge"],
        transfers=verdict["transfers"],
        trials=len(found["trials"]),
        diverged=found["counts"].get("diverged", 0),
        flops=found["flops"],
        date=date.today().isoformat(),
        commit=commit(),
    ).model_dump(mode="json")
    head = (
        f"{target.name} under muP, with what was best for {sweep.search.path.name}.",
        *_doubts(sweep, target, verdict),
        "",
        f"    pretrain train {tuned}",
        "",
        "Written by:",
        f"    pretrain {shlex.join(command)}",
        "",
        f"Hardware: as {target.name} says. Hours and result: not measured.",
    )
    lines = "".join(f"# {line}".rstrip() + "\n" for line in head)
    write_whole(tuned, lines + OmegaConf.to_yaml(OmegaConf.create(tree)))
    config.load(tuned, [])
    return tuned


def _doubts(sweep: Sweep, target: Path, verdict: Mapping[str, Any]) -> Iterator[str]:
    """What speaks against carrying the best values over."""
    if verdict["transfers"] is False:
        yield f"CAUTION: between the proxies the best value moved by {verdict['moves']} steps."
    elif verdict["transfers"] is None:
        yield "CAUTION: these proxies do not tell whether it transfers."
    edges = {key for row in verdict["best"] for key in row["at_edge"]}
    if edges:
        yield f"CAUTION: best at the end of what was tried: {', '.join(sorted(edges))}."
    searched = {one.key for one in sweep.search.spaces}
    ours, theirs = (_leaves(one.model_dump()) for one in (sweep.base, config.load(target, [])))
    for key in sorted(ours.keys() | theirs.keys()):
        alike = any(key == part or key.startswith(f"{part}.") for part in _ALIKE)
        if alike and key not in searched and ours.get(key) != theirs.get(key):
            yield f"CAUTION: {key} is {ours.get(key)} in the proxy and {theirs.get(key)} here."


def _leaves(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        inner = isinstance(value, dict)
        found |= _leaves(value, f"{prefix}{key}.") if inner else {prefix + key: value}
    return found


def _filled(sweep: Sweep, target: Path, point: Point) -> dict[str, Any]:
    """The target's own keys, with the proxy's muP and a point of the search, read as a trial's."""
    mup = sweep.base.model.mup
    assert mup is not None, "a proxy under muP states its base width"
    words = ["parametrisation=mup"]
    for key, value in mup.model_dump().items():
        words.append(f"model.mup.{key}={'null' if value is None else value}")
    searched = [one.key for one in sweep.search.spaces]
    words += [f"{key}={value}" for key, value in zip(searched, point, strict=True)]
    return {**config.read(target, words), "run_dir": f"runs/{target.stem}_tuned"}
