"""One image file -> one uint8 array: decoding, grey or colour, square crops. No folders here."""

import hashlib
import io
import struct
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from PIL import Image, UnidentifiedImageError

from data_pipeline.errors import DataError

# What Pillow raises for a file that is damaged or no image at all.
BROKEN = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    Image.DecompressionBombError,
)


class Picture(NamedTuple):
    """One image of a source."""

    image: np.ndarray  # (c, h, w) uint8
    label: int
    name: str  # where it comes from, for messages


class BadPictureError(Exception):
    """A file that is no image; the encoder lists it and goes on."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: {reason}")
        self.name, self.reason = name, reason


class Pictures(Protocol):
    """A split of a source, read at random."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Picture:
        """Raises BadPictureError if this one cannot be read, IndexError past the end."""
        ...

    def identity(self) -> str:
        """SHA-256 of which images these are, in order, without where they lie."""
        ...


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """Short side to `size`, then the central square.

    Halved with a box filter while at least twice too large, then bicubic.
    Source: Dhariwal and Nichol 2021 (ADM), preprocessing; DiT uses the same.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    ratio = size / min(image.size)
    shape = (round(image.width * ratio), round(image.height * ratio))
    image = image.resize(shape, Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def is_grey(image: Image.Image) -> bool:
    """Whether an opened image has no colour by its mode (its pixels are not looked at)."""
    return image.mode in ("1", "L", "LA", "La", "F") or image.mode.startswith("I")


def _to_mode(image: Image.Image, channels: int) -> Image.Image:
    """8-bit grey or RGB; 16-bit grey keeps its upper byte."""
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("L" if channels == 1 else "RGB")


def _planar(image: Image.Image) -> np.ndarray:
    """(c, h, w) uint8 of an L or RGB image."""
    pixels = np.asarray(image)
    return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


class FilePictures:
    """Encoded image files, read through a function name -> bytes."""

    def __init__(
        self,
        items: Sequence[tuple[str, int]],
        read: Callable[[str], bytes],
        channels: int,
        size: int | None,
    ) -> None:
        self.items, self.read = items, read
        self.channels, self.size = channels, size

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> Picture:
        name, label = self.items[i]
        try:
            image = Image.open(io.BytesIO(self.read(name)))
            if self.channels == 1 and not is_grey(image):
                raise DataError(
                    f"image '{name}' is in colour, while the first ones looked at are grey; "
                    f"make the set all grey or all colour."
                )
            image = _to_mode(image, self.channels)
            image = image if self.size is None else centre_crop(image, self.size)
        except DataError:
            raise
        except UnidentifiedImageError as error:
            raise BadPictureError(name, "not an image file") from error
        except BROKEN as error:
            raise BadPictureError(name, f"{type(error).__name__}: {error}") from error
        return Picture(_planar(image), label, name)

    def identity(self) -> str:
        return hashlib.sha256(repr(self.items).encode()).hexdigest()

    def probe(self, i: int) -> bool | None:
        """Whether image i is grey, from its header alone; None if it is no image."""
        try:
            return is_grey(Image.open(io.BytesIO(self.read(self.items[i][0]))))
        except BROKEN:
            return None


class ArrayPictures:
    """Grey images in memory, (N, h, w) uint8; padded with a margin of zeros, or resized."""

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        name: str,
        *,
        size: int | None,
        margin: int = 0,
    ) -> None:
        self.images, self.labels, self.name = images, labels, name
        self.size, self.margin = size, margin

    def __len__(self) -> int:
        return len(self.images)

    def identity(self) -> str:
        digest = hashlib.sha256(self.images.tobytes())
        digest.update(self.labels.astype("<i8").tobytes())
        return digest.hexdigest()

    def __getitem__(self, i: int) -> Picture:
        image = self.images[i]
        if self.size is not None:
            image = np.asarray(centre_crop(Image.fromarray(image), self.size))
        elif self.margin:
            image = np.pad(image, self.margin)
        return Picture(image[None], int(self.labels[i]), f"{self.name}[{i}]")
