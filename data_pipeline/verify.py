"""Checks every byte of an encoded set against its manifest and index. Not needed to load it."""

import tarfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data_pipeline.shards import Manifest, Split, npy_header, read_index, sha256

PER_FILE = 10  # problems reported for one file, so that one bad tar does not hide the others


@dataclass
class Report:
    """What verify looked at and what it found wrong."""

    files: int = 0
    samples: int = 0
    problems: list[str] = field(default_factory=list)  # one sentence each, naming the file

    @property
    def ok(self) -> bool:
        return not self.problems


def verify(path: str | Path) -> Report:
    """Read the whole set: checksums, tar structure, index and labels.

    Raises DataError only if there is no usable manifest; whatever else is wrong is in the report.
    """
    root = Path(path)
    manifest = Manifest.load(root)
    report = Report()
    for name, split in manifest.splits.items():
        _verify_split(root, manifest, name, split, report)
    return report


def _verify_split(root: Path, manifest: Manifest, name: str, split: Split, out: Report) -> None:
    out.files += 1
    try:
        index = read_index(root, split)
    except ValueError as error:
        out.problems.append(str(error))
        return
    if sha256(root / split.index) != split.index_sha256:
        out.problems.append(f"{split.index}: SHA-256 differs from the manifest")
    wrong = np.flatnonzero((index["label"] < 0) | (index["label"] >= manifest.num_classes))
    if len(wrong):
        label = index["label"][wrong[0]]
        out.problems.append(
            f"{split.index}: {len(wrong)} label(s) outside 0..{manifest.num_classes - 1}, "
            f"first is {label} of sample {wrong[0]}"
        )
    if sum(shard.count for shard in split.shards) != split.count:
        out.problems.append(f"{name}: shard counts do not add up to {split.count}")
    first, last_key = 0, -1  # row of a tar's first sample; key before it
    for number, shard in enumerate(split.shards):
        out.files += 1
        rows = index[first : first + shard.count]
        first += shard.count
        file = root / shard.name
        if not file.is_file():
            out.problems.append(f"{shard.name}: missing")
            continue
        if file.stat().st_size != shard.bytes:
            out.problems.append(
                f"{shard.name}: {file.stat().st_size} bytes, the manifest says {shard.bytes}"
            )
        elif sha256(file) != shard.sha256:
            out.problems.append(f"{shard.name}: SHA-256 differs from the manifest")
        found: list[str] = []
        whole, last_key = _walk(file, number, manifest, split, rows, last_key, found)
        out.samples += whole
        if whole != shard.count:
            found.append(f"{whole} whole samples, the manifest says {shard.count}")
        out.problems += [f"{shard.name}: {problem}" for problem in found[:PER_FILE]]


def _walk(
    file: Path,
    number: int,
    manifest: Manifest,
    split: Split,
    rows: np.ndarray,
    last_key: int,
    found: list[str],
) -> tuple[int, int]:
    """Compare each member of a tar with its rows of the index.

    Keys rise by one inside a tar, and over tars too, with gaps where parts were joined.
    Returns how many samples are whole, and the last key.
    """
    dtype = np.dtype(manifest.dtype).newbyteorder("<")
    head = npy_header(manifest.stored_shape, dtype)
    parts: dict[int, set[str]] = {}
    first = None
    try:
        with tarfile.open(file, "r:") as tar:
            for member in tar:
                stem, _, kind = member.name.partition(".")
                key = int(stem) if stem.isdigit() else -1
                first = max(key, last_key + 1) if first is None else first
                if not first <= key < first + len(rows):
                    found.append(f"member {member.name} is not in the index")
                    continue
                data = tar.extractfile(member)
                body = data.read() if data is not None else b""
                row = rows[key - first]
                problem = _member(kind, body, member.offset_data, head, number, row)
                if problem:
                    found.append(f"member {member.name} at offset {member.offset}: {problem}")
                else:
                    parts.setdefault(key, set()).add(kind)
    except (tarfile.TarError, OSError, EOFError) as error:
        found.append(f"not readable as a tar to its end: {error}")
    want = {"npy", "cls"} | ({"flip.npy"} if split.variants == 2 else set())
    whole = sum(kinds == want for kinds in parts.values())
    return whole, max(parts, default=last_key)


def _member(
    kind: str, body: bytes, place: int, head: bytes, number: int, row: np.ndarray
) -> str | None:
    """What is wrong with one member of a tar, or None."""
    if row["shard"] != number:
        return f"the index puts it into shard {row['shard']}"
    if kind == "cls":
        same = body == str(row["label"]).encode("ascii")
        return None if same else f"label {body!r}, the index says {row['label']}"
    variant = {"npy": 0, "flip.npy": 1}.get(kind, len(row["offset"]))
    if variant >= len(row["offset"]):
        return "unexpected member"
    if not body.startswith(head):
        return "its npy header does not fit the manifest's shape and dtype"
    if place + len(head) != row["offset"][variant]:
        return f"payload at {place + len(head)}, the index says {row['offset'][variant]}"
    same = zlib.crc32(body[len(head) :]) == row["crc"][variant]
    return None if same else "CRC-32 differs from the index"
