"""Latents on disk: WebDataset tars, one index per split, one manifest for all. Not the loader.

A set is a directory: `train-000000.tar` … with `{key}.npy` (raw latent), `{key}.flip.npy`
(mirrored, if stored) and `{key}.cls` (ascii label); `train.index.npy`; `manifest.json`, written
last. The index holds where each payload lies, so that one sample is one read.
"""

import hashlib
import io
import json
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import webdataset
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator
from torch import Tensor

from data_pipeline.errors import DataError

FORMAT = 1
MANIFEST = "manifest.json"
QUARANTINE = "quarantine.jsonl"
BLOCK = 512  # bytes, the tar block


def _plain(name: str, ending: str) -> str:
    if Path(name).name != name or not name.endswith(ending):
        raise ValueError(f"must be a plain file name that ends with {ending}")
    return name


class Piece(BaseModel):
    """A piece of the manifest: frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Shard(Piece):
    """One tar file."""

    name: str  # file name inside the set
    bytes: int
    sha256: str
    count: int  # samples

    @field_validator("name")
    @classmethod
    def _stays_inside(cls, name: str) -> str:
        return _plain(name, ".tar")


class Split(Piece):
    """One split: its tars and its index."""

    count: int  # samples
    variants: int  # stored orientations of a sample: 1, or 2 with the mirrored one
    index: str  # file name inside the set
    index_sha256: str
    shards: list[Shard]

    @field_validator("index")
    @classmethod
    def _stays_inside(cls, name: str) -> str:
        return _plain(name, ".npy")


class Part(Piece):
    """Which part of a whole encoding a set is, and what joining the parts needs (merge.py)."""

    number: int  # from 1
    of: int
    source: dict[str, str]  # by split: SHA-256 of the list of its images
    size: int | None  # pixels, as asked
    limit: int | None
    batch: int
    shard_bytes: int
    values: int  # of a channel, in the train images of this part
    total: list[list[float]]  # their sum, exactly (moments.py)
    square: list[list[float]]  # the sum of their squares


class Manifest(Piece):
    """What a set holds and how its raw latents become model input."""

    format: int = FORMAT
    codec: str  # id, such as haar1 or kl
    codec_hash: str  # of the weights, or of the id where there are none
    codec_source: str | None  # where the weights came from, as the user gave it
    image_shape: tuple[int, int, int]  # (c, h, w) pixels
    latent_shape: tuple[int, int, int]  # (C, H, W) what the model sees
    stored_shape: tuple[int, int, int]  # (C, H, W), or (2C, H, W) for mean and log-variance
    posterior: bool  # stored are mean and log-variance, x is drawn afresh each time
    dtype: str  # of the stored values: float16 or float32
    shift: list[float]  # per channel, x = (raw - shift) * scale
    scale: list[float]
    mean: list[float]  # per channel, of the raw latents of the train split
    std: list[float]
    class_names: list[str]
    num_classes: int
    lanes: int  # contiguous ranges read side by side (order.py)
    flips: bool  # the train split stores both orientations
    seed: int  # of the order in which samples were written
    splits: dict[str, Split]
    quarantined: int  # source files that were no image
    quarantine: str | None  # file that lists them
    part: Part | None = None  # this set is a part of a set that is still to be joined

    @classmethod
    def load(cls, path: str | Path) -> "Manifest":
        """The manifest of the set in a directory; raises DataError if there is none to use."""
        root = Path(path)
        if not root.is_dir():
            raise DataError(
                f"data directory '{root}' does not exist; make it with "
                f"`pretrain data encode SRC --out {root}` or correct data.path."
            )
        file = root / MANIFEST
        if not file.is_file():
            raise DataError(
                f"directory '{root}' has no {MANIFEST}, so it is not an encoded set; run "
                f"`pretrain data encode SRC --out DIR` and set data.path to that DIR."
            )
        try:
            raw = json.loads(file.read_text())
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise DataError(f"'{file}' is not readable as JSON ({error}); encode again.") from error
        version = raw.get("format") if isinstance(raw, dict) else None
        if version != FORMAT:
            raise DataError(
                f"'{file}' has format {version!r}, this program reads format {FORMAT}; "
                f"encode the set again with this version."
            )
        try:
            return cls.model_validate(raw)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"])
            raise DataError(
                f"'{file}' is damaged: {place}: {first['msg']}; encode the set again."
            ) from error

    def save(self, root: Path) -> None:
        """Write the manifest: the last file of a set, which makes it one."""
        fresh = root / f".{MANIFEST}.partial"
        fresh.write_text(self.model_dump_json(indent=1) + "\n")
        os.rename(fresh, root / MANIFEST)

    def split(self, name: str) -> Split:
        """A split by name; raises DataError naming those that exist."""
        if name not in self.splits:
            raise DataError(
                f"split '{name}' is not in the set, which has {sorted(self.splits)}; "
                f"set data.split to one of them."
            )
        return self.splits[name]

    def normalise(self, raw: Tensor) -> Tensor:
        """x = (raw - shift) * scale. raw: (B, C, H, W) latents as the codec gives them."""
        shift = raw.new_tensor(self.shift)[:, None, None]
        return (raw - shift) * raw.new_tensor(self.scale)[:, None, None]

    def denormalise(self, x: Tensor) -> Tensor:
        """raw = x / scale + shift, the inverse of normalise. x: (B, C, H, W)."""
        shift = x.new_tensor(self.shift)[:, None, None]
        return x / x.new_tensor(self.scale)[:, None, None] + shift


def shard_name(split: str, number: int) -> str:
    """File name of a tar of a split."""
    return f"{split}-{number:06d}.tar"


def index_name(split: str) -> str:
    """File name of the index of a split."""
    return f"{split}.index.npy"


def index_dtype(variants: int) -> np.dtype:
    """One row a sample: where the payload of each orientation lies, its label and checksums."""
    return np.dtype(
        [
            ("offset", "<u8", (variants,)),  # bytes from the start of the tar
            ("shard", "<u4"),  # number in the split's list of shards
            ("label", "<i4"),
            ("crc", "<u4", (variants,)),  # CRC-32 of the payload
        ]
    )


def read_index(root: str | Path, split: Split) -> np.ndarray:
    """The split's index, mapped from disk; raises DataError if it is missing or damaged."""
    file = Path(root) / split.index
    try:
        index = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(
            f"index '{file}' cannot be read ({error}); restore it or encode the set again."
        ) from error
    if index.dtype != index_dtype(split.variants) or index.shape != (split.count,):
        raise DataError(
            f"index '{file}' holds {index.shape} rows of {index.dtype}, the manifest promises "
            f"{split.count} samples in {split.variants} orientation(s); encode the set again."
        )
    return index


def npy_header(shape: Sequence[int], dtype: np.dtype) -> bytes:
    """The bytes before the payload of an `.npy` file of this shape and type."""
    head = io.BytesIO()
    description = {"descr": dtype.str, "fortran_order": False, "shape": tuple(shape)}
    np.lib.format.write_array_header_1_0(head, description)
    return head.getvalue()


class _HashedFile:
    """A file that is hashed and counted while it is written."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("wb")
        self.sha256 = hashlib.sha256()
        self.bytes = 0

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        self.bytes += len(data)
        return self.file.write(data)


class SplitWriter:
    """Writes the tars and the index of one split. Same samples, same bytes."""

    def __init__(
        self, root: Path, name: str, *, shard_bytes: int, variants: int, first: int = 0
    ) -> None:
        self.root, self.name = root, name
        self.first = first  # key of the first sample; they rise by one from there
        self.shard_bytes, self.variants = shard_bytes, variants
        self.count = 0
        self._rows: list[tuple[Any, ...]] = []  # as in index_dtype
        self._shards: list[Shard] = []
        self._file: _HashedFile | None = None

    def write(self, latents: Sequence[np.ndarray], label: int) -> None:
        """Append a sample: its latent in each stored orientation, (C, H, W) each."""
        assert len(latents) == self.variants, f"{len(latents)} orientations, not {self.variants}"
        if self._file is None:
            self._open()
        payloads = [np.ascontiguousarray(latent).tobytes() for latent in latents]
        head = npy_header(latents[0].shape, latents[0].dtype)
        text = str(label).encode("ascii")
        # The writer sorts members by name: cls, flip.npy, npy.
        start = self._tar.tarstream.offset + BLOCK + -(-len(text) // BLOCK) * BLOCK
        size = BLOCK + -(-(len(head) + len(payloads[0])) // BLOCK) * BLOCK
        places = [start + BLOCK + len(head) + i * size for i in range(self.variants)][::-1]
        sample = {
            "__key__": f"{self.first + self.count:09d}",
            "cls": text,
            "npy": head + payloads[0],
        }
        if self.variants == 2:
            sample["flip.npy"] = head + payloads[1]
        self._tar.write(sample)
        crcs = [zlib.crc32(payload) for payload in payloads]
        self._rows.append((tuple(places), len(self._shards), label, tuple(crcs)))
        self.count += 1
        self._in_shard += 1
        if self._tar.tarstream.offset >= self.shard_bytes:
            self._close_shard()

    def close(self) -> Split:
        """Finish the last tar, write the index, and say what was written."""
        if self._file is not None:
            self._close_shard()
        index = np.array(self._rows, index_dtype(self.variants))
        file = self.root / index_name(self.name)
        np.save(file, index, allow_pickle=False)
        return Split(
            count=self.count,
            variants=self.variants,
            index=file.name,
            index_sha256=sha256(file),
            shards=self._shards,
        )

    def abort(self) -> None:
        """Close the file handle without finishing; what was written is the caller's to remove."""
        if self._file is not None:
            self._file.file.close()
            self._file = None

    def _open(self) -> None:
        self._path = self.root / shard_name(self.name, len(self._shards))
        self._file = _HashedFile(self._path)
        # why: fixed owner, mode and time, so that the same samples give the same bytes
        self._tar = webdataset.TarWriter(
            cast(BinaryIO, self._file), user="", group="", mode=0o644, mtime=0, encoder=False
        )
        self._in_shard = 0

    def _close_shard(self) -> None:
        assert self._file is not None, "no open shard"
        self._tar.close()
        self._file.file.close()
        shard = Shard(
            name=self._path.name,
            bytes=self._file.bytes,
            sha256=self._file.sha256.hexdigest(),
            count=self._in_shard,
        )
        self._shards.append(shard)
        self._file = None


def sha256(file: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def stat(path: str | Path) -> dict[str, Any]:
    """What is in a set, from its manifest and indexes alone: plain values, ready for JSON."""
    manifest = Manifest.load(path)
    splits = {}
    for name, split in manifest.splits.items():
        labels = read_index(path, split)["label"]
        per_class = np.bincount(labels, minlength=manifest.num_classes).tolist()
        splits[name] = {
            "samples": split.count,
            "shards": len(split.shards),
            "bytes": sum(shard.bytes for shard in split.shards),
            "per_class": dict(zip(manifest.class_names, per_class, strict=True)),
        }
    keep = {"codec", "codec_hash", "image_shape", "latent_shape", "stored_shape", "posterior"}
    keep |= {"dtype", "shift", "scale", "mean", "std", "num_classes", "lanes", "flips"}
    return {**manifest.model_dump(include=keep | {"quarantined"}), "splits": splits}
