"""Parts of a whole encoding: what each holds, where it lies, and whether two belong together.

Not the encoding (encode.py) and not the joining (merge.py).
"""

import re
import shutil
from pathlib import Path
from typing import Any

from data_pipeline.errors import DataError
from data_pipeline.shards import MANIFEST, Manifest, Part, Shard, Split, sha256

FOLDER = "parts"  # inside the directory of the final set
_SHARED = ("codec", "codec_hash", "posterior", "dtype", "class_names", "lanes", "flips", "seed")
_ASKED = ("of", "source", "size", "limit", "batch", "shard_bytes")


def parse(text: str) -> tuple[int, int]:
    """`2/8` as (2, 8). Raises DataError."""
    found = re.fullmatch(r"([0-9]+)/([0-9]+)", text)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise DataError(
            f"--part {text} is no part; expected I/N with I from 1 to N, such as --part 2/8."
        )
    return int(found[1]), int(found[2])


def place(out: Path, part: tuple[int, int]) -> Path:
    """The directory of a part of the set that `out` will be."""
    return out / FOLDER / f"{part[0]}-of-{part[1]}"


def cut(count: int, batch: int, part: tuple[int, int]) -> range:
    """The places 0..count-1 of a writing order that a part holds.

    why: cut between batches, so that each batch is the same as in an unsplit encoding: some
    autoencoders round differently in batches of other sizes.
    """
    number, of = part
    batches = -(-count // batch)
    first, last = batches * (number - 1) // of, batches * number // of
    return range(min(first * batch, count), min(last * batch, count))


def of(manifest: Manifest) -> Part:
    """What a part's manifest says beyond that of a set."""
    assert manifest.part is not None, "not the manifest of a part"
    return manifest.part


def differences(a: Manifest, b: Manifest) -> dict[str, tuple[Any, Any]]:
    """Settings that two parts of one set must share, and do not."""
    pairs = {name: (getattr(a, name), getattr(b, name)) for name in _SHARED}
    pairs |= {name: (getattr(of(a), name), getattr(of(b), name)) for name in _ASKED}
    if a.codec_source is not None:  # then they come with the weights, in a file of their own
        pairs |= {"shift": (a.shift, b.shift), "scale": (a.scale, b.scale)}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def tell(found: dict[str, tuple[Any, Any]]) -> str:
    """Differences in words; long values are only named."""
    words = []
    for name, (a, b) in found.items():
        short = len(f"{a}{b}") <= 60
        words.append(f"{name} ({a} and {b})" if short else name)
    return ", ".join(words)


def broken_shard(file: Path, shard: Shard) -> str | None:
    """What is wrong with a tar, by its size alone, or None."""
    if not file.is_file():
        return f"{shard.name} is missing"
    size = file.stat().st_size
    return None if size == shard.bytes else f"{shard.name} has {size} bytes, not {shard.bytes}"


def broken_index(root: Path, split: Split) -> str | None:
    """What is wrong with an index, or None."""
    file = root / split.index
    if not file.is_file():
        return f"{split.index} is missing"
    return None if sha256(file) == split.index_sha256 else f"{split.index} has another SHA-256"


def _whole(root: Path, manifest: Manifest) -> bool:
    splits = manifest.splits.values()
    shards = [shard for split in splits for shard in split.shards]
    problems = [broken_index(root, split) for split in splits]
    problems += [broken_shard(root / shard.name, shard) for shard in shards]
    return not any(problems)


def complete(root: Path, asked: Manifest) -> bool:
    """Whether a part is there, whole, with the settings of `asked`.

    Raises DataError for a part with other settings.
    """
    if not (root / MANIFEST).is_file():
        return False
    manifest = Manifest.load(root)
    if manifest.part is None:
        return False
    found = differences(manifest, asked)
    if found:
        raise DataError(
            f"'{root}' was encoded with other settings, it and this command differ in "
            f"{tell(found)}; give the same settings, --overwrite or another --out."
        )
    return _whole(root, manifest)


def clear(root: Path) -> None:
    """Remove what attempts at this part left behind that were killed."""
    for leftover in root.parent.glob(f".{root.name}.*"):
        shutil.rmtree(leftover)
