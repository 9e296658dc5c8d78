"""Encoded set -> endless (Batch, Cursor), read ahead by threads. Its order knows no threads.

loader = Loader(LoaderConfig(path="data/digits", global_batch=64), rank=0, size=1, seed=0)
for batch, cursor in loader.start(Cursor()): ...
"""

import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt
from threadpoolctl import ThreadpoolController
from torch import Tensor

from data_pipeline import draws, remote
from data_pipeline.batch import Batch
from data_pipeline.codecs import codec_id
from data_pipeline.cursor import Cursor
from data_pipeline.errors import DataError
from data_pipeline.order import Order
from data_pipeline.reader import BadSample, Buffer, Reader, payload_bytes
from data_pipeline.shards import Manifest, Split, read_index

PLAN = 8192  # sample ids computed at once, at least
PIECE = 1 << 17  # stored elements decoded at once: as float32 512 KiB, which a core's cache holds


class LoaderConfig(BaseModel):
    """Which set is read, and how."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False)

    path: str  # directory written by `pretrain data encode`, or its address (http, s3, gs, hf)
    cache: str | None = None  # of a set behind an address; null: below ~/.cache/dit-pretrain
    split: str = "train"  # split of the set
    global_batch: PositiveInt  # samples a step, all ranks together
    order: Literal["chunks", "samples"] = "chunks"  # mostly sequential reads, or a full shuffle
    max_bad: NonNegativeInt = 0  # bad samples a rank may skip before it stops
    check_crc: bool = True  # compare each payload with its CRC-32
    workers: PositiveInt = 2  # threads that read ahead
    prefetch: PositiveInt = 4  # batches read ahead
    codec: str | None = None  # expected codec id; None takes any


def check(cfg: LoaderConfig, *, num_classes: int, channels: int, input_size: int) -> Manifest:
    """Everything that can be wrong with the data and is cheap to see, before any rank exists.

    num_classes, channels and input_size (side of the latent) are the model's. Raises DataError.
    """
    root = remote.here(cfg.path, cfg.cache)
    manifest = Manifest.load(root)
    split = manifest.split(cfg.split)
    if cfg.codec is not None and codec_id(cfg.codec) != manifest.codec:
        raise DataError(
            f"'{cfg.path}' was encoded with codec {manifest.codec}, data.codec={cfg.codec} was "
            f"expected; set data.codec={manifest.codec} or encode with --codec {cfg.codec}."
        )
    c, height, width = manifest.latent_shape
    if c != channels:
        raise DataError(
            f"'{cfg.path}' holds latents of {c} channels, the model takes {channels}; set "
            f"model.in_channels={c} or encode with another codec."
        )
    if (height, width) != (input_size, input_size):
        raise DataError(
            f"'{cfg.path}' holds latents of {height}x{width}, the model takes "
            f"{input_size}x{input_size}; set model.input_size={height} or encode with another "
            "--size."
        )
    index = read_index(root, split)
    _check_labels(cfg, manifest, index, num_classes)
    if not remote.is_remote(cfg.path):
        _check_files(cfg, manifest, split, index)
    return manifest


def _check_labels(
    cfg: LoaderConfig, manifest: Manifest, index: np.ndarray, num_classes: int
) -> None:
    wrong = np.flatnonzero((index["label"] < 0) | (index["label"] >= num_classes))
    if len(wrong):
        raise DataError(
            f"'{cfg.path}' split {cfg.split}: sample {wrong[0]} has label "
            f"{index['label'][wrong[0]]}, the model knows 0..{num_classes - 1} ({len(wrong)} such "
            f"samples); set model.num_classes={manifest.num_classes} or encode again."
        )


def _check_files(cfg: LoaderConfig, manifest: Manifest, split: Split, index: np.ndarray) -> None:
    """Refuse missing and cut-off shards that lose more samples than max_bad."""
    lost, first = 0, ""
    ends = index["offset"][:, 0] + np.uint64(payload_bytes(manifest))
    for number, shard in enumerate(split.shards):
        file = Path(cfg.path) / shard.name
        have = file.stat().st_size if file.is_file() else None
        if have == shard.bytes:
            continue
        gone = np.flatnonzero((index["shard"] == number) & (ends > (have or 0)))
        lost += len(gone)
        what = "is missing" if have is None else f"has {have} bytes, expected {shard.bytes}"
        where = f", first at offset {index['offset'][gone[0], 0]}" if len(gone) else ""
        first = first or f"shard '{file}' {what}: {len(gone)} samples lost{where}"
    if first and (cfg.max_bad == 0 or lost > cfg.max_bad):
        raise DataError(
            f"{first} ({lost} lost in all, data.max_bad={cfg.max_bad}); restore the file, encode "
            f"again, or set data.max_bad to at least {max(lost, 1)} to go on without them."
        )


def _alone(openmp: ThreadpoolController) -> None:
    """From here on torch works in the calling thread alone.

    Why: else every worker would start a team of threads of its own for every batch.
    """
    torch.get_num_threads()  # why: when first asked, torch sets this thread's number itself
    openmp.limit(limits=1)


class Loader:
    """One rank's part of every batch: slots [rank*G/size, (rank+1)*G/size) of G."""

    def __init__(self, cfg: LoaderConfig, rank: int, size: int, *, seed: int) -> None:
        assert 0 <= rank < size, f"rank {rank} of {size}"
        if cfg.global_batch % size:
            raise DataError(
                f"data.global_batch={cfg.global_batch} cannot be shared equally by {size} data "
                f"ranks; make it a multiple of {size}."
            )
        self.cfg, self.seed = cfg, seed
        root = remote.here(cfg.path, cfg.cache)
        self.info = Manifest.load(root)
        split = self.info.split(cfg.split)
        self.count = split.count  # samples in an epoch
        self._index = read_index(root, split)
        self._variants = split.variants
        self._order = Order(split.count, self.info.lanes, seed, cfg.order)
        local = cfg.global_batch // size
        self._slots = np.arange(rank * local, (rank + 1) * local, dtype=np.int64)
        self._reader = Reader(
            root,
            self.info,
            split,
            self._index,
            max_bad=cfg.max_bad,
            check_crc=cfg.check_crc,
        )
        self._shift = torch.tensor(self.info.shift, dtype=torch.float32)[:, None, None]
        self._scale = torch.tensor(self.info.scale, dtype=torch.float32)[:, None, None]
        self._own = threading.local()
        openmp = ThreadpoolController().select(user_api="openmp")
        self._pool = ThreadPoolExecutor(
            cfg.workers, thread_name_prefix="loader", initializer=_alone, initargs=(openmp,)
        )

    @property
    def bad(self) -> int:
        """Distinct bad samples this rank has met and skipped."""
        return self._reader.bad

    @property
    def quarantine(self) -> list[BadSample]:
        """The bad samples this rank has met."""
        return list(self._reader.quarantine)

    def start(self, cursor: Cursor) -> Iterator[tuple[Batch, Cursor]]:
        """Batches from a cursor on, without end, each with the cursor that follows it.

        What the cursor passes over is not read. Raises DataError on the iterating thread when a
        worker met one.
        """
        plan = self._plan(cursor)
        ahead: deque[tuple[Future[Batch], Cursor]] = deque()
        try:
            while True:
                for after, positions, ids in islice(plan, self.cfg.prefetch - len(ahead)):
                    ahead.append((self._pool.submit(self._load, positions, ids), after))
                batch, after = ahead.popleft()
                yield batch.result(), after
        finally:
            for batch, _ in ahead:
                batch.cancel()

    def close(self) -> None:
        """End the threads and close the files; waits for reads under way."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._reader.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _plan(self, cursor: Cursor) -> Iterator[tuple[Cursor, np.ndarray, np.ndarray]]:
        """(cursor after, positions, sample ids) of this rank's part of each batch, without end."""
        total = self.cfg.global_batch
        cursor = cursor.clear(total)
        batches = -(-PLAN // len(self._slots))
        while True:
            starts, afters = [], []
            for _ in range(batches):
                starts.append(cursor.position)
                cursor = cursor.advance(total)
                afters.append(cursor)
            positions = np.array(starts, np.int64)[:, None] + self._slots
            # perf: many ids at once; in calls of 1024 an id costs twice, of 256 six times as much
            yield from zip(afters, positions, self._order.samples(positions), strict=True)

    def _load(self, positions: np.ndarray, ids: np.ndarray) -> Batch:
        """Read, draw and normalise one batch. Runs in a worker thread."""
        start, count = int(positions[0]), len(positions)
        if not hasattr(self._own, "buffer"):
            self._own.buffer = Buffer(count, self.info.stored_shape, self.info.dtype)
        buffer: Buffer = self._own.buffer
        variants = np.zeros(count, np.int64)
        if self._variants == 2:
            variants = draws.flips(self.seed, start, count)
        samples = self._reader.read(ids, variants, buffer)
        raw = torch.from_numpy(buffer.array)
        x = torch.empty((count, *self.info.latent_shape), dtype=torch.float32)
        # perf: in pieces, because each of the few passes over a whole batch would go through memory
        rows = max(1, PIECE // raw[0].numel())
        for first in range(0, count, rows):
            piece = x[first : first + rows]
            self._normalise(raw[first : first + rows], piece, start + first)
        labels = torch.from_numpy(self._index["label"][samples].astype(np.int64))
        return Batch(x, labels, self._slots, samples)

    def _normalise(self, raw: Tensor, x: Tensor, start: int) -> None:
        """x = (raw - shift) * scale into x, of a fresh draw where raw is a posterior.

        Every operation is of one element, so that a row knows no neighbours.
        Source: Kingma and Welling 2014, Eq. 10.
        """
        if self.info.posterior:
            mean, log_variance = raw.float().chunk(2, 1)
            noise = draws.normals(self.seed, start, len(x), x[0].numel())
            noise = torch.from_numpy(noise).reshape(x.shape)
            torch.addcmul(mean, torch.exp(log_variance * 0.5), noise, out=x)
        else:
            x.copy_(raw)
        x.sub_(self._shift).mul_(self._scale)
