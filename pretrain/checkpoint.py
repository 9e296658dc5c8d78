"""Checkpoints: a directory that appears whole or not at all, and the newest whole one restored.

Tensors go through `parallel.storage`; this room owns names, manifest, retention and what fits what.
`manifest.json` is written last: without it, it is not a checkpoint.
"""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pydantic import BaseModel, ConfigDict, PositiveInt

from parallel import storage
from pretrain.state import TrainState

FORMAT = 1  # of the manifest; a newer one is refused


class CheckpointError(ValueError):
    """A checkpoint that does not fit, or none where one is needed."""


class CheckpointConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    every: PositiveInt = 1000  # steps between saves
    keep: PositiveInt = 3  # newest ones kept
    keep_every: PositiveInt | None = None  # steps; multiples of it are kept for ever


def root(run_dir: Path) -> Path:
    return run_dir / "checkpoints"


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of one checkpoint.

    Raises CheckpointError if it is missing or broken, of a newer format, or if a file it names is
    missing or has another size.
    """
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} has no manifest.json: the save did not finish") from error
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if manifest.get("format", 0) > FORMAT:
        raise CheckpointError(
            f"{folder} has format {manifest['format']}, this version reads up to {FORMAT}; "
            "install the version that wrote it"
        )
    for name, entry in manifest["files"].items():
        file = folder / name
        size = file.stat().st_size if file.is_file() else None
        if size != entry["bytes"]:
            raise CheckpointError(
                f"{file} has {'no' if size is None else size} bytes, expected {entry['bytes']}"
            )
    return manifest


def newest(run_dir: Path, say: Callable[[str], None] = lambda _: None) -> Path | None:
    """The newest whole checkpoint of a run, None if there is none; `say` hears what others lack."""
    for folder in sorted(root(run_dir).glob("step_*"), reverse=True):
        try:
            read_manifest(folder)
        except CheckpointError as error:
            say(str(error))
            continue
        return folder
    return None


def locate(place: Path) -> Path:
    """The checkpoint that a run directory or a checkpoint directory means.

    Damaged ones that are passed over are named on stderr. Raises CheckpointError if none is whole.
    """
    if (place / "manifest.json").is_file():
        return place
    damaged: list[str] = []
    folder = newest(place, damaged.append)
    if folder is None:
        found = f"{place} {'holds no checkpoint' if place.is_dir() else 'is no directory'}"
        raise CheckpointError(
            f"{damaged[0] if damaged else found}; give a run directory with checkpoints/step_*/, "
            "or one such step directory"
        )
    for problem in damaged:
        print(f"checkpoint skipped: {problem}; the one before it is used", file=sys.stderr)
    return folder


# How the parts of `data` in a manifest are set.
_SET_BY = {"data.fingerprint": "data.path (SHA-256 of its index)", "data.seed": "seed"}
_SHOWN = 4  # changes named in one message


def check_fit(run_dir: Path, identity: dict[str, dict[str, Any]]) -> None:
    """Raises CheckpointError if the newest checkpoint in `run_dir` is of another run.

    identity: what must be the same to go on, by part: model, objective, data.
    """
    folder = newest(run_dir)
    if folder is None:
        return
    manifest = read_manifest(folder)
    for part, ours in identity.items():
        changes = _changes(part, manifest[part], ours)
        if changes:
            more = f" and {len(changes) - _SHOWN} more" if len(changes) > _SHOWN else ""
            raise CheckpointError(
                f"{folder} was made with other {part} settings: {', '.join(changes[:_SHOWN])}"
                f"{more}; restore them to resume, or set another run_dir to start anew"
            )


def _changes(name: str, theirs: Any, ours: Any) -> list[str]:
    """`key=now (checkpoint: then)` for every leaf that differs."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        # why: of another family everything differs, and its name says it all
        keys = sorted(theirs.keys() | ours.keys(), key=lambda k: (k not in ("family", "size"), k))
        return [c for k in keys for c in _changes(f"{name}.{k}", theirs.get(k), ours.get(k))]
    if theirs == ours:
        return []
    return [f"{_SET_BY.get(name, name)}={_short(ours)} (checkpoint: {_short(theirs)})"]


def _short(value: Any) -> str:
    text = "null" if value is None else "{…}" if isinstance(value, dict) else str(value)
    return text if len(text) <= 24 else f"{text[:12]}…"


class Checkpoint:
    """Saves and restores a TrainState in one run directory. Every rank calls every method."""

    def __init__(
        self,
        cfg: CheckpointConfig,
        run_dir: Path,
        facts: dict[str, Any],
        say: Callable[[str], None],
    ) -> None:
        """facts: what the manifest holds beside the state: the run's identity, latents, config."""
        self._cfg = cfg
        self._run_dir = run_dir
        self._facts = facts
        self._say = say

    def restore(self, state: TrainState) -> bool:
        """Loads the newest checkpoint that is whole and undamaged; False for a fresh run."""
        candidates = [sorted(root(self._run_dir).glob("step_*"), reverse=True)]
        dist.broadcast_object_list(candidates, src=0)  # dist: once, so that all agree on the list
        for folder in candidates[0]:
            problem = self._damage(folder)
            if problem is not None:
                self._say(f"checkpoint skipped: {problem}; the one before it is used")
                continue
            tensors = state.tensors()
            storage.read(tensors, folder)
            state.loaded(read_manifest(folder)["state"])
            return True
        return False

    def _damage(self, folder: Path) -> str | None:
        """What is wrong with a checkpoint, agreed by all ranks; each hashes a part of the files."""
        problem = None
        try:
            files = sorted(read_manifest(folder)["files"].items())
            for name, entry in files[dist.get_rank() :: dist.get_world_size()]:
                if storage.sha256(folder / name) != entry["sha256"]:
                    problem = f"{folder / name} does not match its checksum"
        except CheckpointError as error:
            problem = str(error)
        found: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(found, problem)  # dist: once a candidate
        return next((p for p in found if p is not None), None)

    def save(self, state: TrainState) -> None:
        """Writes the state of this step; saving a saved step is a no-op."""
        final = root(self._run_dir) / f"step_{state.step:08d}"
        done = [(final / "manifest.json").is_file()]
        dist.broadcast_object_list(done, src=0)  # dist: once a save
        if done[0]:
            return
        partial = final.with_name(f".{final.name}.partial")
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
            shutil.rmtree(final, ignore_errors=True)
            partial.mkdir(parents=True)
        dist.barrier()  # dist: the directory exists
        files = storage.write(state.tensors(), partial)
        if dist.get_rank() == 0:
            self._publish(partial, final, files, state)
        dist.barrier()  # dist: the checkpoint is whole

    def _publish(
        self, partial: Path, final: Path, files: dict[str, Any], state: TrainState
    ) -> None:
        manifest = {"format": FORMAT, "state": state.scalars(), "files": files, **self._facts}
        manifest["torch"] = str(torch.__version__)
        write_whole(partial / "manifest.json", json.dumps(manifest, indent=1))
        storage.flush(partial)
        partial.rename(final)
        storage.flush(final.parent)
        write_whole(self._run_dir / "latest", f"{state.step}\n")
        for folder in self._expired():
            # why: renamed first, so that a kill while deleting leaves no half checkpoint behind.
            dying = folder.rename(folder.with_name(f".{folder.name}.expired"))
            shutil.rmtree(dying)

    def _expired(self) -> list[Path]:
        folders = sorted(root(self._run_dir).glob("step_*"))
        whole = [f for f in folders if (f / "manifest.json").is_file()]
        old = whole[: -self._cfg.keep]
        forever = self._cfg.keep_every
        return [f for f in old if forever is None or int(f.name.split("_")[1]) % forever]


def write_whole(path: Path, text: str) -> None:
    """Replaces a small file so that a reader sees the old text or the new, never a part."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    storage.flush(partial)
    os.replace(partial, path)
