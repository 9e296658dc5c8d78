"""`pretrain bench …`: parts of the program beside what the machine gives."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from parallel import launch
from pretrain.manifest import write_whole
from pretrain.showing import AsJson, show
from pretrain.wrong_input import INPUT_ERRORS

bench = typer.Typer(
    no_args_is_help=True, help="Parts of the program beside what the machine gives."
)

Nproc = Annotated[int, typer.Option(min=0, help="Local ranks; 0: this process alone.")]
Rounds = Annotated[int, typer.Option(min=1, help="Medians of so many.")]
Out = Annotated[Path | None, typer.Option(help="Write the JSON here too.")]


def _measure(
    work: Callable[[], dict[str, Any]], nproc: int, as_json: bool, out: Path | None
) -> None:
    """Under torchrun or srun as one rank of theirs, else on `nproc` local ranks."""
    if nproc and launch.STORE not in os.environ and launch.Place.here().world == 1:
        command = [sys.executable, "-m", "pretrain", *sys.argv[1:]]
        raise typer.Exit(launch.spawn(command, nproc))
    launch.die_with_parent()
    if not torch.cuda.is_available():
        launch.keep_freed_memory()  # as in a run
    with launch.guarded(INPUT_ERRORS):
        found = work()
    if launch.Place.here().rank == 0:
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            write_whole(out, json.dumps(found, indent=1))
        show(found, as_json)


@bench.command()
def checkpoint(
    params: Annotated[float, typer.Option(min=1, help="Parameters; 16 bytes each.")] = 2e8,
    nproc: Nproc = 2,
    rounds: Rounds = 5,
    where: Annotated[Path, typer.Option("--dir", help="On the disk to measure.")] = Path("runs"),
    as_json: AsJson = False,
    out: Out = None,
) -> None:
    """What a save costs beside a plain copy, and its writing beside dd with fsync."""
    from pretrain.benches import checkpoint as benches

    _measure(lambda: benches.checkpoint(int(params), where, rounds), nproc, as_json, out)


@bench.command()
def links(
    sizes: Annotated[str, typer.Option(help="MiB, as 1,16,256; default: by device.")] = "",
    nproc: Nproc = 2,
    rounds: Rounds = 5,
    as_json: AsJson = False,
    out: Out = None,
) -> None:
    """Bus bandwidth of collectives inside a node, across nodes and over the world; matmul, copy."""
    from pretrain.benches import links as benches

    chosen = _numbers(sizes)
    _measure(lambda: benches.links(chosen, rounds), nproc, as_json, out)


@bench.command()
def dispatch(
    tokens: Annotated[int, typer.Option(min=1, help="Of a rank.")] = 4096,
    width: Annotated[int, typer.Option(min=1)] = 1024,
    hidden: Annotated[int, typer.Option(min=0, help="Inside an expert; 0: width/4.")] = 0,
    experts: Annotated[int, typer.Option(min=1, help="Of all ranks together.")] = 64,
    top_k: Annotated[int, typer.Option(min=1)] = 4,
    ep: Annotated[int, typer.Option(min=0, help="Ranks that share them; 0: a node's.")] = 0,
    capacity: Annotated[float, typer.Option(min=1, help="Static buffer ÷ even share.")] = 2.0,
    nproc: Nproc = 2,
    rounds: Rounds = 5,
    as_json: AsJson = False,
    out: Out = None,
) -> None:
    """Tokens to experts and back, exact and static, forward and backward."""
    from pretrain.benches import dispatch as benches

    inside = hidden or max(1, width // 4)
    sizes = benches.Sizes(tokens, width, inside, experts, top_k, ep, capacity)
    _measure(lambda: benches.dispatch(sizes, rounds), nproc, as_json, out)


@bench.command()
def step(
    path: Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file, see configs/.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")] = None,
    as_rank: Annotated[
        int, typer.Option(min=-1, help="Measure this one rank of --of, alone; -1: all ranks.")
    ] = -1,
    of: Annotated[int, typer.Option(min=0, help="Ranks of the world of --as-rank.")] = 0,
    steps: Annotated[int, typer.Option(min=1, help="Steps a round.")] = 5,
    nproc: Nproc = 0,
    rounds: Rounds = 3,
    as_json: AsJson = False,
    out: Out = None,
) -> None:
    """Training steps of a configuration on random latents: images/s, TFLOP/s, MFU, memory."""
    from pretrain import config
    from pretrain.benches import step as benches

    cfg = config.load(path, overrides or [])
    if (as_rank < 0) != (of == 0):
        raise config.ConfigError(f"--as-rank {as_rank} --of {of}: give both, or none")
    alone = (as_rank, of) if of else None
    _measure(
        lambda: benches.step(cfg, rounds=rounds, steps=steps, as_rank=alone), nproc, as_json, out
    )


@bench.command()
def loader(
    samples: Annotated[int, typer.Option(min=1, help="Latents of 4×32×32 float16.")] = 20_000,
    batch: Annotated[int, typer.Option(min=1)] = 256,
    order: Annotated[str, typer.Option(help="chunks | samples")] = "chunks",
    workers: Annotated[int, typer.Option(min=1, help="Threads that read ahead.")] = 2,
    rounds: Rounds = 5,
    as_json: AsJson = False,
    out: Out = None,
) -> None:
    """Samples a second from the loader, beside reading the same files from end to end."""
    from pretrain.benches import loader as benches

    if order not in ("chunks", "samples") or batch > samples:
        raise typer.BadParameter(
            f"--order {order} --batch {batch}: expected chunks or samples, and at most --samples "
            f"{samples} a batch"
        )
    _measure(lambda: benches.loader(samples, batch, order, workers, rounds), 0, as_json, out)


@bench.command()
def moe(
    tokens: Annotated[int, typer.Option(min=1)] = 4096,
    width: Annotated[int, typer.Option(min=1)] = 1024,
    hidden: Annotated[int, typer.Option(min=0, help="Inside an expert; 0: width/4.")] = 0,
    experts: Annotated[int, typer.Option(min=1)] = 64,
    top_k: Annotated[int, typer.Option(min=1)] = 4,
    rounds: Rounds = 5,
    as_json: AsJson = False,
    out: Out = None,
) -> None:
    """A layer of experts beside a dense one of equal active FLOPs, tokens balanced and skewed."""
    from pretrain.benches import moe as benches

    sizes = benches.Sizes(tokens, width, hidden or max(1, width // 4), experts, top_k)
    _measure(lambda: benches.moe(sizes, rounds), 0, as_json, out)


@bench.command()
def attention(
    path: Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file, see configs/.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")] = None,
    images: Annotated[int, typer.Option(min=1)] = 8,
    rounds: Rounds = 5,
    as_json: AsJson = False,
    out: Out = None,
) -> None:
    """Attention of each kind of block of a model, by each kernel that torch has for it."""
    from pretrain import config
    from pretrain.benches import attention as benches

    cfg = config.load(path, overrides or [])
    _measure(lambda: benches.attention(cfg.model, images, rounds), 0, as_json, out)


@bench.command()
def precision(
    path: Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file, see configs/.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")] = None,
    images: Annotated[int, typer.Option(min=1, help="Of a step.")] = 8,
    steps: Annotated[int, typer.Option(min=4, help="Of the short runs that gaps are of.")] = 40,
    rounds: Rounds = 5,
    as_json: AsJson = False,
    out: Out = None,
) -> None:
    """FP8 beside bf16, by recipe: what a block's products gain, and what a short run loses."""
    from pretrain import config
    from pretrain.benches import precision as benches

    cfg = config.load(path, overrides or [])
    _measure(
        lambda: benches.precision(cfg.model, images=images, steps=steps, rounds=rounds),
        0,
        as_json,
        out,
    )


@bench.command()
def site(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What slurm/acceptance.sh left.")],
    as_json: AsJson = False,
) -> None:
    """One report of an acceptance, and the site's link file that `pretrain plan` reads."""
    from pretrain.benches import report as reports

    show(reports.report(folder), as_json)


def _numbers(text: str) -> list[float]:
    try:
        found = [float(word) for word in text.split(",") if word]
    except ValueError:
        found = [0.0]
    if any(number <= 0 for number in found):
        raise typer.BadParameter(f"--sizes {text}: expected sizes in MiB above 0, such as 1,16,256")
    return found
