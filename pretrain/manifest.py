"""Checkpoints on disk: their names and manifests, which may go, and which fits a run.

Moves no training state; `pretrain.checkpoint` does. A directory appears whole or not at all:
`manifest.json` is written last, and without it, it is not a checkpoint.
"""

import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import (
    BaseModel,
    ConfigDict,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)
from torch import Tensor

from parallel import saving, storage
from parallel.errors import DamagedError
from parallel.index import INDEX, Index, check_seal, sealed

FORMAT = 2  # of the manifest; another is refused


class CheckpointError(ValueError):
    """A checkpoint that does not fit, or none where one is needed."""


class CheckpointConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    # Steps between saves; auto: from what a save costs (pretrain.interval). Training numbers do not
    # depend on it, except through what a roll-back of the guard goes back to.
    every: PositiveInt | Literal["auto"] = "auto"
    # Hours between two failures of one node. Llama 3 saw 419 unexpected interruptions in 54 days on
    # 16,384 GPUs (arXiv 2407.21783, §3.3.4): 54·24·2048/419 = 6,300 h a node of 8. 1,000 is a
    # cautious choice for a cluster that nobody has measured; T goes with its root only.
    mtbf_hours: PositiveFloat = 1000.0
    keep: PositiveInt = 3  # newest ones kept
    keep_every: PositiveInt | None = None  # steps; multiples of it are kept for ever
    ephemeral: PositiveInt | None = None  # steps between further saves, gone with the next one
    accept: tuple[Literal["global_batch", "data"], ...] = ()  # what may differ on resume

    @field_validator("every", mode="wrap")
    @classmethod
    def _number_or_auto(cls, value: Any, check: ValidatorFunctionWrapHandler) -> Any:
        """Why: a union reports an error a member, under names that nobody typed."""
        try:
            return check(value)
        except ValidationError:
            raise ValueError(f"{value!r} came; set it to a whole number above 0, or auto") from None

    @model_validator(mode="after")
    def _parts_fit(self) -> "CheckpointConfig":
        if self.every == "auto" and self.ephemeral is not None:
            # why: which ones are ephemeral must be told from the step alone.
            raise ValueError(
                f"ephemeral={self.ephemeral} lies between saves at fixed steps, but every=auto; "
                "set every to a number, or leave ephemeral out"
            )
        return self


def root(run_dir: Path) -> Path:
    return run_dir / "checkpoints"


def stored(run_dir: Path) -> list[Path]:
    """The checkpoint directories of a run, oldest first, whole or not."""
    named = (f for f in root(run_dir).glob("step_*") if re.fullmatch(r"step_\d+", f.name))
    return sorted(named, key=step_of)


def step_of(folder: Path) -> int:
    return int(folder.name.split("_")[1])


class _State(BaseModel):
    """What a training state reads back; other numbers may lie beside them."""

    model_config = ConfigDict(strict=True)

    step: NonNegativeInt
    position: NonNegativeInt = 0
    passed_over: list[list[NonNegativeInt]] = []
    skipped: NonNegativeInt = 0
    skipped_in_a_row: NonNegativeInt = 0
    skipped_from: NonNegativeInt = 0
    fp8: dict[str, Any] = {}

    @field_validator("passed_over")
    @classmethod
    def _are_stretches(cls, stretches: list[list[int]]) -> list[list[int]]:
        if not all(len(s) == 2 and s[0] < s[1] for s in stretches):
            raise ValueError("a stretch has a first position and a later one")
        return stretches


class _Manifest(BaseModel):
    """The kinds of what a manifest holds; whoever uses a part looks at what is in it."""

    state: _State
    config: dict[str, Any]
    latents: dict[str, Any]
    model: dict[str, Any]
    objective: dict[str, Any]
    data: dict[str, Any] | None
    interval: PositiveInt | None = None  # steps to the next save, if the run chooses it


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of one checkpoint.

    Raises DamagedError if it is missing or broken, or if a file it names is missing or has another
    size; CheckpointError if it is of another format, or cannot be read.
    """
    path = folder / INDEX
    try:
        manifest = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise DamagedError(f"{folder} has no {INDEX}: the save did not finish") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}; see to its disk") from error
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{path} is damaged: {error}") from error
    if not isinstance(manifest, dict) or type(manifest.get("format")) is not int:
        raise DamagedError(f"{path} is damaged: it states no format")
    if "splits" in manifest:
        raise CheckpointError(f"{folder} is a data set, not a checkpoint; give one, or a run")
    if manifest["format"] != FORMAT:
        newer = manifest["format"] > FORMAT
        raise CheckpointError(
            f"{folder} has format {manifest['format']}, this version reads {FORMAT}; "
            f"install the {'newer' if newer else 'older'} version that wrote it, "
            "or set another run_dir to start anew"
        )
    try:
        check_seal(manifest)
        _Manifest.model_validate(manifest)
        index = Index.from_json(manifest)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise DamagedError(f"{path} is damaged: {where}: {first['msg']}") from error
    except DamagedError as error:
        raise DamagedError(f"{path} is damaged: {error}") from error
    check_files(folder, index)
    return manifest


def check_files(folder: Path, index: Index) -> None:
    """Raises DamagedError if a file is missing or has another size."""
    for name, entry in index.files.items():
        file = folder / name
        size = file.stat().st_size if file.is_file() else None
        if size != entry.bytes:
            raise DamagedError(
                f"{file} has {'no' if size is None else size} bytes, expected {entry.bytes}"
            )


def newest(run_dir: Path, say: Callable[[str], None] = lambda _: None) -> Path | None:
    """The newest whole checkpoint of a run, None if there is none; `say` hears what others lack.

    Raises CheckpointError for one of another format.
    """
    for folder in reversed(stored(run_dir)):
        try:
            read_manifest(folder)
        except DamagedError as error:
            say(str(error))
            continue
        return folder
    return None


def locate(place: Path) -> Path:
    """The checkpoint that a run directory or a checkpoint directory means.

    Damaged ones that are passed over are named on stderr. Raises CheckpointError if none is whole.
    """
    if (place / INDEX).is_file():
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


# How what a manifest holds is set, and what accepts that one of them differs.
_SET_BY = {
    "data.fingerprint": "data.path (SHA-256 of its index)",
    "data.seed": "seed",
    "model.mup": "parametrisation, model.mup",
}
_ACCEPTED_BY: dict[str, Literal["global_batch", "data"]] = {
    "global_batch": "global_batch",
    "fingerprint": "data",
    "order": "data",
    "seed": "data",
}
_SHOWN = 4  # changes named in one message


def check_fit(
    run_dir: Path,
    identity: dict[str, Any],
    averages: Iterable[str],
    accept: Collection[str],
) -> None:
    """Raises CheckpointError if the newest checkpoint in `run_dir` is of another run.

    identity: what must be the same to go on, by part: model, objective, data. averages: the names
    of those that are to go on too. accept: as in CheckpointConfig.
    """
    folder = newest(run_dir)
    if folder is None:
        return
    manifest = read_manifest(folder)
    lacking = [a for a in averages if not any(t.startswith(f"{a}.") for t in manifest["tensors"])]
    if lacking:
        raise CheckpointError(
            f"{folder} holds no average {lacking[0]}, which ema.half_lives or ema.power ask for; "
            "an average cannot begin halfway: take it out, or set another run_dir to start anew"
        )
    check_same(folder, manifest, identity, accept)


def check_same(
    folder: Path, manifest: dict[str, Any], identity: dict[str, Any], accept: Collection[str]
) -> None:
    """Raises CheckpointError if a checkpoint is of another run; see `check_fit`."""
    for part in ("model", "objective", "data"):
        theirs, ours = manifest[part], identity[part]
        if theirs is None:
            continue  # why: imported weights have not seen any data
        how = ""
        if part == "data":
            needed = {_ACCEPTED_BY[k] for k in differing(theirs, ours)} - set(accept)
            theirs = {k: v for k, v in theirs.items() if _ACCEPTED_BY.get(k) in needed}
            ours = {k: v for k, v in ours.items() if k in theirs}
            wanted = ",".join(sorted(needed | set(accept)))
            how = f", or go on all the same with 'checkpoint.accept=[{wanted}]'"
        changes = changes_of(part, theirs, ours)
        if changes:
            more = f" and {len(changes) - _SHOWN} more" if len(changes) > _SHOWN else ""
            raise CheckpointError(
                f"{folder} was made with other {part} settings: {', '.join(changes[:_SHOWN])}"
                f"{more}; restore them to resume, or set another run_dir to start anew{how}"
            )


def differing(theirs: dict[str, Any], ours: dict[str, Any]) -> set[str]:
    return {key for key, value in ours.items() if theirs.get(key) != value}


def changes_of(name: str, theirs: Any, ours: Any) -> list[str]:
    """`key=now (checkpoint: then)` for every leaf that differs."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        # why: of another family everything differs, and its name says it all
        keys = sorted(theirs.keys() | ours.keys(), key=lambda k: (k not in ("family", "size"), k))
        return [c for k in keys for c in changes_of(f"{name}.{k}", theirs.get(k), ours.get(k))]
    if theirs == ours:
        return []
    return [f"{_SET_BY.get(name, name)}={_short(ours)} (checkpoint: {_short(theirs)})"]


def _short(value: Any) -> str:
    text = "null" if value is None else "{…}" if isinstance(value, dict) else str(value)
    return text if len(text) <= 24 else f"{text[:12]}…"


def expired(cfg: CheckpointConfig, steps: list[int]) -> list[int]:
    """Which of the whole checkpoints, oldest first, may go; never the newest."""
    lasting = [step for step in steps if not is_ephemeral(cfg, step)]
    forever = cfg.keep_every
    old = {*lasting[: -cfg.keep], *(s for s in steps if is_ephemeral(cfg, s))}
    return [s for s in steps[:-1] if s in old and (forever is None or s % forever)]


def is_ephemeral(cfg: CheckpointConfig, step: int) -> bool:
    if cfg.ephemeral is None or cfg.every == "auto":
        return False
    return step % cfg.ephemeral == 0 and step % cfg.every > 0


def publish(
    partial: Path, final: Path, index: Index, scalars: dict[str, Any], facts: dict[str, Any]
) -> None:
    """Manifest last, then the name under which it is found. Raises OSError."""
    manifest = {"format": FORMAT, "state": scalars, **facts, "torch": str(torch.__version__)}
    try:
        check_files(partial, index)
    except DamagedError as error:
        raise OSError(f"{error}; does every node see the same run_dir?") from error
    write_whole(partial / INDEX, json.dumps(sealed(manifest | index.to_json())))
    storage.flush(partial)
    before = final.with_name(f".{final.name}.expired")
    shutil.rmtree(before, ignore_errors=True)
    if final.exists():
        final.rename(before)
    partial.rename(final)
    storage.flush(final.parent)
    shutil.rmtree(before, ignore_errors=True)


def write_alone(
    folder: Path,
    tensors: Iterable[tuple[str, Tensor]],
    scalars: dict[str, Any],
    facts: dict[str, Any],
) -> None:
    """Writes a checkpoint directory from one process, holding few tensors at a time.

    scalars: as TrainState.scalars(). facts: as of a Checkpoint. Raises CheckpointError if `folder`
    exists or cannot be written.
    """
    if folder.exists():
        raise CheckpointError(f"{folder} exists; give another directory, or remove it")
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        publish(partial, folder, saving.write_alone(tensors, partial), scalars, facts)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_whole(path: Path, text: str) -> None:
    """Replaces a small file so that a reader sees the old text or the new, never a part."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    storage.flush(partial)
    os.replace(partial, path)
