"""The command line: words to calls. What a command does lives elsewhere; errors of input end here.

Exit codes: 0 ended well, 2 the input is wrong (one message, no traceback), else 1.
"""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from data_pipeline.errors import DataError
from parallel import launch
from parallel.errors import DamagedError, LayoutError
from pretrain import config
from pretrain.evaluate import EvaluationError
from pretrain.layouts.rules import WeightsError
from pretrain.manifest import CheckpointError
from pretrain.metrics import LogError
from pretrain.run import RunError
from pretrain.sampling import SamplingError

INPUT_ERRORS = (
    config.ConfigError,
    LayoutError,
    DataError,
    DamagedError,
    CheckpointError,
    WeightsError,
    SamplingError,
    EvaluationError,
    LogError,
    RunError,
)

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
data = typer.Typer(no_args_is_help=True, help="Images to shards, and what is in them.")
app.add_typer(data, name="data")
bench = typer.Typer(
    no_args_is_help=True, help="Parts of the program beside what the machine gives."
)
app.add_typer(bench, name="bench")

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file, see configs/.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")]
Place = Annotated[Path, typer.Argument(metavar="RUN|CKPT", help="Run or checkpoint directory.")]
Which = Annotated[str, typer.Option("--weights", help="ema | model | another average held.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def train(
    path: ConfigPath,
    overrides: Overrides = None,
    nproc: Annotated[int, typer.Option(min=0, help="Local ranks; 0: this process alone.")] = 0,
) -> None:
    """Train. The same command resumes; alone, under torchrun, under srun, or with --nproc."""
    from pretrain import preflight
    from pretrain import train as page

    place = launch.Place.here()
    cfg = config.load(path, overrides or [])
    if nproc and launch.STORE not in os.environ:
        if place.world > 1:
            raise config.ConfigError(
                f"--nproc {nproc} starts ranks by itself, but {place.world} were started already "
                "by torchrun or srun; leave --nproc out"
            )
        preflight.preflight(cfg, nproc)
        command = [sys.executable, "-m", "pretrain", "train", str(path), *(overrides or [])]
        raise typer.Exit(launch.spawn(command, nproc))
    launch.die_with_parent()
    preflight.preflight(cfg, place.world)
    with launch.guarded(INPUT_ERRORS):
        page.train(cfg)


@app.command()
def plan(
    path: ConfigPath,
    overrides: Overrides = None,
    gpus: Annotated[int, typer.Option(min=0, help="Ranks; 0: as the mesh says.")] = 0,
    device: Annotated[str, typer.Option(help="h100 | h200 | cpu")] = "h100",
    as_json: AsJson = False,
) -> None:
    """Parameters, FLOPs and bytes per rank of a run, before anybody pays for it."""
    from pretrain import planned

    _show(planned.of(config.load(path, overrides or []), gpus, device), as_json)


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
    as_json: AsJson = False,
) -> None:
    """Score samples: class agreement and Fréchet distance on a small classifier's features."""
    from pretrain import trained

    opened = trained.Trained.load(place, weights)
    cfg = opened.sampling(sampler=sampler, steps=steps, guidance=guidance)
    scores, _ = opened.score(cfg, count=count, seed=seed, data=data_path)
    _show({"checkpoint": str(opened.folder), "step": opened.step, **asdict(scores)}, as_json)


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
        return _show(inspection.contents(places[0], digest=digest), as_json)
    report = inspection.differences(places[0], places[1])
    _show(report, as_json)
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


@bench.command()
def checkpoint(
    params: Annotated[float, typer.Option(min=1, help="Parameters; 16 bytes each.")] = 2e8,
    nproc: Annotated[int, typer.Option(min=0, help="Local ranks; 0: this process alone.")] = 2,
    rounds: Annotated[int, typer.Option(min=1, help="Medians of so many.")] = 5,
    where: Annotated[Path, typer.Option("--dir", help="On the disk to measure.")] = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """What a save costs beside a plain copy, and its writing beside dd with fsync."""
    from pretrain import bench as benches

    if nproc and launch.STORE not in os.environ and launch.Place.here().world == 1:
        command = [sys.executable, "-m", "pretrain", *sys.argv[1:]]
        raise typer.Exit(launch.spawn(command, nproc))
    with launch.guarded(INPUT_ERRORS):
        found = benches.checkpoint(int(params), where, rounds)
    if launch.Place.here().rank == 0:
        _show(found, as_json)


@data.command()
def encode(
    src: Annotated[str, typer.Argument(help="ImageFolder, tar of one, IDX folder, or digits.")],
    out: Annotated[Path, typer.Option(help="Directory to write.")],
    codec: Annotated[str, typer.Option(help="haar (haar1..haar4) | kl")] = "haar",
    vae: Annotated[str | None, typer.Option(help="kl: directory or hub id of the VAE.")] = None,
    size: Annotated[int | None, typer.Option(help="Pixels: resize and centre-crop.")] = None,
    flips: Annotated[bool, typer.Option(help="Store mirrored training images too.")] = False,
    limit: Annotated[int | None, typer.Option(help="Images of each split, at most.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images encoded at once.")] = 64,
    lanes: Annotated[int, typer.Option(min=1, help="Contiguous ranges read side by side.")] = 1024,
    shard_size_mb: Annotated[float, typer.Option(help="Bytes of a tar, in MB.")] = 256,
    seed: Annotated[int, typer.Option(min=0, help="Of the order samples are written in.")] = 0,
    device: Annotated[str, typer.Option(help="Where a VAE runs.")] = "cpu",
    overwrite: Annotated[bool, typer.Option(help="Replace an existing set.")] = False,
) -> None:
    """Images to latents to WebDataset shards, with an index and a manifest."""
    from data_pipeline import encode as encoding

    with Console(stderr=True).status("reading") as status:
        manifest = encoding.encode(
            src,
            out,
            codec=codec,
            vae=vae,
            size=size,
            flips=flips,
            limit=limit,
            batch=batch,
            lanes=lanes,
            shard_size_mb=shard_size_mb,
            seed=seed,
            device=device,
            overwrite=overwrite,
            progress=lambda done, total: status.update(f"{done} of {total} images"),
        )
    counts = ", ".join(f"{split.count} {name}" for name, split in manifest.splits.items())
    print(f"{out}: {counts}; codec {manifest.codec}, latents {manifest.latent_shape}")
    if manifest.quarantined:
        listing = Path(out) / str(manifest.quarantine)
        print(f"left out because no image: {manifest.quarantined}, listed in {listing}")


@data.command()
def verify(path: Path, as_json: AsJson = False) -> None:
    """Check every byte: checksums, tars, index, labels. Exit code 1 if something is wrong."""
    from data_pipeline import verify as verification

    report = verification.verify(path)
    _show(asdict(report) | {"ok": report.ok}, as_json)
    raise typer.Exit(0 if report.ok else 1)


@data.command()
def stat(path: Path, as_json: AsJson = False) -> None:
    """What is in a set of shards."""
    from data_pipeline import shards

    _show(shards.stat(path), as_json)


def _show(values: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(values, indent=1, default=str))
        return
    console = Console(soft_wrap=True)
    table = Table(show_header=False, box=None)
    for name, value in _flat({k: v for k, v in values.items() if not _is_rows(v)}):
        table.add_row(name, _cell(value))
    console.print(table)
    for name, rows in values.items():
        if _is_rows(rows):
            table = Table(*rows[0], title=name)
            for row in rows:
                table.add_row(*(_cell(value) for value in row.values()))
            console.print(table)


def _is_rows(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and isinstance(value[0], dict)


def _cell(value: Any) -> str:
    if isinstance(value, list | tuple):
        text = ", ".join(map(str, value)) or "none"
        return text if len(text) <= 80 else "\n".join(map(str, value))
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def _flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for name, value in values.items():
        if isinstance(value, dict):
            rows += _flat(value, f"{prefix}{name}.")
        else:
            rows.append((prefix + name, value))
    return rows


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
