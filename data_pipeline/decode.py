"""From latents back to images: of a model's samples, and of the stored set itself."""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_pipeline.codecs import Codec
from data_pipeline.reader import Buffer, Reader
from data_pipeline.shards import Manifest, read_index

Images = NDArray[np.uint8]
_BATCH = 256  # images decoded at once


def decode(latents: Tensor, manifest: Manifest, codec: Codec) -> Images:
    """Normalised latents (N, C, H, W) to pixels (N, c, h, w)."""
    parts = [codec.decode(manifest.denormalise(part)).cpu() for part in latents.split(_BATCH)]
    return torch.cat(parts).numpy()


def real_images(
    place: Path, split: str, codec: Codec, *, seed: int, most: int = 20_000
) -> tuple[Images, NDArray[np.int64]]:
    """Images of a split as the codec gives them back, and their labels.

    (N, c, h, w) and (N,); at most `most`, chosen by `seed`. A posterior is decoded from its mean.
    """
    manifest = Manifest.load(place)
    count = manifest.split(split).count
    chosen = np.sort(np.random.default_rng(seed).permutation(count)[:most])
    raw, labels = _read(place, manifest, split, chosen)
    mean = raw[:, : manifest.latent_shape[0]]
    parts = [codec.decode(part.float()).cpu() for part in mean.split(_BATCH)]
    return torch.cat(parts).numpy(), labels


def _read(
    place: Path, manifest: Manifest, split: str, ids: NDArray[np.int64]
) -> tuple[Tensor, NDArray[np.int64]]:
    """Raw latents of these samples, unmirrored, and their labels. Raises DataError."""
    part = manifest.split(split)
    index = read_index(place, part)
    reader = Reader(place, manifest, part, index, max_bad=0, check_crc=True)
    buffer = Buffer(len(ids), manifest.stored_shape, manifest.dtype)
    reader.read(ids, np.zeros_like(ids), buffer)
    reader.close()
    return torch.from_numpy(buffer.array), index["label"][ids].astype(np.int64)
