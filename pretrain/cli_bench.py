"""`pretrain bench …`: parts of the program beside what the machine gives."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from parallel import launch
from pretrain.showing import AsJson, show
from pretrain.wrong_input import INPUT_ERRORS

bench = typer.Typer(
    no_args_is_help=True, help="Parts of the program beside what the machine gives."
)


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
        show(found, as_json)
