"""Images -> latents -> shards, once, before training. Appears whole under its name or not at all.

encode("digits", "data/digits", codec="haar")
encode("digits", "data/digits", codec="haar", part=(2, 8))  # one of 8, joined by merge.py
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data_pipeline import parts
from data_pipeline.codecs import Codec, open_codec
from data_pipeline.errors import DataError
from data_pipeline.moments import Moments
from data_pipeline.order import key, permute
from data_pipeline.pictures import BadPictureError, Picture, Pictures
from data_pipeline.shards import MANIFEST, QUARANTINE, Manifest, Part, Split, SplitWriter
from data_pipeline.sources import Source, open_source

Progress = Callable[[int, int], None]  # images done, images in all


def encode(
    src: str,
    out: str | Path,
    *,
    codec: str = "haar",
    vae: str | None = None,
    size: int | None = None,
    flips: bool = False,
    shard_size_mb: float = 256,
    batch: int = 64,
    lanes: int = 1024,
    seed: int = 0,
    limit: int | None = None,
    overwrite: bool = False,
    device: str = "cpu",
    progress: Progress | None = None,
    part: tuple[int, int] | None = None,
    note: Callable[[str], None] | None = None,
) -> Manifest:
    """Encode every image of a source into a set of shards at `out`.

    flips stores the mirrored train images too; limit is the most images taken of each split.
    A file that is no image is listed in quarantine.jsonl and counted. part=(i, n) encodes the i-th
    of n runs of batches into out/parts/i-of-n; a part that is complete is left as it is, and `note`
    gets a sentence that says so. Raises DataError, and then leaves nothing behind.
    """
    _check_numbers(limit, shard_size_mb=shard_size_mb, batch=batch, lanes=lanes)
    out = Path(out)
    _check_target(out, overwrite, part)
    place = parts.place(out, part) if part else out
    work = _Encoding(
        source=open_source(src, size),
        codec=open_codec(codec, vae, device),
        root=place.parent / f".{place.name}.{os.getpid()}.partial",
        size=size,
        flips=flips,
        shard_bytes=int(shard_size_mb * 2**20),
        batch=batch,
        lanes=lanes,
        seed=seed,
        limit=limit,
        progress=progress,
        part=part,
    )
    if part:
        if not overwrite and parts.complete(place, work.describe({})):
            if note is not None:
                note(f"'{place}' is complete already and left as it is")
            return Manifest.load(place)
        parts.clear(place)
    return work.write(place, lambda: _check_target(out, overwrite, part))


def _check_numbers(limit: int | None, **above_zero: float) -> None:
    for name, value in above_zero.items():
        if value <= 0:
            raise DataError(f"{name}={value} is not possible; give a number above 0.")
    if limit is not None and limit < 1:
        raise DataError(f"limit={limit} is not possible; give 1 or more, or leave it out.")


def _check_target(out: Path, overwrite: bool, part: tuple[int, int] | None) -> None:
    """Refuse to write over anything but an older set, and over that only when asked."""
    if not out.exists() or (part and not (out / MANIFEST).is_file()):
        return
    if not overwrite:
        raise DataError(f"'{out}' exists already; choose another --out or give --overwrite.")
    if not (out / MANIFEST).is_file() and not (out.is_dir() and not any(out.iterdir())):
        raise DataError(
            f"'{out}' is not an encoded set, so --overwrite will not remove it; "
            f"choose another --out or remove it yourself."
        )


class _Encoding:
    """One run of encode: what it was asked, and what it has found so far."""

    def __init__(
        self,
        *,
        source: Source,
        codec: Codec,
        root: Path,
        size: int | None,
        flips: bool,
        shard_bytes: int,
        batch: int,
        lanes: int,
        seed: int,
        limit: int | None,
        progress: Progress | None,
        part: tuple[int, int] | None,
    ) -> None:
        self.source, self.codec, self.root = source, codec, root
        self.size, self.flips, self.shard_bytes = size, flips, shard_bytes
        self.batch, self.lanes, self.seed, self.limit = batch, lanes, seed, limit
        self.progress, self.part = progress, part
        self.moments = Moments()
        self.bad: list[BadPictureError] = []
        self.first: Picture | None = None
        self.stored: tuple[int, ...] = ()
        self.done = 0
        self.total = sum(len(self._range(p)) for p in source.splits.values())

    def write(self, place: Path, check: Callable[[], None]) -> Manifest:
        """Encode into a hidden directory, check again, and give it its name."""
        self.root.mkdir(parents=True)
        try:
            manifest = self.run()
            manifest.save(self.root)
            check()
            old = self.root.with_suffix(".old")
            if place.exists():
                place.rename(old)
            self.root.rename(place)
            shutil.rmtree(old, ignore_errors=True)
        except BaseException:
            shutil.rmtree(self.root, ignore_errors=True)
            raise
        return manifest

    def run(self) -> Manifest:
        """Encode all splits and describe the result."""
        splits = {}
        for number, (name, pictures) in enumerate(self.source.splits.items()):
            split = self._split(name, pictures, number)
            if split.count:
                splits[name] = split
            else:
                (self.root / split.index).unlink()
        if "train" not in splits and self.part is None:
            example = f" (first: {self.bad[0]})" if self.bad else ""
            raise DataError(
                f"source '{self.source.name}' has no readable training image: {len(self.bad)} of "
                f"{self.total} files are no images{example}; give a source with images."
            )
        if self.bad:
            lines = [json.dumps({"name": bad.name, "reason": bad.reason}) for bad in self.bad]
            (self.root / QUARANTINE).write_text("\n".join(lines) + "\n")
        return self.describe(splits)

    def describe(self, splits: dict[str, Split]) -> Manifest:
        """The manifest of what was encoded so far. Shapes are 0 where no image was met."""
        image, latent, stored = (0, 0, 0), (0, 0, 0), (0, 0, 0)
        if self.first is not None:
            given, height, width = self.first.image.shape
            image = (self.codec.image_channels(given), height, width)
            latent = (self.codec.channels(image[0]), *self.stored[1:])
            stored = self.stored
        mean, std = self.moments.result()
        shift, scale = self.codec.normalisation(mean, std)
        return Manifest(
            codec=self.codec.id,
            codec_hash=self.codec.hash,
            codec_source=self.codec.source,
            image_shape=image,
            latent_shape=latent,
            stored_shape=stored,
            posterior=self.codec.posterior,
            dtype=self.codec.dtype,
            shift=shift,
            scale=scale,
            mean=mean.tolist(),
            std=std.tolist(),
            class_names=list(self.source.class_names),
            num_classes=len(self.source.class_names),
            lanes=self.lanes,
            flips=self.flips,
            seed=self.seed,
            splits=splits,
            quarantined=len(self.bad),
            quarantine=QUARANTINE if self.bad else None,
            part=self._as_part(self.part) if self.part else None,
        )

    def _as_part(self, part: tuple[int, int]) -> Part:
        return Part(
            number=part[0],
            of=part[1],
            source={name: pictures.identity() for name, pictures in self.source.splits.items()},
            size=self.size,
            limit=self.limit,
            batch=self.batch,
            shard_bytes=self.shard_bytes,
            **self.moments.plain(),
        )

    def _range(self, pictures: Pictures) -> range:
        """Which places of a split's writing order are encoded here."""
        count = min(len(pictures), self.limit or len(pictures))
        return parts.cut(count, self.batch, self.part or (1, 1))

    def _split(self, name: str, pictures: Pictures, number: int) -> Split:
        """Encode and write one split, its images in a keyed order (a lane is not one class)."""
        variants = 2 if self.flips and name == "train" else 1
        writer = SplitWriter(
            self.root,
            name,
            shard_bytes=self.shard_bytes,
            variants=variants,
            first=self._range(pictures).start,
        )
        try:
            for batch in self._batches(pictures, number):
                images = torch.from_numpy(np.stack([picture.image for picture in batch]))
                images = images.expand(-1, self.codec.image_channels(images.shape[1]), -1, -1)
                raws = [self.codec.encode(images)]
                if variants == 2:
                    raws.append(self.codec.encode(images.flip(-1)))
                for raw in raws if name == "train" else ():
                    self.moments.add(raw, self.codec.posterior)
                arrays = [self._storable(raw, batch) for raw in raws]
                for i, picture in enumerate(batch):
                    writer.write([array[i] for array in arrays], picture.label)
            return writer.close()
        finally:
            writer.abort()

    def _batches(self, pictures: Pictures, number: int) -> Iterator[list[Picture]]:
        """Readable images in writing order, `batch` at a time; bad ones go to quarantine."""
        places = self._range(pictures)
        order = permute(np.arange(places.start, places.stop), len(pictures), key(self.seed, number))
        todo = iter(order.tolist())
        with ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="decode") as pool:
            while chunk := list(islice(todo, self.batch)):
                good = []
                for picture in pool.map(lambda i: _try(pictures, i), chunk):
                    if isinstance(picture, BadPictureError):
                        self.bad.append(picture)
                    else:
                        self._check_shape(picture)
                        good.append(picture)
                if good:
                    yield good
                self.done += len(chunk)
                if self.progress is not None:
                    self.progress(self.done, self.total)

    def _check_shape(self, picture: Picture) -> None:
        """All images have the shape of the first one, and the codec can take it."""
        if self.first is None:
            _, height, width = picture.image.shape
            factor = self.codec.factor
            if height % factor or width % factor:
                raise DataError(
                    f"image '{picture.name}' is {height}x{width}, but codec {self.codec.id} needs "
                    f"multiples of {factor}; give --size with a multiple of {factor}."
                )
            self.first = picture
        elif picture.image.shape != self.first.image.shape:
            raise DataError(
                f"image '{picture.name}' is (c, h, w) = {picture.image.shape}, while "
                f"'{self.first.name}' is {self.first.image.shape}; give --size to make all equal."
            )

    def _storable(self, raw: Tensor, batch: list[Picture]) -> np.ndarray:
        """Raw latents in the codec's storage type, little-endian."""
        array = raw.numpy().astype(np.dtype(self.codec.dtype).newbyteorder("<"))
        if not np.isfinite(array).all():
            place = int(np.flatnonzero(~np.isfinite(array).all((1, 2, 3)))[0])
            raise DataError(
                f"codec {self.codec.id} gave a latent that is not finite in {self.codec.dtype} for "
                f"'{batch[place].name}'; use other weights."
            )
        self.stored = array.shape[1:]
        return array


def _try(pictures: Pictures, i: int) -> Picture | BadPictureError:
    """A picture, or why there is none: an exception as a value, so that the others go on."""
    try:
        return pictures[i]
    except BadPictureError as bad:
        return bad
