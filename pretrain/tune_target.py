"""What a sweep found, written for the run it was made for: configs/X_tuned.yaml beside X.yaml."""

import shlex
from datetime import date
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from pretrain import config
from pretrain.manifest import write_whole
from pretrain.models.mup import check_family
from pretrain.provenance import TuningConfig
from pretrain.run import commit
from pretrain.tune import Sweep
from pretrain.tune_search import Point, TuneError


def check(sweep: Sweep, target: Path) -> Path:
    """The file that would be written.

    Raises TuneError or MupError, before anybody waits for trials, if what the proxies tell does not
    hold for the target, or if the file is there and not this sweep's.
    """
    if sweep.base.parametrisation != "mup":
        raise TuneError(
            f"{sweep.search.path} has parametrisation=standard, under which no best value carries "
            "over to another width; set parametrisation=mup, or leave --target out"
        )
    tuned = target.with_name(f"{target.stem}_tuned.yaml")
    first = sweep.trials()[0].point
    check_family(sweep.base.model, config.validate(_filled(sweep, target, first)).model)
    if tuned.exists():
        theirs = config.load(tuned, []).tuning
        if theirs is None or Path(theirs.sweep) != sweep.search.out:
            raise TuneError(
                f"{tuned} is there, and not from {sweep.search.out}; move it away, or give another "
                "--target"
            )
    return tuned


def write(sweep: Sweep, target: Path, found: dict[str, Any], command: list[str]) -> Path:
    """The target with the best point of the widest proxy, muP, and where that comes from.

    found: all of a sweep that is complete. Raises TuneError if every trial there diverged.
    """
    tuned, spaces = check(sweep, target), sweep.search.spaces
    best = max(found["verdict"]["best"], key=lambda row: row["width"])
    if best["loss"] is None:
        raise TuneError(f"every trial of width {best['width']} diverged: there is nothing to write")
    tree = _filled(sweep, target, tuple(best["values"].values()))
    tree.pop("run_dir", None)
    tree["tuning"] = TuningConfig(
        proxy=str(sweep.search.path),
        sweep=str(sweep.search.out),
        parameters={one.key: one.text for one in spaces},
        values=best["values"],
        widths=sweep.search.widths,
        seeds=sweep.search.seeds,
        trials=len(found["trials"]),
        diverged=found["counts"].get("diverged", 0),
        flops=found["flops"],
        date=date.today().isoformat(),
        commit=commit(),
    ).model_dump(mode="json")
    head = (
        f"{target.name} under muP, with what was best for {sweep.search.path.name}.",
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


def _filled(sweep: Sweep, target: Path, point: Point) -> dict[str, Any]:
    """The target's own keys, with a point of the search and the proxy's muP."""
    config.load(target, [])
    tree = OmegaConf.load(target)
    assert isinstance(tree, DictConfig)
    mup = sweep.base.model.mup
    assert mup is not None, "a proxy under muP states its base width"
    OmegaConf.update(tree, "parametrisation", "mup")
    OmegaConf.update(tree, "model.mup", mup.model_dump(exclude_defaults=True), merge=False)
    for one, value in zip(sweep.search.spaces, point, strict=True):
        OmegaConf.update(tree, one.key, value)
    plain = OmegaConf.to_container(tree, resolve=True)
    assert isinstance(plain, dict)
    return {"run_dir": f"runs/{target.stem}_tuned"} | {str(k): v for k, v in plain.items()}
