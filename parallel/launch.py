"""Joining and leaving the world: under torchrun, under srun with one task a rank, or alone.

`spawn` starts local ranks by itself; they meet in a file, so no port can be taken. From `join` to
`leave` a watch (parallel.watch) ends this rank when another fails.
"""

import ctypes
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import ErrorType
from torch.distributed import distributed_c10d as c10d

from parallel.watch import FolderBoard, StoreBoard, Watch, say

STORE = "PRETRAIN_STORE"  # file in which ranks started by `spawn` meet
GRACE = 15.0  # seconds that ranks get to end after one of them has failed
# The last collectives of every NCCL group are written to a file when one of them times out.
FLIGHT_RECORDER = {
    "TORCH_FR_BUFFER_SIZE": "2000",
    "TORCH_NCCL_TRACE_BUFFER_SIZE": "2000",  # its older name, which the dump still looks at
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
}
# By which an environment says how glibc hands out memory.
MALLOC = {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"}
_watch: Watch | None = None


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
        if _of_slurm(env):
            return Place(
                int(env["SLURM_PROCID"]),
                int(env["SLURM_STEP_NUM_TASKS"]),
                int(env["SLURM_LOCALID"]),
                _tasks_here(env),
            )
        if "RANK" in env:
            return Place(
                int(env["RANK"]),
                int(env["WORLD_SIZE"]),
                int(env.get("LOCAL_RANK", 0)),
                int(env.get("LOCAL_WORLD_SIZE", 1)),
            )
        return Place(0, 1, 0, 1)


def _of_slurm(env: Mapping[str, str]) -> bool:
    """Whether this process is a rank because Slurm started it as one of several tasks.

    LOCAL_WORLD_SIZE is torchrun's and `spawn`'s. RANK and WORLD_SIZE alone can be Slurm's own
    numbers, as the hooks of a container set them.
    """
    tasks = env.get("SLURM_STEP_NUM_TASKS", "1")
    return (
        int(tasks) > 1
        and {"SLURM_PROCID", "SLURM_STEP_TASKS_PER_NODE"} <= env.keys()
        and "LOCAL_WORLD_SIZE" not in env
        and env.get("WORLD_SIZE", tasks) == tasks
    )


def _tasks_here(env: Mapping[str, str]) -> int:
    """Of this node; Slurm writes `4(x2),2` for two nodes of four tasks and one of two."""
    counts = []
    for entry in env["SLURM_STEP_TASKS_PER_NODE"].split(","):
        tasks, _, times = entry.rstrip(")").partition("(x")
        counts += [int(tasks)] * int(times or 1)
    return counts[int(env.get("SLURM_NODEID", 0))]


def default_threads(place: Place) -> int:
    """This rank's share of the cores it may use."""
    linux = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if linux else os.cpu_count() or 1
    if _of_slurm(os.environ) and "SLURM_CPUS_PER_TASK" in os.environ:
        # why: where Slurm binds tasks to cores, a rank sees its own share alone.
        return min(cores, int(os.environ["SLURM_CPUS_PER_TASK"]))
    return max(1, cores // place.local_world)


def join(
    place: Place, *, threads: int, timeout: timedelta, stacks: Path | None = None
) -> torch.device:
    """Makes the process group; returns the device of this rank.

    stacks: directory into which every rank writes its stacks when one has failed or hangs.
    """
    global _watch
    torch.set_num_threads(threads)
    if torch.cuda.is_available():
        device = torch.device("cuda", place.local_rank)
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
        for name, value in FLIGHT_RECORDER.items():
            os.environ.setdefault(name, value)
    else:
        device = torch.device("cpu")
        backend = "gloo"
        keep_freed_memory()
    store: dist.Store | None = None
    if place.world == 1:
        store = dist.HashStore()
    elif STORE in os.environ:
        store = dist.FileStore(os.environ[STORE], place.world)
    elif _of_slurm(os.environ):
        for name, value in _meeting(os.environ).items():
            os.environ.setdefault(name, value)
    dist.init_process_group(
        backend, store=store, rank=place.rank, world_size=place.world, timeout=timeout
    )
    limit(timeout)
    if place.world > 1:
        if STORE in os.environ:
            board = FolderBoard(Path(f"{os.environ[STORE]}.watch"))
        else:
            board = StoreBoard(c10d._get_default_store())
        _watch = Watch(board, place.rank, place.world, _broken, stacks)
    return device


def keep_freed_memory() -> None:
    """From here on this process keeps the memory that it frees, for what it allocates next.

    perf: glibc takes large tensors from the system and gives them back; each step then touches the
    same pages for the first time again, 132 000 in one of DiT-MoE-S/2, 7 % of its time. Other C
    libraries, and an environment that tunes malloc by itself, are left as they are.
    """
    tuned = not os.environ.keys().isdisjoint(MALLOC)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and sys.platform == "linux" and not tuned:
        trim_threshold, mmap_max = -1, -4  # names of malloc.h
        mallopt(trim_threshold, -1)  # never
        mallopt(mmap_max, 0)


def _meeting(env: Mapping[str, str]) -> dict[str, str]:
    """Where the tasks of a Slurm step meet: its first node, and a port that its job number gives.

    Node lists look like `gpu[003-010,12],cpu7`.
    """
    nodes = env.get("SLURM_STEP_NODELIST", "localhost")
    first = re.sub(r"\[([^],-]+)[^]]*\]", r"\1", re.split(r",(?![^[]*\])", nodes)[0])
    job, step = int(env.get("SLURM_JOB_ID", 0)), int(env.get("SLURM_STEP_ID", 0))
    return {"MASTER_ADDR": first, "MASTER_PORT": str(20_000 + (job + 97 * step) % 10_000)}


def limit(timeout: timedelta) -> None:
    """Every group, those made so far and those to come, waits no longer than this.

    Why: a sub-group takes the 30 minutes of its backend, whatever the world was given, and some
    libraries pass a number of their own. Call it again once everything is assembled.
    """
    c10d.default_pg_timeout = c10d.default_pg_nccl_timeout = timeout
    for group in list(c10d._world.pg_map):
        c10d._set_pg_timeout(timeout, group)


def _broken() -> str:
    """What NCCL reports about any group, "" while all is well.

    Why: NCCL's own thread finds a collective that does not end, while the main thread waits for the
    device without end; the process is aborted a little later.
    """
    if not torch.cuda.is_available() or not joined():
        return ""
    device, fine = torch.device("cuda"), ErrorType.SUCCESS
    for group in list(c10d._world.pg_map):
        state = group._get_backend(device).get_error() if device in group._device_types else fine
        if state != fine:
            return f"NCCL reports {state.name} in group {group.group_name}"
    return ""


@contextmanager
def guarded(expected: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Around a rank's work: an error here ends all ranks with 1, its own traceback first.

    expected: errors of the user's input, which end all ranks with 2; one rank lets it through.
    """
    try:
        yield
    except (SystemExit, KeyboardInterrupt):
        raise
    except expected as error:
        if _watch is None or _watch.wrong_input(str(error)):
            raise
        raise SystemExit(2) from None
    except BaseException as error:  # why: the error of a failed checkpoint is no Exception
        if _watch is None:
            raise
        raise SystemExit(_watch.fail(error)) from None


def joined() -> bool:
    """Whether this process is in a group with the others."""
    return dist.is_available() and dist.is_initialized()


def leave() -> None:
    """All ranks wait for each other, then the group ends.

    Why the barrier: a rank that tears down while another still talks to it aborts that one.
    """
    global _watch
    if _watch is not None:
        _watch.leave()
    dist.barrier()  # dist: every rank
    if _watch is not None:
        _watch.stop()
        _watch = None
    dist.destroy_process_group()


def meet_elsewhere() -> None:
    """After `leave`: the next `join` of these processes takes another port.

    Why: a rank that is quick could still reach the store of the group that is ending.
    """
    if "MASTER_PORT" in os.environ:
        os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 5)
        os.environ["TORCHELASTIC_USE_AGENT_STORE"] = (
            "False"  # torchrun's holds the old group's keys
        )


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
    failed_at, said = None, set[int]()
    while any(process.poll() is None for process in ranks):
        for rank, process in enumerate(ranks):
            code = process.poll()
            if code and failed_at is None:
                failed_at = time.monotonic()
            if code is not None and code < 0 and rank not in said:
                said.add(rank)
                say(f"rank {rank} was ended by {signal.Signals(-code).name}\n")
        if failed_at is not None and time.monotonic() - failed_at > GRACE:
            for process in ranks:
                process.kill()
        time.sleep(0.05)
    codes = [process.returncode for process in ranks]
    if not any(codes):
        return 0
    return 2 if 2 in codes else 1
