"""JSON lines of a run: one object a step, and the file can be cut back to a step.

Knows no metric and no rank. A kill leaves whole lines and at most one half line, which `cut` drops.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Lines:
    """Appends to one file; a line is in the system's hands when `append` returns."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("a", encoding="utf-8")

    def append(self, step: int, values: Mapping[str, Any]) -> None:
        """Raises ValueError for a number that JSON cannot hold."""
        self._file.write(json.dumps({"step": step, **values}, allow_nan=False) + "\n")
        self._file.flush()

    def rewind(self, step: int) -> None:
        """Takes back the lines of later steps."""
        self._file.close()
        cut(self._path, step)
        self._file = self._path.open("a", encoding="utf-8")

    def close(self) -> None:
        self._file.close()


def cut(path: Path, step: int) -> int:
    """Leaves a file's whole lines of at most this step; returns how many it dropped.

    The file is replaced in one move, so a kill leaves the old or the new one. No file is no error.
    """
    if not path.exists():
        return 0
    half = path.with_name(path.name + ".part")
    dropped = 0
    with path.open("rb") as old, half.open("wb") as new:
        for line in old:
            if _belongs(line, step):
                new.write(line)
            else:
                dropped += 1
        new.flush()
        os.fsync(new.fileno())
    if dropped:
        os.replace(half, path)
    else:
        half.unlink()
    return dropped


def _belongs(line: bytes, step: int) -> bool:
    if not line.endswith(b"\n"):
        return False
    try:
        return int(json.loads(line)["step"]) <= step
    except (ValueError, KeyError, TypeError):
        return False
