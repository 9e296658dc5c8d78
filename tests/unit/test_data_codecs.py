"""Codecs: the wavelet is exact, the autoencoder keeps its posterior; draws have an address."""

from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline import draws
from data_pipeline.codecs import codec_id, open_codec
from data_pipeline.errors import DataError


@pytest.mark.parametrize("levels", [1, 2, 3])
@pytest.mark.parametrize("channels", [1, 3])
def test_haar_is_bitwise_exact_after_storage(levels: int, channels: int) -> None:
    codec = open_codec(f"haar{levels}")
    images = torch.randint(0, 256, (16, channels, 32, 32), dtype=torch.uint8)
    # The largest values come from blocks of black and white with any pattern of signs.
    images[:8] = torch.randint(0, 2, (8, channels, 32, 32), dtype=torch.uint8) * 255
    images[8], images[9] = 0, 255
    raw = codec.encode(images)
    stored = raw.to(getattr(torch, codec.dtype))
    assert raw.shape == (16, codec.channels(channels), 32 // codec.factor, 32 // codec.factor)
    assert torch.equal(stored.float(), raw)
    assert torch.equal(codec.decode(stored), images)


def test_haar_needs_float32_from_the_third_level_on() -> None:
    # One pixel off white: a sum of 64 that needs 13 bits.
    images = torch.full((1, 1, 8, 8), 255, dtype=torch.uint8)
    images[..., 0, 0] = 254
    raw = open_codec("haar3").encode(images)
    assert open_codec("haar2").dtype == "float16"
    assert open_codec("haar3").dtype == "float32"
    assert not torch.equal(raw.half().float(), raw)


def test_haar_is_orthonormal() -> None:
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    energy = ((images.float() - 127.5) / 128).square().sum()
    torch.testing.assert_close(open_codec("haar2").encode(images).square().sum(), energy)


def test_unknown_codecs_and_misplaced_weights_are_refused(tmp_path: Path) -> None:
    assert codec_id("haar") == "haar1"
    with pytest.raises(DataError, match="codec 'wavelet' is unknown"):
        open_codec("wavelet")
    with pytest.raises(DataError, match="needs weights"):
        open_codec("kl")
    with pytest.raises(DataError, match="has no weights"):
        open_codec("haar", vae="x")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(DataError, match="no AutoencoderKL"):
        open_codec("kl", vae=str(tmp_path))


def test_flips_depend_on_seed_and_position_alone() -> None:
    whole = draws.flips(3, 1000, 400)
    assert (draws.flips(3, 1100, 50) == whole[100:150]).all()
    assert (draws.flips(4, 1000, 400) != whole).any()
    assert 140 < whole.sum() < 260


@pytest.mark.parametrize("size", [1, 7, 8, 64, 75])
def test_normals_depend_on_seed_and_position_alone(size: int) -> None:
    rows = draws.normals(3, 50, 20, size)
    for start, count in ((0, 1), (0, 7), (7, 13), (19, 1)):
        some = draws.normals(3, 50 + start, count, size)
        assert (some == rows[start : start + count]).all()
    assert len({row.tobytes() for row in rows}) == 20


def test_normals_are_normal() -> None:
    x = draws.normals(0, 0, 30, 4096).reshape(-1).astype(np.float64)
    moments = [x.mean(), x.var(), (x**3).mean(), (x**4).mean()]
    assert np.allclose(moments, [0, 1, 0, 3], atol=0.06)
    assert abs(np.corrcoef(x[:-1], x[1:])[0, 1]) < 0.01
