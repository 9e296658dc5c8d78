"""What is done to files while nobody runs: checkpoints and shards are cut, flipped, removed."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path


def newest(run: Path) -> Path:
    """The step directory with the largest number, whole or not."""
    return max((run / "checkpoints").glob("step_*"))


def truncate(file: Path, rng: random.Random) -> str:
    size = file.stat().st_size
    left = rng.randrange(size)
    with file.open("r+b") as handle:
        handle.truncate(left)
    return f"{file.name} cut to {left} of {size} bytes"


def flip(file: Path, rng: random.Random) -> str:
    place, bit = rng.randrange(file.stat().st_size), rng.randrange(8)
    with file.open("r+b") as handle:
        handle.seek(place)
        byte = handle.read(1)[0]
        handle.seek(place)
        handle.write(bytes([byte ^ 1 << bit]))
    return f"bit {bit} of byte {place} of {file.name} flipped"


def _data_truncated(folder: Path, rng: random.Random) -> str:
    return truncate(rng.choice(sorted(folder.glob("*.distcp"))), rng)


def _data_flipped(folder: Path, rng: random.Random) -> str:
    return flip(rng.choice(sorted(folder.glob("*.distcp"))), rng)


def _metadata_flipped(folder: Path, rng: random.Random) -> str:
    return flip(folder / ".metadata", rng)


def _manifest_flipped(folder: Path, rng: random.Random) -> str:
    return flip(folder / "manifest.json", rng)


def _manifest_truncated(folder: Path, rng: random.Random) -> str:
    return truncate(folder / "manifest.json", rng)


def _missing(folder: Path, _rng: random.Random) -> str:
    shutil.rmtree(folder)
    return f"{folder.name} removed"


def _file_missing(folder: Path, rng: random.Random) -> str:
    file = rng.choice(sorted(folder.glob("*.distcp")))
    file.unlink()
    return f"{file.name} removed"


def _no_manifest(folder: Path, _rng: random.Random) -> str:
    (folder / "manifest.json").unlink()
    return "manifest.json removed"


def _partial(folder: Path, rng: random.Random) -> str:
    """As a save that was killed leaves it, while `latest` names it already."""
    half = folder.rename(folder.with_name(f".{folder.name}.partial"))
    (half / "manifest.json").unlink()
    return f"{half.name}, {truncate(rng.choice(sorted(half.glob('*.distcp'))), rng)}"


CHECKPOINT: dict[str, Callable[[Path, random.Random], str]] = {
    "file truncated": _data_truncated,
    "file bit-flipped": _data_flipped,
    ".metadata bit-flipped": _metadata_flipped,
    "manifest bit-flipped": _manifest_flipped,
    "manifest truncated": _manifest_truncated,
    "newest missing": _missing,
    "file missing": _file_missing,
    "newest without manifest": _no_manifest,
    "newest half-written": _partial,
}
# of these a restart must say that it passes over the newest checkpoint
NAMED = set(CHECKPOINT) - {"newest missing", "newest half-written"}
