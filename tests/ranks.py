"""Ranks for tests: processes forked from a server that has imported everything once.

A fresh interpreter needs seconds to import torch; a fork of this server needs none. One thread a
rank, so that bits do not depend on the machine.
"""

import atexit
import functools
import itertools
import multiprocessing as mp
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

_context = mp.get_context("forkserver")
os.environ.setdefault("DS_ACCELERATOR", "cpu")  # why: or DeepSpeed looks for others, and says so
_context.set_forkserver_preload(
    [
        "torch._dynamo",
        "pretrain.cli",
        "pretrain.train",
        "deepspeed.runtime.zero.muon.muon_optimizer",
        "parallel.megatron",
        "tests.frozen",
    ]
)

LIMIT = 120.0  # seconds after which a test's ranks have hung
_numbers = itertools.count()


def start(
    target: Callable[..., Any], world: int, *args: Any, log: Path | None = None
) -> list[BaseProcess]:
    """Starts `target(*args)` as `world` ranks that know their place; their output goes to `log`."""
    store = f"{_meeting_places()}/{next(_numbers)}"
    ranks = []
    for rank in range(world):
        process = _context.Process(
            target=_rank, args=(target, args, rank, world, store, str(log) if log else None)
        )
        process.start()
        ranks.append(process)
    return ranks


@functools.cache  # why: not on import, which every rank does too
def _meeting_places() -> str:
    """A folder with a file for each start; it goes when this process ends."""
    folder = tempfile.mkdtemp(prefix="ranks-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def wait(ranks: Sequence[BaseProcess], limit: float = LIMIT) -> list[int | None]:
    """Exit codes; a rank that has hung is killed and fails the test."""
    for process in ranks:
        process.join(limit)
    hung = [process for process in ranks if process.is_alive()]
    for process in hung:
        process.kill()
        process.join()
    assert not hung, f"{len(hung)} ranks had not ended after {limit} s"
    return [process.exitcode for process in ranks]


def run(target: Callable[..., Any], world: int, *args: Any, log: Path | None = None) -> None:
    """Runs `target(*args)` on `world` ranks; all must end well."""
    codes = wait(start(target, world, *args, log=log))
    assert codes == [0] * world, f"exit codes {codes}\n{log.read_text() if log else ''}"


def pretrain(*words: str) -> None:
    """The command line, inside a rank."""
    from pretrain import cli

    sys.argv = ["pretrain", *words]
    cli.main()


def train(config: Path, run_dir: Path, *overrides: str, world: int = 1) -> None:
    """`pretrain train` on `world` ranks; what it says is in RUN/ranks.log."""
    run_dir.mkdir(parents=True, exist_ok=True)
    words = ("train", str(config), f"run_dir={run_dir}", *overrides)
    run(pretrain, world, *words, log=run_dir / "ranks.log")


def _rank(
    target: Callable[..., Any],
    args: tuple[Any, ...],
    rank: int,
    world: int,
    store: str,
    log: str | None,
) -> None:
    if log is not None:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(world),
        PRETRAIN_STORE=store,
        WANDB_MODE="disabled",
    )
    import torch

    torch.set_num_threads(1)
    target(*args)
