"""Pictures for people: many small images as one PNG. Not a plotting library, not a decoder.

save("samples.png", images, columns=10)
"""

import io
import os
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

_TILE = 64  # pixels; smaller images are enlarged by whole factors to about this
_GAP = 2  # pixels between tiles
_PAPER = 255


def tile(images: NDArray[np.uint8] | Tensor, columns: int) -> NDArray[np.uint8]:
    """One picture (height, width, 3) of images (N, c, H, W), c = 1 or 3, uint8, row by row.

    Images below 64 pixels are enlarged without smoothing. Raises ValueError for anything else.
    """
    pixels = (
        images.detach().cpu().numpy() if isinstance(images, torch.Tensor) else np.asarray(images)
    )
    if (
        pixels.dtype != np.uint8
        or pixels.ndim != 4
        or pixels.shape[1] not in (1, 3)
        or not len(pixels)
    ):
        raise ValueError(
            f"images are {pixels.dtype} {pixels.shape}; expected uint8 (N, 1 or 3, H, W), N >= 1"
        )
    if columns < 1:
        raise ValueError(f"columns={columns}; expected 1 or more")
    factor = max(1, _TILE // max(pixels.shape[2:]))
    big = pixels.repeat(factor, axis=2).repeat(factor, axis=3)
    n, _, height, width = big.shape
    columns = min(columns, n)
    rows = -(-n // columns)
    canvas = np.full(
        (rows * (height + _GAP) + _GAP, columns * (width + _GAP) + _GAP, 3), _PAPER, dtype=np.uint8
    )
    for i in range(n):
        top = _GAP + i // columns * (height + _GAP)
        left = _GAP + i % columns * (width + _GAP)
        canvas[top : top + height, left : left + width] = big[i].transpose(1, 2, 0)
    return canvas


def grid(images: NDArray[np.uint8] | Tensor, columns: int) -> bytes:
    """The PNG file of `tile(images, columns)`."""
    out = io.BytesIO()
    Image.fromarray(tile(images, columns)).save(out, format="PNG")
    return out.getvalue()


def save(path: str | Path, images: NDArray[np.uint8] | Tensor, columns: int) -> Path:
    """Writes the grid; the file appears whole or not at all, and its folder is made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(path.name + ".part")
    half.write_bytes(grid(images, columns))
    os.replace(half, path)
    return path
