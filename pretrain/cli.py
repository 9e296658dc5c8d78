"""The command line: words to calls. What a command does lives elsewhere; errors of input end here.

Exit codes: 0 ended well, 2 the input is wrong (one message, no traceback), else 1.
"""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from parallel import launch
from pretrain import config
from pretrain.cli_bench import bench
from pretrain.cli_cluster import status, submit
from pretrain.cli_data import data
from pretrain.cli_tune import coord_check, tune
from pretrain.manifest import write_whole
from pretrain.showing import AsJson, show
from pretrain.wrong_input import INPUT_ERRORS

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.add_typer(data, name="data")
app.add_typer(bench, name="bench")
for command in (submit, status, coord_check, tune):
    app.command()(command)

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file, see configs/.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")]
Place = Annotated[Path, typer.Argument(metavar="RUN|CKPT", help="Run or checkpoint directory.")]
Which = Annotated[str, typer.Option("--weights", help="ema | model | another average held.")]


@app.command()
def train(
    path: ConfigPath,
    overrides: Overrides = None,
    nproc: Annotated[int, typer.Option(min=0, help="Local ranks; 0: this process alone.")] = 0,
    health: Annotated[
        Path | None, typer.Option(help="Check the nodes first; a directory for what is wrong.")
    ] = None,
    profile: Annotated[
        str, typer.Option(help="Trace of steps, as 10 or 10-12, in RUN/profile.")
    ] = "",
) -> None:
    """Train. The same command resumes; alone, under torchrun, under srun, or with --nproc."""
    from pretrain import preflight
    from pretrain import train as page
    from pretrain.cluster import health as checks
    from pretrain.foretold import fitting
    from pretrain.shortage import explained

    place = launch.Place.here()
    words = [*(overrides or []), *_traced(profile)]
    cfg = config.load(path, words)
    if nproc and launch.STORE not in os.environ:
        if place.world > 1:
            raise config.ConfigError(
                f"--nproc {nproc} starts ranks by itself, but {place.world} were started already "
                "by torchrun or srun; leave --nproc out"
            )
        preflight.preflight(cfg, nproc)
        command = [sys.executable, "-m", "pretrain", "train", str(path), *words]
        raise typer.Exit(launch.spawn(command, nproc))
    launch.die_with_parent()
    if health is None:
        preflight.preflight(cfg, place.world)
    with launch.guarded(INPUT_ERRORS):
        if health is not None and not checks.fit(cfg, health):
            raise SystemExit(1)
        with explained(Path(cfg.run_dir), place.rank, lambda: fitting(cfg, place.world)):
            page.train(cfg)


def _traced(steps: str) -> list[str]:
    """The overrides that `--profile FIRST-LAST` stands for. Raises ConfigError."""
    first, dash, last = steps.partition("-")
    if steps and not (first.isdecimal() and (last.isdecimal() or not dash)):
        raise config.ConfigError(f"--profile {steps}: expected a step, or two as 10-12")
    return [f"profile.first={first}", f"profile.last={last or first}"] if steps else []


@app.command()
def plan(
    path: ConfigPath,
    overrides: Overrides = None,
    gpus: Annotated[int, typer.Option(min=0, help="Ranks; 0: as the mesh says.")] = 0,
    device: Annotated[str, typer.Option(help="a100 | h100 | h200 | b200 | cpu | …")] = "h100",
    price: Annotated[float | None, typer.Option(help="What a GPU hour costs.")] = None,
    links: Annotated[
        Path | None, typer.Option(help="What the site reaches; default: its links.json.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Parameters, FLOPs, bytes per rank, hours and cost of a run, before anybody pays for it; with
    --gpus also the layouts that fit, best first."""
    from pretrain.planning import planned, screen

    cfg = config.load(path, overrides or [])
    found = planned.of(cfg, gpus, device, links, price, search=gpus > 0)
    show(found, as_json=True) if as_json else screen.show(found, name=path.stem)


@app.command()
def sample(
    place: Place,
    out: Annotated[Path | None, typer.Option(help="PNG; default: RUN/samples/sample.png")] = None,
    labels: Annotated[str, typer.Option(help="Classes, 3,1,4 or 0-9; default: all")] = "",
    per_class: Annotated[int, typer.Option(min=1, help="Pictures of each class.")] = 8,
    sampler: Annotated[str | None, typer.Option(help="ddpm | ddim | euler | heun")] = None,
    steps: Annotated[int | None, typer.Option(min=1)] = None,
    guidance: Annotated[float | None, typer.Option(help="1: none.")] = None,
    guidance_channels: Annotated[
        str | None, typer.Option(help="all | 3 (as DiT published)")
    ] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    weights: Which = "ema",
) -> None:
    """Draw pictures from a trained model."""
    from pretrain import pictures, trained

    opened = trained.Trained.load(place, weights)
    cfg = opened.sampling(
        sampler=sampler,
        steps=steps,
        guidance=guidance,
        guidance_channels=3 if guidance_channels == "3" else guidance_channels,
    )
    classes = trained.parse_labels(labels, opened.latents.num_classes)
    images = opened.draw(classes.repeat_interleave(per_class), cfg, seed)
    target = out or opened.folder.parent.parent / "samples" / "sample.png"
    print(pictures.save(target, images, columns=per_class))


@app.command(name="eval")
def evaluate(
    place: Place,
    count: Annotated[int, typer.Option(min=2, help="Pictures, in equal numbers a class.")] = 500,
    data_path: Annotated[str | None, typer.Option("--data", help="Shards of real images.")] = None,
    sampler: Annotated[str | None, typer.Option(help="ddpm | ddim | euler | heun")] = None,
    steps: Annotated[int | None, typer.Option(min=1)] = None,
    guidance: Annotated[float | None, typer.Option(help="1: none.")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    weights: Which = "ema",
    out: Annotated[Path | None, typer.Option(help="JSON file for the scores.")] = None,
    as_json: AsJson = False,
) -> None:
    """Score samples: class agreement and Fréchet distance on a small classifier's features."""
    from pretrain import trained

    opened = trained.Trained.load(place, weights)
    cfg = opened.sampling(sampler=sampler, steps=steps, guidance=guidance)
    scores, _ = opened.score(cfg, count=count, seed=seed, data=data_path)
    found = {"checkpoint": str(opened.folder), "step": opened.step, **asdict(scores)}
    if out is not None:
        write_whole(out, json.dumps(found, indent=1))
    show(found, as_json)


@app.command()
def inspect(
    places: Annotated[list[Path], typer.Argument(metavar="RUN|CKPT...")],
    digest: Annotated[bool, typer.Option(help="One SHA-256 per full logical tensor.")] = False,
    diff: Annotated[bool, typer.Option(help="How two differ; exit code 1 if they do.")] = False,
    as_json: AsJson = False,
) -> None:
    """What is in a checkpoint, or with --diff how two differ."""
    from pretrain import inspection

    if len(places) != 1 + diff or (diff and digest):
        raise config.ConfigError(
            f"{len(places)} places given; inspect takes one, or two with --diff (no --digest then)"
        )
    if not diff:
        return show(inspection.contents(places[0], digest=digest), as_json)
    report = inspection.differences(places[0], places[1])
    show(report, as_json)
    raise typer.Exit(0 if report["same"] else 1)


@app.command(name="import")
def import_(
    file: Annotated[Path, typer.Argument(help=".safetensors, its index, .pt or .pth")],
    family: Annotated[str, typer.Option(help="dit | dit-moe | udit")],
    overrides: Overrides = None,
    path: Annotated[
        Path | None, typer.Option("--config", help="YAML file; default: told by the file.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Run directory; default: runs/FILE.")] = None,
) -> None:
    """Published weights to a run directory: sampled, exported or trained from like any other."""
    from pretrain import imports

    print(
        *imports.import_weights(file, family, path=path, out=out, overrides=overrides or []),
        sep="\n",
    )


@app.command()
def export(
    place: Place,
    to: Annotated[str, typer.Option(help="safetensors | diffusers (plain DiT)")],
    weights: Which = "ema",
    names: Annotated[str, typer.Option(help="official (where published) | own")] = "official",
    out: Annotated[Path | None, typer.Option(help="Directory; default: RUN/export/…")] = None,
    dtype: Annotated[str, typer.Option(help="fp32 | bf16")] = "fp32",
    shard_gb: Annotated[float, typer.Option(help="Largest file, in GB.")] = 4.0,
) -> None:
    """Weights of a checkpoint for other programs."""
    from pretrain import export as exporting

    lines = exporting.export(
        place, to, weights=weights, names=names, out=out, dtype=dtype, shard_gb=shard_gb
    )
    print(*lines, sep="\n")


@app.command()
def merge(
    places: Annotated[list[Path], typer.Argument(metavar="RUN|CKPT...")],
    out: Annotated[Path, typer.Option(help="Checkpoint directory to write.")],
    weights: Annotated[str | None, typer.Option(help="ema (default) | model | …")] = None,
    by: Annotated[str | None, typer.Option(help="Factors 1,2,3; default: equal.")] = None,
    std: Annotated[
        float | None, typer.Option(help="Rebuild the average of this relative length.")
    ] = None,
) -> None:
    """The mean of checkpoints, or a power-function average of another length."""
    from pretrain import merge as merging

    print(*merging.merge(places, out, weights=weights, by=by, std=std), sep="\n")


def main() -> None:
    """Entry point of `pretrain` and `python -m pretrain`."""
    try:
        app()
    except INPUT_ERRORS as error:
        # why: until the ranks have met, all of them find the same mistake and one says it. Later it
        # can be of one rank alone, such as a damaged sample in its share.
        if launch.Place.here().rank == 0 or launch.joined():
            print(f"pretrain: {error}", file=sys.stderr)
        sys.exit(2)
