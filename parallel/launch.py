"""Joining and leaving the world: under torchrun, under srun with one task a rank, or alone.

`spawn` starts local ranks by itself; they meet in a file, so no port can be taken.
"""

import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

STORE = "PRETRAIN_STORE"  # file in which ranks started by `spawn` meet
GRACE = 10.0  # seconds that ranks get to end after one of them has failed


@dataclass(frozen=True)
class Place:
    """Where this process stands among all."""

    rank: int
    world: int
    local_rank: int
    local_world: int

    @staticmethod
    def here() -> "Place":
        """From torchrun's environment, else Slurm's (inside a step), else alone."""
        env = os.environ
        if "RANK" in env:
            return Place(
                int(env["RANK"]),
                int(env["WORLD_SIZE"]),
                int(env.get("LOCAL_RANK", 0)),
                int(env.get("LOCAL_WORLD_SIZE", 1)),
            )
        if "SLURM_PROCID" in env and int(env.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
            local_world = env.get("SLURM_STEP_TASKS_PER_NODE", "1").split("(")[0].split(",")[0]
            return Place(
                int(env["SLURM_PROCID"]),
                int(env["SLURM_STEP_NUM_TASKS"]),
                int(env["SLURM_LOCALID"]),
                int(local_world),
            )
        return Place(0, 1, 0, 1)


def default_threads(place: Place) -> int:
    """This rank's share of the cores it may use."""
    linux = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if linux else os.cpu_count() or 1
    return max(1, cores // place.local_world)


def join(place: Place, *, threads: int, timeout: timedelta) -> torch.device:
    """Makes the process group; returns the device of this rank."""
    torch.set_num_threads(threads)
    if torch.cuda.is_available():
        device = torch.device("cuda", place.local_rank)
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
        os.environ.setdefault("TORCH_NCCL_TRACE_BUFFER_SIZE", "2000")  # flight recorder
    else:
        device = torch.device("cpu")
        backend = "gloo"
    if place.world == 1:
        dist.init_process_group(
            backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout
        )
    elif STORE in os.environ:
        store = dist.FileStore(os.environ[STORE], place.world)
        dist.init_process_group(
            backend, store=store, rank=place.rank, world_size=place.world, timeout=timeout
        )
    else:
        dist.init_process_group(backend, rank=place.rank, world_size=place.world, timeout=timeout)
    return device


def joined() -> bool:
    """Whether this process is in a group with the others."""
    return dist.is_available() and dist.is_initialized()


def leave() -> None:
    """All ranks wait for each other, then the group ends.

    Why the barrier: a rank that tears down while another still talks to it aborts that one.
    """
    dist.barrier()  # dist: every rank
    dist.destroy_process_group()


def die_with_parent() -> None:
    """A rank started by `spawn` ends with its parent, even if that one is killed outright.

    Why: an orphaned rank would go on writing into a run directory that a restart is using.
    """
    if STORE in os.environ and sys.platform == "linux":
        parent_death_signal = 1  # PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(parent_death_signal, signal.SIGKILL)
        if os.getppid() == 1:
            os._exit(1)


def spawn(command: Sequence[str], nproc: int) -> int:
    """Runs `command` as `nproc` local ranks; returns 0, 2 or 1 as design §6 says.

    One failed rank ends all. SIGTERM and SIGINT are passed on once.
    """
    with tempfile.TemporaryDirectory(prefix="pretrain-") as folder:
        ranks = [_start(command, nproc, rank, Path(folder) / "store") for rank in range(nproc)]

        def forward(number: int, _frame: object) -> None:
            for process in ranks:
                if process.poll() is None:
                    process.send_signal(number)

        before = {s: signal.signal(s, forward) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            return _wait(ranks)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            for process in ranks:
                process.kill()


def _start(command: Sequence[str], nproc: int, rank: int, store: Path) -> "subprocess.Popen[bytes]":
    env = os.environ | {
        "RANK": str(rank),
        "WORLD_SIZE": str(nproc),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(nproc),
        STORE: str(store),
    }
    # why: a session of its own keeps a terminal's ^C from reaching a rank twice.
    return subprocess.Popen(list(command), env=env, start_new_session=True)


def _wait(ranks: "list[subprocess.Popen[bytes]]") -> int:
    failed_at = None
    while any(process.poll() is None for process in ranks):
        if failed_at is None and any(process.poll() not in (None, 0) for process in ranks):
            failed_at = time.monotonic()
        if failed_at is not None and time.monotonic() - failed_at > GRACE:
            for process in ranks:
                process.kill()
        time.sleep(0.05)
    codes = [process.returncode for process in ranks]
    if not any(codes):
        return 0
    return 2 if 2 in codes else 1
