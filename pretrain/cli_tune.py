"""`pretrain coord-check` and `tune`: before a rate is carried over to another width."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from parallel import launch
from pretrain import config
from pretrain.benches.record import record
from pretrain.manifest import write_whole
from pretrain.metrics import plain
from pretrain.optim import OptimConfig
from pretrain.run import check_place
from pretrain.showing import AsJson, show

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file, see configs/.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")]


def coord_check(
    path: ConfigPath,
    overrides: Overrides = None,
    widths: Annotated[str, typer.Option(help="1x,2x,4x of the config's, or 96,192,384.")] = "",
    depths: Annotated[str, typer.Option(help="Instead: DiT's depths, such as 4,8,16,32.")] = "",
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    steps: Annotated[int, typer.Option(min=2)] = 8,
    batch: Annotated[int, typer.Option(min=1, help="Random latents, the same at each step.")] = 4,
    lr: Annotated[
        float, typer.Option(help="Not the config's: so large that few steps show.")
    ] = 1e-3,
    out: Annotated[Path | None, typer.Option(help="Directory; default: in run_dir.")] = None,
    as_json: AsJson = False,
) -> None:
    """Whether sizes of activations know the width; draws them. Exit code 1 if they do."""
    from pretrain import coordinates

    cfg = config.load(path, overrides or [])
    if bool(widths) == bool(depths):
        raise config.ConfigError(
            f"--widths {widths!r} and --depths {depths!r}: give one of the two, such as "
            "--widths 1x,2x,4x,8x"
        )
    axis = "width" if widths else "depth"
    members = _of_widths(cfg.model, widths) if widths else _of_depths(cfg.model, depths)
    torch.set_num_threads(cfg.threads or launch.default_threads(launch.Place.here()))
    if not lr > 0:
        raise config.ConfigError(f"--lr {lr:g} must be above 0")
    optim = config.part(OptimConfig, cfg.optim.model_dump() | {"lr": lr})
    how = coordinates.CheckConfig(cfg.objective, optim, cfg.clip, batch, steps, seeds)
    folder = out or Path(cfg.run_dir) / "coord-check"
    check_place(folder)
    sizes, verdicts = coordinates.check(
        members, how, lambda line: print(f"{axis} {line}", file=sys.stderr, flush=True)
    )
    passes = all(verdict.passes for verdict in verdicts)
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{cfg.parametrisation}-{axis}"
    coordinates.draw_sizes(
        folder / f"{stem}.png",
        sizes,
        verdicts,
        axis,
        f"{path.stem}, {cfg.parametrisation}, lr {lr:g}",
    )
    asked = {"steps": steps, "batch": batch, "lr": lr, "seeds": seeds}
    verdict = {"passes": passes, "limit": coordinates.LIMIT, "limit_moved": coordinates.MOVED}
    head = record("coord-check", launch.Place.here()) | asked | {f"{axis}s": list(members)}
    slopes = [asdict(one) for one in verdicts]
    found = head | verdict | {"slopes": slopes, "sizes": [asdict(size) for size in sizes]}
    found |= {"config": cfg.model_dump(mode="json"), "command": sys.argv}
    found = plain(found)
    write_whole(folder / f"{stem}.json", json.dumps(found, indent=1, allow_nan=False))
    brief = {"parametrisation": cfg.parametrisation, f"{axis}s": list(members)} | asked | verdict
    shown = found if as_json else brief | {"picture": str(folder / f"{stem}.png"), "slopes": slopes}
    show(shown, as_json)
    failed = [one.layer for one in verdicts if not one.passes]
    told = f"fails: {', '.join(failed)}" if failed else f"passes: no size knows the {axis}"
    print(told, file=sys.stderr)
    raise typer.Exit(0 if passes else 1)


def tune(
    path: ConfigPath,
    param: Annotated[
        list[str],
        typer.Option("--param", help="optim.lr=log:2^-13..2^-7 | lin:0..1:5 | a,b,c; repeatable."),
    ],
    overrides: Overrides = None,
    widths: Annotated[str, typer.Option(help="1x,2x,4x of the config's, or 24,48,96.")] = "1x",
    seeds: Annotated[int, typer.Option(min=1, help="Of the best points.")] = 1,
    best: Annotated[int, typer.Option(min=1, help="Points a width with further seeds.")] = 3,
    random: Annotated[
        int | None, typer.Option(min=1, help="So many draws, instead of the grid.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the draws.")] = 0,
    budget: Annotated[int | None, typer.Option(min=1, help="Most trials in all.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Trials side by side.")] = 1,
    out: Annotated[Path | None, typer.Option(help="Default: runs/tune_CONFIG.")] = None,
    target: Annotated[
        Path | None, typer.Option(help="Of the same family: writes TARGET_tuned.yaml.")
    ] = None,
    slurm: Annotated[bool, typer.Option("--slurm", help="As a job array, not here.")] = False,
    as_json: AsJson = False,
) -> None:
    """Search on proxies; the same command goes on. Exit code 1 if a trial is without a result."""
    from pretrain import tune_target
    from pretrain.cluster import trials
    from pretrain.tune import Search, Sweep
    from pretrain.tune_search import space

    model = config.load(path, overrides or []).model
    search = Search(
        path=path,
        overrides=tuple(overrides or []),
        spaces=tuple(space(word, grid=random is None) for word in param),
        widths=tuple(sorted(_of_widths(model, widths))),
        out=out or Path("runs") / f"tune_{path.stem}",
        seeds=seeds,
        best=best,
        random=random,
        seed=seed,
        budget=budget,
    )
    sweep = Sweep(search)
    if target is not None:
        tune_target.check(sweep, target)
    if slurm and (pending := sweep.pending()):
        words = {trial.name: trial.words for trial in pending}
        print(trials.hand_over(path, search.overrides, words, search.out))
        return
    if not slurm and not trials.handed_over(search.out):
        known, ended = sweep.trials(), sum(sweep.outcome(t).is_result for t in sweep.trials())
        more = ", then further seeds of the best" if seeds > 1 and not sweep.whole() else ""
        told = f"{len(known)} trials in {search.out}, {ended} have ended{more}"
        print(f"{told}; each writes TRIAL/logs/tune.log", file=sys.stderr, flush=True)
        sweep.run(jobs, lambda trial: _say(sweep, trial))
    _conclude(sweep, target, as_json)


def _say(sweep: Any, trial: Any) -> None:
    """A line on stderr for a trial that has ended; the results so far on the disk."""
    from pretrain import tune_report

    found, outcome = tune_report.save(sweep), sweep.outcome(trial)
    told = f"{outcome.loss:.4f}" if outcome.loss is not None else outcome.reason or "goes on later"
    ended = sum(count for state, count in found["counts"].items() if state != "unfinished")
    line = f"{ended}/{len(found['trials'])} {trial.name}: {outcome.state}, {told}"
    print(line, file=sys.stderr, flush=True)


def _conclude(sweep: Any, target: Path | None, as_json: bool) -> None:
    """Writes and shows what is known; exit code 1 unless every trial has a result."""
    from pretrain import tune_report, tune_target
    from pretrain.cluster import trials

    found, out = tune_report.save(sweep), sweep.search.out
    tune_report.draw(out / tune_report.PICTURE, sweep)
    written = [out / tune_report.RESULTS, out / tune_report.PICTURE]
    show(found if as_json else tune_report.brief(found), as_json)
    print(*written, *tune_report.told(found), sep="\n", file=sys.stderr)
    if not found["complete"]:
        points = out / trials.POINTS
        slurms = f"; {points} leaves them to Slurm, remove it to train them here"
        slurms = slurms if trials.handed_over(out) else ""
        print(f"not all trials have a result, the same command goes on{slurms}", file=sys.stderr)
        raise typer.Exit(1)
    if target is not None:
        tuned = tune_target.write(sweep, target, found, sys.argv[1:])
        said = (
            tuned or f"every trial of width {sweep.search.widths[-1]} diverged: no tuned {target}"
        )
        print(said, file=sys.stderr)
        raise typer.Exit(0 if tuned else 1)


def _of_widths(model: Any, text: str) -> dict[int, Any]:
    """Members of the config's family by width; `2x` is twice the config's. Raises MupError."""
    from pretrain.models.mup import at_width

    found = {}
    for word in text.split(","):
        times = word.endswith("x")
        unit = model.width if times else 1
        width = _whole(word.removesuffix("x"), f"--widths {text}: {word!r}", unit)
        if width in found:
            raise config.ConfigError(f"--widths {text}: {width} is there twice; leave one out")
        found[width] = at_width(model, width, f"--widths {text}: width")
    return found


def _of_depths(model: Any, text: str) -> dict[int, Any]:
    found = {}
    for word in text.split(","):
        depth = _whole(word, f"--depths {text}: {word!r}")
        if not isinstance(model.depth, int):
            raise config.ConfigError(
                f"--depths {text}: the depth of a U-DiT is that of its family; use --widths"
            )
        found[depth] = config.part(type(model), model.model_dump() | {"size": None, "depth": depth})
    return found


def _whole(word: str, what: str, unit: int = 1) -> int:
    """A number of units, which has to make a whole number above 0."""
    try:
        number = float(word) * unit
    except ValueError:
        number = 0.0
    if not (number > 0 and number.is_integer()):
        raise config.ConfigError(
            f"{what} is no whole number above 0; write such as 1x,2x,4x or 96,192"
        )
    return int(number)
