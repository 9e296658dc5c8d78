"""The checkpoints of a run while it trains: saved in the background, restored, rolled back to.

What a checkpoint directory is, `pretrain.manifest` says; tensors go through `parallel.saving` and
`parallel.storage`.
"""

import os
import secrets
import shutil
import time
from collections.abc import Callable
from datetime import timedelta
from itertools import count
from pathlib import Path
from threading import Thread
from typing import Any

import torch.distributed as dist

from data_pipeline.cursor import Cursor
from parallel import saving, storage
from parallel.errors import DamagedError
from parallel.index import INDEX, Index
from pretrain.interval import Interval
from pretrain.manifest import (
    CheckpointConfig,
    CheckpointError,
    changes_of,
    check_same,
    differing,
    expired,
    publish,
    read_manifest,
    root,
    step_of,
    stored,
    write_whole,
)
from pretrain.state import TrainState

SLOWEST = timedelta(minutes=30)  # how much longer one rank's disk may take than another's


class NoWayBackError(RuntimeError):
    """A roll-back that would lead nowhere."""


class Checkpoint:
    """Saves and restores a TrainState in one run directory. Every rank calls every method.

    A save copies, and returns; a thread writes. One at a time: a new save waits for the last.
    """

    def __init__(
        self,
        cfg: CheckpointConfig,
        run_dir: Path,
        facts: dict[str, Any],
        say: Callable[[str], None],
        nodes: int = 1,
    ) -> None:
        """facts: what the manifest holds beside the state: the run's identity, latents, config.

        nodes: that the run may lose.
        """
        self._cfg = cfg
        self._run_dir = run_dir
        self._facts = facts
        self._say = say
        group = dist.new_group(timeout=SLOWEST, backend="gloo")  # dist: once; the thread's own
        assert isinstance(group, dist.ProcessGroup)
        self._group = group
        self._writer: saving.Writer | None = None
        self._thread: Thread | None = None
        self._failure: BaseException | None = None
        self._failed_in_a_row = 0
        self._interval = Interval(cfg, nodes)
        self._proposed: int | None = None  # interval that all ranks heard of
        self._at: int | None = None  # step last saved or restored
        self._back_at: int | None = None  # step last rolled back to
        token = [secrets.token_hex(3)]
        dist.broadcast_object_list(token, src=0)  # dist: once
        self._token = token[0]  # why: ranks of a run that died may still be writing

    def due(self, step: int) -> bool:
        """Whether this step is saved; asked of each step, once it is made."""
        return self._interval.due(step)

    def restore(self, state: TrainState) -> bool:
        """Loads the newest checkpoint that is whole and undamaged; False for a fresh run.

        Damaged ones are named, set aside, and never deleted. Raises CheckpointError for one that
        does not fit, OSError for one that cannot be read.
        """
        candidates = [stored(self._run_dir)]
        dist.broadcast_object_list(candidates, src=0)  # dist: once, so that all agree on the list
        damaged: list[Path] = []
        for folder in reversed(candidates[0]):
            try:
                manifest = self._load(state, folder)
            except DamagedError as error:
                damaged.append(folder)
                self._say(f"checkpoint skipped: {error}; the one before it is used")
                continue
            self._set_aside(damaged)
            self._take(state, manifest)
            return True
        self._set_aside(damaged)
        if damaged:
            state.restart()
            self._say(f"no checkpoint in {root(self._run_dir)} is whole: the run starts anew")
        return False

    def _load(self, state: TrainState, folder: Path) -> dict[str, Any]:
        """Fills the tensors; the manifest. Raises DamagedError on all ranks alike."""
        found: list[Any] = [None, None]
        if dist.get_rank() == 0:
            try:
                found[0] = read_manifest(folder)
                check_same(folder, found[0], self._facts, self._cfg.accept)
            except (DamagedError, CheckpointError) as error:
                found[1] = error
        dist.broadcast_object_list(found, src=0)  # dist: once a candidate
        if found[1] is not None:
            raise found[1]
        begin = time.perf_counter()
        try:
            index = Index.from_json(found[0])
            fresh = state.absent({n: s.shape for n, s in index.tensors.items()})
            storage.read(
                {n: t for n, t in state.tensors().items() if n not in fresh}, folder, index
            )
        except DamagedError:
            raise
        except ValueError as error:
            raise CheckpointError(
                f"{folder} does not fit this run: {error}; restore the settings it was made with, "
                "or set another run_dir to start anew"
            ) from error
        size = sum(entry["bytes"] for entry in found[0]["files"].values())
        took = time.perf_counter() - begin
        self._say(f"restored step {step_of(folder)}: {size / 1e9:.3g} GB read in {took:.3g} s")
        return found[0]

    def _take(self, state: TrainState, manifest: dict[str, Any]) -> None:
        """Takes the clock, and says what an accepted change does to the order of the data."""
        state.loaded(manifest["state"])
        self._at = state.step
        self._interval.restored(state.step, manifest.get("interval"))
        theirs, ours = manifest["data"], self._facts["data"]
        changed = differing(theirs, ours) if theirs is not None else set()
        if changed - {"global_batch"}:
            seen, state.cursor = state.cursor.position, Cursor()
            state.skipped_in_a_row = state.skipped_from = 0  # why: they are places in the old order
            self._say(
                f"other data accepted: {', '.join(changes_of('data', theirs, ours))}. The old "
                f"order ends at position {seen}; the new one begins at position 0, and samples "
                "that were seen may come again"
            )
        elif changed:
            self._say(
                f"other global batch accepted: {ours['global_batch']} instead of "
                f"{theirs['global_batch']}. The order goes on at position {state.cursor.position}, "
                "no sample is left out or repeated; schedule and noise count steps as before"
            )

    def _set_aside(self, damaged: list[Path]) -> None:
        """Why: a damaged one must not be counted among those that are kept."""
        if dist.get_rank() == 0:
            for folder in damaged:
                aside = folder.with_name(f"{folder.name}.damaged")
                for number in count(2):
                    if not aside.exists():
                        break
                    aside = folder.with_name(f"{folder.name}.damaged{number}")
                folder.rename(aside)
                self._say(f"{folder} is set aside as {aside.name}; delete it if it is of no use")

    def roll_back(self, state: TrainState) -> None:
        """Loads the newest checkpoint again.

        Raises NoWayBackError if there is none, or if it was rolled back to before.
        """
        self._join()
        before = state.step
        if not self.restore(state):
            raise NoWayBackError(
                f"there is no checkpoint before step {before} to roll back to; "
                "set checkpoint.every to a lower number, lower optim.lr, or look at the data"
            )
        if state.step == self._back_at:
            raise NoWayBackError(
                f"rolled back to step {state.step} a second time: leaving data out does not help; "
                "lower optim.lr, lengthen schedule.warmup, or look at the data"
            )
        self._back_at = state.step

    def save(self, state: TrainState) -> None:
        """Copies the state of this step, which a thread then writes; a saved step is a no-op.

        A save that failed is tried again at the next; raises OSError when two in a row have.
        """
        if state.step == self._at:
            return
        step_seconds = self._interval.step_seconds(state.step)
        begin = time.perf_counter()
        self._join()
        waited = time.perf_counter() - begin
        if self._failed_in_a_row > 1:
            assert self._failure is not None
            raise self._failure
        tensors = state.tensors()
        if self._writer is None:
            self._writer = saving.Writer(tensors, self._group)
        begin = time.perf_counter()
        self._writer.stage(tensors)
        copied = time.perf_counter() - begin
        self._at = state.step
        self._interval.saved(state.step)
        times = (copied, waited + copied, step_seconds)
        self._thread = Thread(
            target=self._flush, args=(state.step, state.scalars(), *times), daemon=True
        )
        self._thread.start()

    def wait(self) -> None:
        """Until the last save is on the disk. Raises OSError if it cannot be had."""
        self._join()
        if self._failure is not None:
            raise self._failure

    def _join(self) -> None:
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        if self._failure is None:
            self._failed_in_a_row = 0
            assert self._proposed is not None
            words = self._interval.adopt(self._proposed)
            if words is not None:
                self._say(words)
            return
        self._failed_in_a_row += 1
        self._at = None
        if not isinstance(self._failure, OSError):
            raise self._failure

    def _flush(
        self,
        step: int,
        scalars: dict[str, Any],
        copied: float,
        blocked: float,
        step_seconds: float | None,
    ) -> None:
        """Runs in the thread. What it leaves is the same for all ranks: whether the save is there,
        and the interval to the next one, which rank 0 proposes.
        """
        assert self._writer is not None
        final = root(self._run_dir) / f"step_{step:08d}"
        partial = final.with_name(f".{final.name}.{self._token}.partial")
        begin = time.perf_counter()
        try:
            index = self._writer.write(partial)
            heard: list[Any] = [None, None]
            if index is not None:
                written = copied + time.perf_counter() - begin
                heard[1] = self._interval.proposal(blocked, written, step_seconds)
                heard[0] = self._try_to_publish(partial, final, index, scalars, heard[1])
            dist.broadcast_object_list(heard, src=0, group=self._group)  # dist: once a save
            problem, self._proposed = heard
            if problem is not None:
                raise OSError(problem)
        except BaseException as error:  # why: nobody looks at what a thread raises
            self._failure = error
            if dist.get_rank() == 0:
                shutil.rmtree(partial, ignore_errors=True)
            self._say(f"step {step} could not be saved: {error}")
            return
        self._failure = None
        took, size = time.perf_counter() - begin, self._writer.bytes * dist.get_world_size()
        self._say(
            f"step {step} saved: about {size / 1e9:.3g} GB, copied in {copied:.3g} s, "
            f"on the disk {took:.3g} s later"
        )
        self._warn_of_torchrun(took + copied)

    def _try_to_publish(
        self, partial: Path, final: Path, index: Index, scalars: dict[str, Any], interval: int
    ) -> str | None:
        """Why the checkpoint is not there, None if it is."""
        chosen = {"interval": interval} if self._interval.automatic else {}
        try:
            publish(partial, final, index, scalars, self._facts | chosen)
        except Exception as error:  # why: the others must hear of it, or they would wait
            return f"{final} cannot be completed: {error}"
        try:
            write_whole(self._run_dir / "latest", f"{step_of(final)}\n")
            self._remove_expired()
        except OSError as error:
            self._say(f"step {step_of(final)} is saved, but old ones are not tidied up: {error}")
        return None

    def _remove_expired(self) -> None:
        whole = {step_of(f): f for f in stored(self._run_dir) if (f / INDEX).is_file()}
        for step in expired(self._cfg, list(whole)):
            # why: renamed first, so that a kill while deleting leaves no half checkpoint behind.
            path = whole[step]
            shutil.rmtree(path.rename(path.with_name(f".{path.name}.expired")))

    def _warn_of_torchrun(self, seconds: float) -> None:
        """Why: torchrun kills the ranks so long after a SIGTERM, whatever they are doing."""
        patience = float(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "30"))
        if "TORCHELASTIC_RUN_ID" in os.environ and seconds > patience / 2:
            self._say(
                f"a save takes {seconds:.0f} s and torchrun kills ranks {patience:.0f} s after a "
                f"SIGTERM; start it with TORCH_ELASTIC_SHUTDOWN_TIMEOUT={4 * seconds:.0f}"
            )
