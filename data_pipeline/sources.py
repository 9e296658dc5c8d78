"""Where images come from: a folder tree, a tar of one, IDX files, built-in digits. No latents.

source = open_source("digits"); image, label, name = source.splits["train"][0]
"""

import gzip
import os
import struct
import tarfile
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.order import key, permute
from data_pipeline.pictures import ArrayPictures, BadPictureError, FilePictures, Picture, Pictures

# Folder names that mean a split; "test" becomes "val" when there is no other val.
SPLITS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "t10k": "test",
}
PROBES = 64  # images whose headers decide between grey and colour
DIGITS_SIZE = 32  # pixels
FASHION = (
    "T-shirt/top",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)


@dataclass(frozen=True)
class Source:
    """Images with labels, by split. `train` is always there."""

    name: str  # as the user gave it
    class_names: tuple[str, ...]
    splits: dict[str, Pictures]

    def __iter__(self) -> Iterator[Picture]:
        """All readable images, split after split."""
        for pictures in self.splits.values():
            for i in range(len(pictures)):
                try:
                    yield pictures[i]
                except BadPictureError:
                    continue


def open_source(src: str, size: int | None = None) -> Source:
    """Recognise and open a source; nothing is decoded yet.

    src is `digits`, or a folder or file, looked up as given and then in $PRETRAIN_DATA; size, if
    given, is the side in pixels that every image is resized and cropped to. Raises DataError.
    """
    if size is not None and size < 1:
        raise DataError(f"--size {size} is not a number of pixels; give 1 or more.")
    if src == "digits":
        return _digits(size or DIGITS_SIZE)
    path = _find(src)
    if path.is_dir():
        if list(path.glob("*-images[-.]idx3-ubyte*")):
            return _idx(src, path, size)
        names = sorted(_walk(path))
        tars = [name for name in names if name.endswith(".tar") and "/" not in name]
        if len(tars) != 1 or any("/" in name for name in names):
            return _tree(src, names, lambda name: (path / name).read_bytes(), size)
        path = path / tars[0]
    members = _TarMembers(path)
    return _tree(src, sorted(members.places), members.read, size)


def _find(src: str) -> Path:
    tried = [Path(src)]
    if os.environ.get("PRETRAIN_DATA"):
        tried.append(Path(os.environ["PRETRAIN_DATA"]) / src)
    for path in tried:
        if path.exists():
            return path
    places = " nor ".join(f"'{path}'" for path in tried)
    raise DataError(
        f"source '{src}' was not found: no {places}. Give a folder of class folders, a tar of one, "
        f"a folder with IDX files, or `digits`; PRETRAIN_DATA may name the folder it lies in."
    )


def _walk(root: Path) -> Iterator[str]:
    """Relative paths of all files, with forward slashes."""
    for folder, _, files in os.walk(root, followlinks=True):
        for file in files:
            yield (Path(folder) / file).relative_to(root).as_posix()


class _TarMembers:
    """The files of an uncompressed tar, read in place at random by any thread."""

    def __init__(self, path: Path) -> None:
        try:
            with tarfile.open(path, "r:") as tar:
                members = [member for member in tar if member.isreg()]
        except (tarfile.TarError, OSError, EOFError) as error:
            raise DataError(
                f"'{path}' is not a readable, uncompressed tar ({error}); SRC must be a folder of "
                f"class folders, an uncompressed tar of one, IDX files or `digits`."
            ) from error
        self.places = {member.name: (member.offset_data, member.size) for member in members}
        self._file = path.open("rb")
        self._lock = threading.Lock()

    def read(self, name: str) -> bytes:
        offset, size = self.places[name]
        with self._lock:
            self._file.seek(offset)
            return self._file.read(size)


def _tree(src: str, names: Sequence[str], read: Callable[[str], bytes], size: int | None) -> Source:
    """A source from relative file names: [set/][split/]class/file."""
    class_names, items = arrange(src, names)
    splits = {name: FilePictures(found, read, 3, size) for name, found in items.items()}
    train = splits["train"]
    some = permute(np.arange(min(PROBES, len(train))), len(train), key(0))
    looks = [train.probe(int(i)) for i in some]
    if True in looks and False not in looks:
        for pictures in splits.values():
            pictures.channels = 1
    return Source(src, class_names, dict(splits))


def arrange(
    src: str, names: Sequence[str]
) -> tuple[tuple[str, ...], dict[str, list[tuple[str, int]]]]:
    """Class names and, by split, (file name, label): which folder is a split and which a class.

    Hidden files and files outside class folders are passed over. Raises DataError.
    """
    found = [(name, name.split("/")) for name in names]
    found = [(n, p) for n, p in found if not any(s.startswith((".", "__MACOSX")) for s in p)]
    while True:  # a single outer folder, such as the set's name, is not a class
        tops = {parts[0] for _, parts in found if len(parts) > 1}
        deep = any(len(parts) > 2 for _, parts in found)
        if len(tops) != 1 or not deep or tops <= SPLITS.keys():
            break
        found = [(name, parts[1:]) for name, parts in found if len(parts) > 1]
    if any(SPLITS.get(top) == "train" for top in tops):
        placed = [(SPLITS[p[0]], p[1], n) for n, p in found if len(p) > 2 and p[0] in SPLITS]
    elif tops and tops <= SPLITS.keys() and deep:
        raise DataError(f"source '{src}' has {sorted(tops)} but no train folder; add one.")
    else:
        placed = [("train", parts[0], name) for name, parts in found if len(parts) > 1]
    class_names = tuple(sorted({kind for _, kind, _ in placed}))
    labels = {kind: label for label, kind in enumerate(class_names)}
    items: dict[str, list[tuple[str, int]]] = {}
    for split, kind, name in sorted(placed):
        items.setdefault(split, []).append((name, labels[kind]))
    if not items.get("train"):
        raise DataError(
            f"source '{src}' has no class folders with files in them; expected "
            f"{src}/CLASS/FILE or {src}/train/CLASS/FILE."
        )
    if "val" not in items and "test" in items:
        items["val"] = items.pop("test")
    return class_names, items


def _idx(src: str, root: Path, size: int | None) -> Source:
    """The four IDX files of the MNIST family. Source: LeCun's IDX format; Xiao et al. 2017."""
    splits: dict[str, Pictures] = {}
    count = 1  # classes
    for stem, split in (("train", "train"), ("t10k", "val")):
        images = _read_idx(root, f"{stem}-images", 3)
        labels = _read_idx(root, f"{stem}-labels", 1)
        if len(images) != len(labels):
            raise DataError(
                f"'{root}' has {len(images)} {stem} images but {len(labels)} labels; "
                f"use files that belong together."
            )
        count = max(count, 1 + int(labels.max(initial=0)))
        margin = 2 if images.shape[1:] == (28, 28) else 0
        splits[split] = ArrayPictures(images, labels, f"{stem}-images", size=size, margin=margin)
    fashion = "fashion" in root.resolve().name.lower() and count == len(FASHION)
    class_names = FASHION if fashion else tuple(str(label) for label in range(count))
    return Source(src, class_names, splits)


def _read_idx(root: Path, stem: str, dims: int) -> np.ndarray:
    """One IDX file of bytes, packed or not; (N,) or (N, h, w) uint8."""
    found = sorted(root.glob(f"{stem}[-.]idx{dims}-ubyte*"))
    if not found:
        raise DataError(
            f"'{root}' has no {stem}-idx{dims}-ubyte[.gz]; all four files are needed: "
            f"train and t10k, images and labels."
        )
    file = found[0]
    try:
        data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        magic, *shape = struct.unpack_from(f">{dims + 1}I", data)
    except (OSError, EOFError, struct.error, zlib.error) as error:
        raise DataError(f"'{file}' is not a whole IDX file ({error}); fetch it again.") from error
    want = 4 + 4 * dims + int(np.prod(shape, dtype=np.int64))
    if magic != 0x800 + dims or len(data) != want:
        raise DataError(
            f"'{file}' has magic {magic:#x} and {len(data)} bytes, expected {0x800 + dims:#x} and "
            f"{want}; fetch it again."
        )
    return np.frombuffer(data, np.uint8, offset=4 + 4 * dims).reshape(shape)


def _digits(size: int) -> Source:
    """scikit-learn's 1,797 handwritten digits, four in five for training. Source: UCI optdigits."""
    from sklearn.datasets import load_digits  # why: slow to import, and only this source needs it

    values, labels = (np.asarray(part) for part in load_digits(return_X_y=True))
    images = np.rint(np.reshape(values, (-1, 8, 8)) * (255 / 16)).astype(np.uint8)
    # why: a fixed key, so that held-out digits stay held out whatever the seed
    mixed = permute(np.arange(len(images)), len(images), key(0)).astype(np.int64)
    cut = len(images) * 4 // 5
    splits: dict[str, Pictures] = {}
    for split, ids in (("train", mixed[:cut]), ("val", mixed[cut:])):
        splits[split] = ArrayPictures(images[ids], labels[ids], f"digits/{split}", size=size)
    return Source("digits", tuple(str(digit) for digit in range(10)), splits)
