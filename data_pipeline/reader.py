"""Sample ids -> raw bytes in a buffer, straight from the tars. No order, no threads.

Any number of threads may call `Reader.read` at once.
"""

import os
import threading
import weakref
import zlib
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_pipeline import remote
from data_pipeline.errors import DataError
from data_pipeline.shards import Manifest, Split


class BadSample(NamedTuple):
    """A stored sample that could not be read."""

    sample: int  # id in the split
    variant: int  # 0 as it is, 1 mirrored
    shard: str  # path of the tar
    offset: int  # bytes from its start
    reason: str


class Buffer:
    """Room for the raw payloads of a batch, and a view of each row to read into."""

    def __init__(self, rows: int, shape: tuple[int, ...], dtype: str) -> None:
        self.array = np.empty((rows, *shape), np.dtype(dtype).newbyteorder("<"))
        self.rows = [memoryview(row.reshape(-1).view(np.uint8)) for row in self.array]


class Reader:
    """Reads payloads of one split; counts, lists and replaces those that are bad."""

    def __init__(
        self,
        root: str | Path,
        manifest: Manifest,
        split: Split,
        index: np.ndarray,
        *,
        max_bad: int,
        check_crc: bool,
    ) -> None:
        self.paths = [Path(root) / shard.name for shard in split.shards]
        self._shards, self._origin = split.shards, remote.origin(Path(root))
        self.index = index
        self.max_bad, self.check_crc = max_bad, check_crc
        self.quarantine: list[BadSample] = []  # grows; in the order of discovery
        self._known: set[tuple[int, int]] = set()
        self._lock = threading.Lock()
        self._fds: dict[int, int] = {}
        self.close = weakref.finalize(self, _close_all, self._fds)
        self._bytes = payload_bytes(manifest)

    @property
    def bad(self) -> int:
        """Distinct bad samples met so far by this reader."""
        return len(self.quarantine)

    def read(self, ids: np.ndarray, variants: np.ndarray, out: Buffer) -> np.ndarray:
        """Fill row i of the buffer with sample ids[i]; returns the ids that were really read.

        A bad sample is replaced by the next good one, cyclic in the split: a function of the files
        alone, the same on every rank. Raises DataError when more than max_bad are met.
        """
        ids = ids.copy()
        rows = self.index[ids]
        every = np.arange(len(ids))
        offsets, crcs = rows["offset"][every, variants], rows["crc"][every, variants]
        # perf: in file order, so that the disk sees rising offsets
        order = np.lexsort((offsets, rows["shard"]))
        got = np.zeros(len(ids), np.int64)
        # Whatever fails here is read once more below, with care.
        with suppress(OSError):
            fds = [self._fds.get(n) or self._open(n) for n in rows["shard"][order].tolist()]
            views = [out.rows[row] for row in order.tolist()]
            got[order] = list(map(os.preadv, fds, zip(views), offsets[order].tolist()))
        good = got == self._bytes
        if self.check_crc:
            good &= np.fromiter(map(zlib.crc32, out.rows), np.uint32, len(ids)) == crcs
        for row in np.flatnonzero(~good).tolist():
            ids[row] = self._replace(int(ids[row]), int(variants[row]), out.rows[row])
        return ids

    def _replace(self, sample: int, variant: int, view: memoryview) -> int:
        """Read the first good sample from `sample` on into the view; returns its id."""
        count = len(self.index)
        for step in range(count):
            candidate = (sample + step) % count
            if (candidate, variant) in self._known:
                continue
            reason = self._try(candidate, variant, view)
            if reason is None:
                return candidate
            self._condemn(candidate, variant, reason)
        raise DataError(f"no sample of the {count} in '{self.paths[0].parent}' can be read.")

    def _try(self, sample: int, variant: int, view: memoryview) -> str | None:
        """Read one sample carefully; returns what is wrong with it, or None."""
        row = self.index[sample]
        shard, offset = int(row["shard"]), int(row["offset"][variant])
        got = 0
        try:
            fd = self._fds[shard] if shard in self._fds else self._open(shard)
            while got < self._bytes:
                count = os.preadv(fd, (view[got:],), offset + got)
                if not count:
                    return f"the file ends {self._bytes - got} bytes too early (cut off)"
                got += count
        except OSError as error:
            return f"cannot be read: {error.strerror}"
        if self.check_crc and zlib.crc32(view) != row["crc"][variant]:
            return "its CRC-32 differs from the index (damaged)"
        return None

    def _condemn(self, sample: int, variant: int, reason: str) -> None:
        """List a bad sample once; raises DataError when that makes too many."""
        row = self.index[sample]
        shard, offset = str(self.paths[int(row["shard"])]), int(row["offset"][variant])
        with self._lock:
            if (sample, variant) not in self._known:
                self._known.add((sample, variant))
                self.quarantine.append(BadSample(sample, variant, shard, offset, reason))
            if len(self.quarantine) <= self.max_bad:
                return
        raise DataError(
            f"'{shard}' at offset {offset}: sample {sample}: {reason}. That is bad sample number "
            f"{len(self.quarantine)}, data.max_bad={self.max_bad} are allowed; restore the file or "
            f"encode again (`pretrain data verify` lists all damage), or raise data.max_bad."
        )

    def _open(self, shard: int) -> int:
        with self._lock:
            if shard not in self._fds:
                if self._origin is not None:
                    remote.fetch(self._origin, self.paths[shard].parent, self._shards[shard])
                self._fds[shard] = os.open(self.paths[shard], os.O_RDONLY | os.O_CLOEXEC)
            return self._fds[shard]


def payload_bytes(manifest: Manifest) -> int:
    """Bytes of one stored latent."""
    return int(np.prod(manifest.stored_shape)) * np.dtype(manifest.dtype).itemsize


def _close_all(fds: dict[int, int]) -> None:
    while fds:
        os.close(fds.popitem()[1])
