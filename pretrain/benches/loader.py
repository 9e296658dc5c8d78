"""What the loader gives, beside reading the same files from end to end.

    pretrain bench loader [--samples 20000]

Latents of random numbers are written as `pretrain data encode` would; both readers are timed in
turns. The page cache is warm: what is compared is the program, not the disk.
"""

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np

from data_pipeline.cursor import Cursor
from data_pipeline.loader import Loader, LoaderConfig
from data_pipeline.shards import Manifest, SplitWriter
from parallel import launch
from pretrain.benches.record import record

_BLOCK = 1 << 20  # bytes of one plain read


def loader(
    samples: int, batch: int, order: Literal["chunks", "samples"], workers: int, rounds: int
) -> dict[str, Any]:
    """Samples and bytes a second of both, medians of interleaved rounds; `share` is their ratio."""
    with tempfile.TemporaryDirectory(prefix="loader-") as folder:
        root = Path(folder)
        files = _write(root, samples)
        size = sum(file.stat().st_size for file in files)
        cfg = LoaderConfig(path=folder, global_batch=batch, order=order, workers=workers)
        loaded, read = [], []
        for turn in range(1 + rounds):
            one, other = _load(cfg, samples // batch), _read(files)
            if turn:  # the first one warms the cache
                loaded.append(samples // batch * batch / one)
                read.append(samples / other)
    given, plain = statistics.median(loaded), statistics.median(read)
    return record("loader", launch.Place.here()) | {
        "samples": samples,
        "batch": batch,
        "order": order,
        "workers": workers,
        "samples_per_s": given,
        "raw_samples_per_s": plain,
        "raw_gb_per_s": plain * size / samples / 1e9,
        "share": given / plain,
    }


def _write(root: Path, samples: int) -> list[Path]:
    """A set of 4×32×32 float16 latents."""
    draws, shape = np.random.default_rng(0), (4, 32, 32)
    writer = SplitWriter(root, "train", shard_bytes=1 << 26, variants=1)
    for number in range(samples):
        writer.write([draws.standard_normal(shape, np.float32).astype(np.float16)], number % 1000)
    split = writer.close()
    Manifest(
        codec="random",
        codec_hash="",
        codec_source=None,
        image_shape=(3, 256, 256),
        latent_shape=shape,
        stored_shape=shape,
        posterior=False,
        dtype="float16",
        shift=[0.0] * 4,
        scale=[1.0] * 4,
        mean=[0.0] * 4,
        std=[1.0] * 4,
        class_names=[str(number) for number in range(1000)],
        num_classes=1000,
        lanes=16,
        flips=False,
        seed=0,
        splits={"train": split},
        quarantined=0,
        quarantine=None,
    ).save(root)
    return [root / shard.name for shard in split.shards]


def _load(cfg: LoaderConfig, batches: int) -> float:
    with Loader(cfg, 0, 1, seed=0) as source:
        begin, stream = time.perf_counter(), source.start(Cursor())
        for _ in range(batches):
            next(stream)
        return time.perf_counter() - begin


def _read(files: list[Path]) -> float:
    buffer = bytearray(_BLOCK)
    begin = time.perf_counter()
    for file in files:
        with file.open("rb", buffering=0) as handle:
            while handle.readinto(buffer):
                pass
    return time.perf_counter() - begin
