"""What is done to a run from inside one of its ranks, and the moment it is done at.

A forked rank patches itself before it starts: in the middle of a step, of a copy, of a write, it
kills itself or all ranks, asks for a stop, or fills the disk. The product has no hook for any of
it. Nothing here knows what should come of it.
"""

import itertools
import os
import resource
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from tests import ranks

Act = Literal["die", "kill all", "TERM", "TERM twice", "stop", "cap", "fill", "raise", "cut", "nan"]
Moment = Literal[
    "forward",
    "update",
    "copy",
    "fsync",
    "flush",
    "rename",
    "renamed",
    "read",
    "loss",
    "write",
    "load",
]
PATIENCE = 60.0  # seconds in which training must come along while a file is being flushed


class HurtError(RuntimeError):
    """What a loader worker dies of."""


@dataclass(frozen=True)
class Hurt:
    """One injury, done once: in the step under way, or in the save of that step."""

    act: Act
    at: Moment
    step: int
    rank: int = 0
    amount: int = 0  # bytes, or which of several fsyncs
    path: str = ""  # file to be cut; file that fills the disk

    def __str__(self) -> str:
        who = "" if self.act in ("kill all", "TERM", "TERM twice", "stop") else f" rank {self.rank}"
        how = {
            "cap": f" at {self.amount} bytes of a file",
            "fill": f" but for {self.amount} bytes",
            "cut": f" to {self.amount} bytes",
        }.get(self.act, "")
        nth = f" {self.amount}" if self.at in ("copy", "fsync", "flush") else ""
        step = f" of {self.step}" if self.step else ""
        return f"{self.act}{who}{how} in {self.at}{nth}{step}"


_states: list[Any] = []  # the TrainState of this rank, once there is one
_saving: set[int] = set()  # step being saved, while the trainer is in `save`
_stepped = threading.Event()  # a forward pass has begun since the last look


def train(hurts: tuple[Hurt, ...], notes: str, run_dir: str, *words: str) -> None:
    """`pretrain train …` in a rank that will be hurt.

    notes: folder in which ranks leave their process ids, what they restored, and that they were
    hurt.
    """
    rank, folder = os.environ["RANK"], Path(notes)
    (folder / f"pid{rank}").write_text(str(os.getpid()))
    # why: a rank that the kernel ends in the middle of a write would leave its memory on the disk.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _watch_state(folder, rank)
    for hurt in hurts:
        if hurt.rank == int(rank):
            MOMENTS[hurt.at](hurt, _once(hurt, folder, Path(run_dir)))
    ranks.pretrain("train", *words, f"run_dir={run_dir}")


def _watch_state(folder: Path, rank: str) -> None:
    """Knows the clock, and notes what was restored."""
    from pretrain.state import TrainState

    new, loaded = TrainState.new, TrainState.loaded

    def keep(*args: Any, **kwargs: Any) -> TrainState:
        _states.append(new(*args, **kwargs))
        return _states[-1]

    def note(self: TrainState, scalars: dict[str, Any]) -> None:
        loaded(self, scalars)
        if rank == "0":
            (folder / "restored").write_text(str(scalars["step"]))

    TrainState.new = staticmethod(keep)  # type: ignore[method-assign]
    TrainState.loaded = note  # type: ignore[method-assign]


def _once(hurt: Hurt, folder: Path, run: Path) -> Callable[[], None]:
    """The act, and a note of it first."""
    done: list[None] = []

    def fire() -> None:
        if not done:
            done.append(None)
            (folder / "hurt").write_text(str(_states[0].step))
            _act(hurt, folder, run)

    return fire


def _act(hurt: Hurt, folder: Path, run: Path) -> None:
    everyone = [int(path.read_text()) for path in sorted(folder.glob("pid*"))]
    match hurt.act:
        case "die":
            os.kill(os.getpid(), signal.SIGKILL)
        case "kill all":
            for number in sorted(everyone, key=lambda pid: pid == os.getpid()):
                os.kill(number, signal.SIGKILL)
        case "TERM" | "TERM twice":
            for _ in range(1 if hurt.act == "TERM" else 2):
                for number in everyone:
                    os.kill(number, signal.SIGTERM)
        case "stop":
            (run / "stop").touch()
        case "cap":  # why: Python ignores the signal, so a longer file fails with EFBIG
            resource.setrlimit(resource.RLIMIT_FSIZE, (hurt.amount, resource.RLIM_INFINITY))
        case "fill":
            _fill(Path(hurt.path), hurt.amount)
        case "raise":
            raise HurtError("a loader worker dies")
        case "cut":
            os.truncate(hurt.path, hurt.amount)


def _fill(path: Path, left: int) -> None:
    """Takes the room on a file system, but for so many bytes."""
    room = os.statvfs(path.parent)
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, room.f_bavail * room.f_frsize - left)


def _before(owner: Any, name: str, due: Callable[..., bool], fire: Callable[[], None]) -> None:
    honest = getattr(owner, name)

    def first(*args: Any, **kwargs: Any) -> Any:
        if due(*args):
            fire()
        return honest(*args, **kwargs)

    setattr(owner, name, first)


def _under_way(hurt: Hurt) -> bool:
    return bool(_states) and _states[0].step + 1 == hurt.step


def _in_forward(hurt: Hurt, fire: Callable[[], None]) -> None:
    from pretrain import objectives

    _before(objectives.Flow, "loss", lambda *_: _under_way(hurt), fire)


def _in_update(hurt: Hurt, fire: Callable[[], None]) -> None:
    from pretrain import optim

    _before(optim.AdamW, "step", lambda *_: _under_way(hurt), fire)


def _in_copy(hurt: Hurt, fire: Callable[[], None]) -> None:
    """After some of the tensors of a save have been copied."""
    from pretrain.checkpoint import Checkpoint

    honest, copied = Checkpoint.save, itertools.count()

    def save(self: Checkpoint, state: Any) -> None:
        _saving.add(state.step)
        honest(self, state)
        _saving.clear()

    def due(*_: Any) -> bool:
        return hurt.step in _saving and next(copied) == hurt.amount

    Checkpoint.save = save  # type: ignore[method-assign]
    _before(torch.Tensor, "copy_", due, fire)


def _writes(hurt: Hurt, handle: int) -> bool:
    """Whether an open file is of the step directory being written."""
    return f"/.step_{hurt.step:08d}" in os.readlink(f"/proc/self/fd/{handle}")


def _in_fsync(hurt: Hurt, fire: Callable[[], None]) -> None:
    seen = itertools.count()
    _before(os, "fsync", lambda fd: _writes(hurt, fd) and next(seen) == hurt.amount, fire)


def _in_flush(hurt: Hurt, fire: Callable[[], None]) -> None:
    """While a file is written and the trainer is in a later step."""
    from pretrain import objectives

    seen = itertools.count()

    def due(fd: int) -> bool:
        if not _writes(hurt, fd) or next(seen) != hurt.amount:
            return False
        _stepped.clear()
        assert _stepped.wait(PATIENCE), "training stands still while a file is flushed"
        return True

    def step(*_: Any) -> bool:
        _stepped.set()
        return False

    _before(objectives.Flow, "loss", step, fire)
    _before(os, "fsync", due, fire)


def _at_rename(hurt: Hurt, fire: Callable[[], None], *, after: bool = False) -> None:
    """Before or after a step directory gets its name."""
    for name in ("rename", "replace"):
        honest = getattr(os, name)

        def move(source: Any, target: Any, honest: Any = honest, **kwargs: Any) -> None:
            due = Path(target).name == f"step_{hurt.step:08d}"
            if due and not after:
                fire()
            honest(source, target, **kwargs)
            if due and after:
                fire()

        setattr(os, name, move)


def _after_rename(hurt: Hurt, fire: Callable[[], None]) -> None:
    _at_rename(hurt, fire, after=True)


def _in_load(_hurt: Hurt, fire: Callable[[], None]) -> None:
    """When tensors have been restored, and the clock has not."""
    from pretrain.state import TrainState

    _before(TrainState, "loaded", lambda *_: True, fire)


def _in_read(hurt: Hurt, fire: Callable[[], None]) -> None:
    """In a loader worker that reads the batch of a step, ahead of training."""
    from data_pipeline.reader import Reader

    reads = itertools.count()

    def due(*_: Any) -> bool:
        first = next(reads)
        if first == 0:
            start.append(_states[0].step)
        return start[0] + first + 1 == hurt.step

    start: list[int] = []
    _before(Reader, "read", due, fire)


def _in_loss(hurt: Hurt, _fire: Callable[[], None]) -> None:
    """Not once but always: the loss of this step is not a number."""
    from pretrain import objectives

    honest = objectives.Flow.loss

    def loss(self: Any, *args: Any) -> Any:
        out = honest(self, *args)
        return out * torch.nan if _under_way(hurt) else out

    objectives.Flow.loss = loss  # type: ignore[method-assign]


def _in_write(hurt: Hurt, fire: Callable[[], None]) -> None:
    """At a byte of a file: the kernel ends a process that writes beyond its limit."""
    from pretrain import objectives

    def due(*_: Any) -> bool:
        if _under_way(hurt):
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            return True
        return False

    _before(objectives.Flow, "loss", due, fire)


MOMENTS: dict[Moment, Callable[[Hurt, Callable[[], None]], None]] = {
    "forward": _in_forward,
    "update": _in_update,
    "copy": _in_copy,
    "fsync": _in_fsync,
    "flush": _in_flush,
    "rename": _at_rename,
    "renamed": _after_rename,
    "read": _in_read,
    "loss": _in_loss,
    "write": _in_write,
    "load": _in_load,
}
