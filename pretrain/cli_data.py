"""`pretrain data …`: images to shards, and what is in them."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from pretrain.showing import AsJson, show

if TYPE_CHECKING:
    from data_pipeline.shards import Manifest

data = typer.Typer(no_args_is_help=True, help="Images to shards, and what is in them.")


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
    device: Annotated[
        str, typer.Option(help="Where a VAE runs; auto: cuda if it is there.")
    ] = "cpu",
    overwrite: Annotated[bool, typer.Option(help="Replace an existing set.")] = False,
    part: Annotated[str | None, typer.Option(help="I/N: one of N parts, for merge.")] = None,
) -> None:
    """Images to latents to WebDataset shards, with an index and a manifest."""
    import torch

    from data_pipeline import encode as encoding
    from data_pipeline import parts

    which = parts.parse(part) if part else None
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
        print(f"device {device}")
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
            part=which,
            note=print,
        )
    _tell(parts.place(out, which) if which else out, manifest)


@data.command()
def merge(
    path: Path,
    overwrite: Annotated[bool, typer.Option(help="Replace an existing set.")] = False,
) -> None:
    """Join the parts that `encode --part` wrote below PATH. Killed, it can be run again."""
    from data_pipeline import merge as merging

    _tell(path, merging.merge(path, overwrite=overwrite))


def _tell(out: Path, manifest: "Manifest") -> None:
    """What a set holds, in one line, or two if files were left out."""
    counts = ", ".join(f"{split.count} {name}" for name, split in manifest.splits.items())
    print(
        f"{out}: {counts or 'no images'}; codec {manifest.codec}, latents {manifest.latent_shape}"
    )
    if manifest.quarantined:
        listing = out / str(manifest.quarantine)
        print(f"left out because no image: {manifest.quarantined}, listed in {listing}")


@data.command()
def verify(path: Path, as_json: AsJson = False) -> None:
    """Check every byte: checksums, tars, index, labels. Exit code 1 if something is wrong."""
    from data_pipeline import verify as verification

    report = verification.verify(path)
    show(asdict(report) | {"ok": report.ok}, as_json)
    raise typer.Exit(0 if report.ok else 1)


@data.command()
def stat(path: Path, as_json: AsJson = False) -> None:
    """What is in a set of shards."""
    from data_pipeline import shards

    show(shards.stat(path), as_json)
