"""A set behind a URL: its files come whole into a local cache, checked, once a machine.

What `webdataset` can open can be a set's address: http(s), gs, hf, sftp, and s3 by the AWS command.
The cache is named by the manifest's content, so a set that was encoded again is another one.
"""

import fcntl
import hashlib
import os
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import webdataset

from data_pipeline.errors import DataError
from data_pipeline.shards import MANIFEST, Manifest, Shard

ORIGIN = "origin"  # file of a cache that holds the address
TRIES = 3  # of a file, a second and then two apart
PIECE = 1 << 20  # bytes read at once


def is_remote(path: str | Path) -> bool:
    return "://" in str(path)


def here(path: str, cache: str | None) -> Path:
    """The directory of a set; of a remote one its cache, with manifest and indexes in it.

    Raises DataError if the address cannot be read, or holds no set.
    """
    if not is_remote(path):
        return Path(path)
    manifest = _manifest(path)
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dit-pretrain"
    root = Path(cache or home) / hashlib.sha256(manifest).hexdigest()[:16]
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _alone(root / MANIFEST):
            if not (root / MANIFEST).is_file():
                _replace(root / ORIGIN, path.encode())
                _replace(root / MANIFEST, manifest)
    except OSError as error:
        raise DataError(f"'{root}' cannot be written ({error}); set data.cache.") from error
    for split in Manifest.load(root).splits.values():
        _fetch(path, root / split.index, split.index_sha256, None)
    return root


def origin(root: Path) -> str | None:
    """The address of the set that a directory is the cache of, None if it is no cache."""
    file = root / ORIGIN
    return file.read_text() if file.is_file() else None


def fetch(path: str, root: Path, shard: Shard) -> None:
    """Brings one tar of a remote set into its cache, unless it is there. Raises DataError."""
    _fetch(path, root / shard.name, shard.sha256, shard.bytes)


def _manifest(path: str) -> bytes:
    address = f"{path.rstrip('/')}/{MANIFEST}"
    try:
        return b"".join(_pieces(address))
    except OSError as error:
        raise DataError(
            f"'{address}' cannot be read ({error}); data.path must be the address of a directory "
            "that `pretrain data encode` wrote."
        ) from error


def _fetch(path: str, file: Path, sha256: str, size: int | None) -> None:
    with _alone(file):
        if file.is_file():
            return
        address = f"{path.rstrip('/')}/{file.name}"
        reason = ""
        for attempt in range(TRIES):
            time.sleep(attempt)
            try:
                reason = _try(address, file, sha256)
            except OSError as error:
                reason = f"{error}"
            if not reason:
                return
        promised = "" if size is None else f" of {size} bytes"
        raise DataError(
            f"'{address}'{promised} could not be fetched in {TRIES} tries: {reason}; start again "
            f"when its server is back, what was fetched stays in '{file.parent}'."
        )


def _try(address: str, file: Path, sha256: str) -> str:
    """What is wrong with what came, "" if nothing."""
    half, found, count = file.with_name(f".{file.name}.{os.getpid()}.part"), hashlib.sha256(), 0
    try:
        with half.open("wb") as out:
            for piece in _pieces(address):
                found.update(piece)
                count += out.write(piece)
            out.flush()
            os.fsync(out.fileno())
        if found.hexdigest() != sha256:
            return f"{count} bytes came, and they are not those that were encoded"
        half.replace(file)
    finally:
        half.unlink(missing_ok=True)
    return ""


def _pieces(address: str) -> Iterator[bytes]:
    """Raises OSError if the address cannot be opened, or the stream ends early."""
    opened = f"pipe:aws s3 cp {shlex.quote(address)} -" if address.startswith("s3://") else address
    try:
        with webdataset.gopen(opened) as stream:
            while piece := stream.read(PIECE):
                yield piece
    except ValueError as error:
        raise OSError(str(error)) from error


def _replace(file: Path, content: bytes) -> None:
    half = file.with_name(f".{file.name}.part")
    half.write_bytes(content)
    half.replace(file)


@contextmanager
def _alone(file: Path) -> Iterator[None]:
    """One process of this machine at a time."""
    with file.with_name(f".{file.name}.lock").open("w") as lock:
        # why: without locks a file may be fetched twice, which costs time and nothing else.
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
