"""Joins the parts of a set, by renaming their tars; no tar is read. It can be killed and run again.

merge("data/in256")  # data/in256/parts/1-of-8 … 8-of-8 become data/in256
"""

import hashlib
import io
import os
import re
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_pipeline import parts
from data_pipeline.codecs import open_codec
from data_pipeline.errors import DataError
from data_pipeline.moments import Moments
from data_pipeline.shards import (
    MANIFEST,
    QUARANTINE,
    Manifest,
    Shard,
    Split,
    index_name,
    read_index,
    shard_name,
)

_DONE = ".parts.merged"  # what the folder of parts is called while it is removed


class _Part(NamedTuple):
    root: Path
    manifest: Manifest

    def damaged(self, what: str) -> DataError:
        part = parts.of(self.manifest)
        return DataError(
            f"part '{self.root}' is damaged: {what}; encode it again with "
            f"--part {part.number}/{part.of}."
        )


class _Move(NamedTuple):
    part: _Part
    shard: Shard  # as the part calls it
    name: str  # as the set will call it


class _Plan(NamedTuple):
    manifest: Manifest  # of the set
    moves: list[_Move]
    indexes: dict[str, bytes]  # by file name


def merge(out: str | Path, *, overwrite: bool = False) -> Manifest:
    """Join all parts below out/parts into one set at `out`, and remove the parts at the end.

    Raises DataError for parts that are missing, damaged or do not belong together, and for a set
    that is there already (overwrite replaces it).
    """
    out = Path(out)
    folder = out / parts.FOLDER
    if not folder.is_dir():
        return _finished(out)
    found = _found(folder)
    plan = _plan(found)
    old = Manifest.load(out) if (out / MANIFEST).is_file() else None
    if old != plan.manifest:
        _check_shards(out, plan.moves, some_moved=old is None)
        if old is not None:
            _remove(out, old, overwrite)
        for part, shard, name in plan.moves:
            if (part.root / shard.name).is_file():
                os.rename(part.root / shard.name, out / name)
        for name, data in plan.indexes.items():
            (out / name).write_bytes(data)
        _join_quarantine(out, found)
        plan.manifest.save(out)
    shutil.rmtree(out / _DONE, ignore_errors=True)
    os.rename(folder, out / _DONE)
    return _finished(out)


def _finished(out: Path) -> Manifest:
    """Sweep up after a merge whose set is complete."""
    if not (out / MANIFEST).is_file():
        raise DataError(
            f"'{out}' has no {parts.FOLDER} to join; make them with "
            f"`pretrain data encode SRC --out {out} --part I/N`."
        )
    shutil.rmtree(out / _DONE, ignore_errors=True)
    return Manifest.load(out)


def _found(folder: Path) -> list[_Part]:
    """All parts in order; raises DataError if one is missing or they differ in settings."""
    names = [re.fullmatch(r"([0-9]+)-of-([0-9]+)", path.name) for path in folder.iterdir()]
    numbers = sorted((int(n[2]), int(n[1])) for n in names if n)
    ofs = {of for of, _ in numbers}
    if len(ofs) > 1:
        raise DataError(
            f"'{folder}' holds parts of several cuts, into {sorted(ofs)}; remove the directories "
            f"of all but one."
        )
    count = ofs.pop() if ofs else 0
    roots = [folder / f"{number}-of-{count}" for number in range(1, count + 1)]
    missing = [f"{i}/{count}" for i, root in enumerate(roots, 1) if not (root / MANIFEST).is_file()]
    if missing or not count:
        raise DataError(
            f"'{folder}' lacks part {', '.join(missing) or '1/N'}; encode it with "
            f"`pretrain data encode SRC --out {folder.parent} --part {(missing or ['1/N'])[0]}`."
        )
    found = [_Part(root, Manifest.load(root)) for root in roots]
    for number, part in enumerate(found, 1):
        held = part.manifest.part
        if held is None or (held.number, held.of) != (number, count):
            raise DataError(f"'{part.root}' does not hold part {number}/{count}; remove it.")
        _check_fits(found[0], part)
        if part.manifest.quarantine and not (part.root / part.manifest.quarantine).is_file():
            raise part.damaged(f"{part.manifest.quarantine} is missing")
    return found


def _check_fits(first: _Part, part: _Part) -> None:
    found = parts.differences(first.manifest, part.manifest)
    if found:
        raise DataError(
            f"'{first.root}' and '{part.root}' were encoded with other settings: "
            f"{parts.tell(found)}; encode one of them again with --overwrite."
        )


def _plan(found: list[_Part]) -> _Plan:
    """Everything the set will be, before anything is moved."""
    splits: dict[str, Split] = {}
    moves: list[_Move] = []
    indexes: dict[str, bytes] = {}
    for name in parts.of(found[0].manifest).source:
        own = [part for part in found if name in part.manifest.splits]
        if own:
            moved, index = _join(name, own)
            moves += moved
            indexes[index_name(name)] = index
            splits[name] = Split(
                count=sum(part.manifest.splits[name].count for part in own),
                variants=own[0].manifest.splits[name].variants,
                index=index_name(name),
                index_sha256=hashlib.sha256(index).hexdigest(),
                shards=[m.shard.model_copy(update={"name": m.name}) for m in moved],
            )
    if "train" not in splits:
        raise DataError(f"no part in '{found[0].root.parent}' has a readable training image.")
    return _Plan(_describe(found, splits), moves, indexes)


def _join(name: str, own: list[_Part]) -> tuple[list[_Move], bytes]:
    """The tars of a split under continuing numbers, and the file of its index."""
    moves: list[_Move] = []
    rows: list[np.ndarray] = []
    for part in own:
        split = part.manifest.splits[name]
        problem = parts.broken_index(part.root, split)
        if problem:
            raise part.damaged(problem)
        index = read_index(part.root, split).copy()
        index["shard"] += len(moves)
        rows.append(index)
        moves += [
            _Move(part, shard, shard_name(name, len(moves) + i))
            for i, shard in enumerate(split.shards)
        ]
    file = io.BytesIO()
    np.save(file, np.concatenate(rows), allow_pickle=False)
    return moves, file.getvalue()


def _describe(found: list[_Part], splits: dict[str, Split]) -> Manifest:
    """The manifest of the set. Raises DataError if the parts hold images of different shapes."""
    moments = Moments()
    for part in found:
        held = parts.of(part.manifest)
        moments.join(held.values, held.total, held.square)
    mean, std = moments.result()
    seen = [part for part in found if part.manifest.splits]
    for part in seen[1:]:
        shapes = seen[0].manifest.image_shape, part.manifest.image_shape
        if shapes[0] != shapes[1]:
            raise DataError(
                f"the images of '{seen[0].root}' are (c, h, w) = {shapes[0]}, those of "
                f"'{part.root}' {shapes[1]}; encode all parts again with --size."
            )
    first = seen[0].manifest
    shift, scale = first.shift, first.scale  # of a codec with weights: the same in all parts
    if first.codec_source is None:
        shift, scale = open_codec(first.codec).normalisation(mean, std)
    quarantined = sum(part.manifest.quarantined for part in found)
    return first.model_copy(
        update={
            "shift": shift,
            "scale": scale,
            "mean": mean.tolist(),
            "std": std.tolist(),
            "splits": splits,
            "quarantined": quarantined,
            "quarantine": QUARANTINE if quarantined else None,
            "part": None,
        }
    )


def _check_shards(out: Path, moves: list[_Move], some_moved: bool) -> None:
    """Every tar is whole, in its part or, after a merge that was killed, in the set."""
    for part, shard, name in moves:
        file = part.root / shard.name
        if some_moved and not file.is_file() and (out / name).is_file():
            file = out / name
        problem = parts.broken_shard(file, shard)
        if problem:
            raise part.damaged(problem)


def _remove(out: Path, old: Manifest, overwrite: bool) -> None:
    """Remove an older set, its manifest last, so that a killed removal is known for what it is."""
    if not overwrite:
        raise DataError(
            f"'{out}' holds another set beside the parts; give --overwrite to replace it, or "
            f"remove '{out / parts.FOLDER}'."
        )
    names = [shard.name for split in old.splits.values() for shard in split.shards]
    names += [split.index for split in old.splits.values()]
    for name in [*names, QUARANTINE, MANIFEST]:
        (out / name).unlink(missing_ok=True)


def _join_quarantine(out: Path, found: list[_Part]) -> None:
    files = [part.root / part.manifest.quarantine for part in found if part.manifest.quarantine]
    if files:
        (out / QUARANTINE).write_text("".join(file.read_text() for file in files))
