"""The run directory: what is written beside the checkpoints, and how a run is asked to stop.

The signal contract: SIGTERM, SIGINT or a file `stop` in the directory asks; all ranks agree in the
step's own reduction, save, and end with 0; `done` appears only at the last step. A second signal
some seconds later ends a rank at once. On Slurm the batch shell makes the file when it gets USR1,
and requeues a job that ended without `done`; that half is stated in slurm/lib.sh.
"""

import contextlib
import fcntl
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

import torch

from pretrain.manifest import root, write_whole

COMMIT = "commit"  # file beside the code of a job, written by slurm/lib.sh and by `submit`
SAME_REQUEST = 5.0  # seconds after a signal from which on another one means: do not save


class RunError(ValueError):
    """A run directory that cannot be used."""


def check_place(folder: Path) -> None:
    """Raises RunError if there is no making or writing a run directory here."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        what = "cannot be written to" if there.is_dir() else "is no directory"
        raise RunError(f"run_dir={folder}: {there} {what}; set another run_dir")


class Run:
    """One rank's view of a run directory; only rank 0 writes."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder = folder
        self._writes = rank == 0
        self._lock: TextIO | None = None
        self._signalled_at: float | None = None
        if self._writes:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = _locked(folder)
            for ending in ("partial", "expired"):
                for leftover in root(folder).glob(f".step_*.{ending}"):
                    shutil.rmtree(leftover, ignore_errors=True)
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, self._note)

    def _note(self, _number: int, _frame: object) -> None:
        """Why the pause: torchrun and Slurm deliver one request to a rank twice at once."""
        now = time.monotonic()
        if self._signalled_at is None:
            self._signalled_at = now
        elif now - self._signalled_at >= SAME_REQUEST:
            os.write(2, b"a second request to stop: the rank ends without saving\n")
            os._exit(1)

    def describe(self, config: str, steps: int, facts: dict[str, Any]) -> None:
        """Writes config.yaml and environment.json; a larger `steps` removes `done`."""
        if not self._writes:
            return
        write_whole(self.folder / "config.yaml", config)
        write_whole(self.folder / "environment.json", json.dumps(environment() | facts, indent=1))
        done = self.folder / "done"
        if done.is_file():
            reached = done.read_text().strip()
            if not reached.isdecimal() or int(reached) < steps:
                done.unlink()

    def say(self, text: str) -> None:
        """A sentence for people, once: console and log.txt."""
        if self._writes:
            print(text, flush=True)
            # why: what is said is not worth a run whose disk is full.
            with (
                contextlib.suppress(OSError),
                (self.folder / "log.txt").open("a", encoding="utf-8") as file,
            ):
                file.write(f"{datetime.now().isoformat(sep=' ', timespec='seconds')}  {text}\n")

    def asked_to_stop(self) -> bool:
        """Whether this rank was told to: by a signal, or rank 0 by the file `stop`."""
        return self._signalled_at is not None or (self._writes and (self.folder / "stop").exists())

    def end(self, step: int, steps: int) -> None:
        """After the last save: `done` if the run is complete; the request to stop is used up."""
        if not self._writes:
            return
        if step >= steps:
            write_whole(self.folder / "done", f"{step}\n")
        with contextlib.suppress(FileNotFoundError):
            (self.folder / "stop").unlink()


def _locked(folder: Path) -> TextIO:
    """Holds the directory for this process.

    Why: after a kill the old ranks may still be dying; two writers would mix their histories. A
    requeued job waits longer: NFSv4 holds the locks of a dead node for a lease of about 90 s.
    """
    handle = (folder / ".lock").open("w")
    patience = 20.0 if os.environ.get("SLURM_RESTART_COUNT", "0") == "0" else 240.0  # seconds
    end = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > end:
                raise RunError(
                    f"{folder} is in use by another training process; wait for it, stop it "
                    f"(touch {folder / 'stop'}), or set another run_dir"
                ) from None
            time.sleep(0.1)
        except OSError as error:
            print(f"{folder} is on a file system without locks ({error}): start one run in it")
            return handle
        else:
            return handle


def environment() -> dict[str, Any]:
    """What a run stands on: versions, machine, commit, command."""
    packages = ("torch", "numpy", "webdataset", "diffusers", "deepspeed", "megatron-core")
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "machine": platform.node(),
        "cores": os.cpu_count(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "commit": commit(),
        "packages": {name: _version(name) for name in packages},
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """The commit of this code, None outside a checkout; a copy for a job has it in a file."""
    here = Path(__file__).resolve().parents[1]
    if (here / COMMIT).is_file():
        return (here / COMMIT).read_text().strip() or None
    if shutil.which("git") is None:
        return None
    answer = subprocess.run(
        ["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    return answer.stdout.strip() or None
