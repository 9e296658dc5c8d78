"""A checkpoint with one wrong bit is never taken for a whole one: a bit of every byte of its
manifest, and of many bytes of every other file."""

import random
import shutil
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from parallel import launch, storage
from parallel.errors import DamagedError
from parallel.index import Index
from pretrain import manifest
from tests import ranks

FACTS = {"model": {"width": 32}, "objective": {}, "data": None, "latents": {}, "config": {}}


def write(folder: Path) -> None:
    tensors = {"model.a": torch.randn(7, 5), "optim.updates": torch.tensor(3.0)}
    manifest.write_alone(folder, tensors.items(), {"step": 3, "position": 24}, FACTS)


def read(folder: Path) -> dict[str, torch.Tensor]:
    """As a restart does. Raises DamagedError, or CheckpointError for a format that is not ours."""
    found = manifest.read_manifest(folder)
    tensors = {n: torch.zeros(s, dtype=d) for n, (s, d) in storage.contents(folder).items()}
    storage.read(tensors, folder, Index.from_json(found))
    return tensors


def accepted(folder: str, name: str, bits: list[int]) -> None:
    """In a rank: bits of a file whose flipping goes unnoticed must be none."""
    launch.join(launch.Place.here(), threads=1, timeout=timedelta(seconds=60))
    file = Path(folder) / name
    content = file.read_bytes()
    assert set(read(Path(folder))) == {"model.a", "optim.updates"}
    missed = []
    for bit in bits:
        wrong = bytearray(content)
        wrong[bit // 8] ^= 1 << bit % 8
        file.write_bytes(wrong)
        try:
            read(Path(folder))
        except (DamagedError, manifest.CheckpointError):
            continue
        missed.append(bit)
    shown = [wrong_place(content, bit) for bit in missed[:: max(1, len(missed) // 8)]]
    assert not missed, f"{len(missed)} flipped bits of {name} go unnoticed, such as {shown}"


def wrong_place(content: bytes, bit: int) -> bytes:
    byte = bit // 8
    return content[max(0, byte - 12) : byte + 8]


@pytest.mark.parametrize("name", ["manifest.json", ".metadata", "__0_0.distcp"])
def test_every_flipped_bit_is_found(name: str, tmp_path: Path) -> None:
    folder, log = tmp_path / "step_00000003", tmp_path / "log"
    write(folder)
    rng, places = random.Random(name), range((folder / name).stat().st_size)
    if name != "manifest.json":
        places = rng.sample(places, 100)
    bits = [8 * place + rng.randrange(8) for place in places]
    ranks.run(accepted, 1, str(folder), name, bits, log=log)
    shutil.rmtree(folder)
