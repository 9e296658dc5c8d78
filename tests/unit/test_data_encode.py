"""Sources and encode: every kind of source, quarantine, refusals, and shards others can read."""

import gzip
import io
import json
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from data_pipeline.codecs import open_codec
from data_pipeline.cursor import Cursor
from data_pipeline.encode import encode
from data_pipeline.errors import DataError
from data_pipeline.loader import Loader, LoaderConfig
from data_pipeline.pictures import centre_crop
from data_pipeline.shards import stat
from data_pipeline.sources import arrange, open_source
from data_pipeline.verify import verify

RNG = np.random.default_rng(0)


def png(shape: tuple[int, ...]) -> bytes:
    out = io.BytesIO()
    Image.fromarray(RNG.integers(0, 256, shape, dtype=np.uint8)).save(out, "PNG")
    return out.getvalue()


def tree(root: Path, splits: tuple[str, ...] = ("",), shape: tuple[int, ...] = (8, 8, 3)) -> Path:
    for split in splits:
        for kind in ("cat", "dog"):
            folder = root / split / kind
            folder.mkdir(parents=True)
            for i in range(3):
                (folder / f"{i}.png").write_bytes(png(shape))
    return root


def idx(root: Path, pack: bool = False) -> Path:
    root.mkdir()
    for stem, count in (("train", 6), ("t10k", 4)):
        images = RNG.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = np.arange(count, dtype=np.uint8) % 3
        head = struct.pack(">4I", 0x803, count, 28, 28), struct.pack(">2I", 0x801, count)
        for name, data in (
            (f"{stem}-images-idx3-ubyte", head[0] + images.tobytes()),
            (f"{stem}-labels-idx1-ubyte", head[1] + labels.tobytes()),
        ):
            if pack:
                (root / f"{name}.gz").write_bytes(gzip.compress(data))
            else:
                (root / name).write_bytes(data)
    return root


def test_a_folder_tree_becomes_shards_that_webdataset_reads(tmp_path: Path) -> None:
    src = tree(tmp_path / "src", ("train", "test"))
    manifest = encode(str(src), tmp_path / "out", flips=True)
    assert manifest.class_names == ["cat", "dog"]
    assert {name: split.count for name, split in manifest.splits.items()} == {"train": 6, "val": 6}
    assert manifest.image_shape == (3, 8, 8)
    assert manifest.latent_shape == manifest.stored_shape == (12, 4, 4)
    url = str(tmp_path / "out" / "train-000000.tar")
    samples = list(webdataset.WebDataset(url, shardshuffle=False).decode())
    assert sorted(sample["cls"] for sample in samples) == [0, 0, 0, 1, 1, 1]
    codec = open_codec("haar")
    want = {bytes(p.image): p.label for p in open_source(str(src)).splits["train"]}
    for sample in samples:
        image = codec.decode(torch.from_numpy(sample["npy"])[None])
        mirrored = codec.decode(torch.from_numpy(sample["flip.npy"])[None])
        assert want[image[0].numpy().tobytes()] == sample["cls"]
        assert torch.equal(mirrored.flip(-1), image)
    assert verify(tmp_path / "out").ok
    assert stat(tmp_path / "out")["splits"]["val"]["per_class"] == {"cat": 3, "dog": 3}


def test_a_tar_of_a_tree_is_read_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree(tmp_path / "pets", ("train", "validation", "test"), (8, 8))
    folder = tmp_path / "shared" / "pets"
    folder.mkdir(parents=True)
    (folder / "README.md").write_text("about")
    with tarfile.open(folder / "pets.tar", "w") as tar:
        tar.add(tmp_path / "pets", "pets")
    monkeypatch.setenv("PRETRAIN_DATA", str(tmp_path / "shared"))
    monkeypatch.chdir(tmp_path / "shared")
    for src in ("pets/pets.tar", "pets"):
        source = open_source(src)
        assert set(source.splits) == {"train", "val", "test"}
        assert source.splits["train"][0].image.shape == (1, 8, 8)
        assert len(list(source)) == 18


@pytest.mark.parametrize("pack", [False, True])
def test_idx_files_are_padded_to_32(tmp_path: Path, pack: bool) -> None:
    source = open_source(str(idx(tmp_path / "fashion", pack)))
    assert {name: len(split) for name, split in source.splits.items()} == {"train": 6, "val": 4}
    image, label, _ = source.splits["train"][4]
    assert image.shape == (1, 32, 32)
    assert label == 1
    assert image[0, :2].max() == image[0, -2:].max() == 0
    assert image[0, 2:-2, 2:-2].max() > 0


def test_idx_files_must_be_whole_and_all_there(tmp_path: Path) -> None:
    root = idx(tmp_path / "set")
    file = root / "train-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(DataError, match="train-images-idx3-ubyte"):
        open_source(str(root))
    (root / "t10k-labels-idx1-ubyte").unlink()
    file.write_bytes(file.read_bytes() + bytes(5))
    with pytest.raises(DataError, match="no t10k-labels"):
        open_source(str(root))


def test_digits_split_does_not_depend_on_the_seed(tmp_path: Path) -> None:
    source = open_source("digits")
    assert [len(split) for split in source.splits.values()] == [1437, 360]
    assert source.splits["train"][0].image.shape == (1, 32, 32)
    a = encode("digits", tmp_path / "a", seed=1, limit=40)
    b = encode("digits", tmp_path / "b", seed=1, limit=40)
    c = encode("digits", tmp_path / "c", seed=2, limit=40)
    assert a == b != c
    assert a.num_classes == 10


def test_a_file_that_is_no_image_is_quarantined(tmp_path: Path) -> None:
    src = tree(tmp_path / "src")
    (src / "cat" / "broken.png").write_bytes(png((8, 8, 3))[:60])
    (src / "dog" / "notes.txt").write_text("not an image")
    (src / "dog" / ".DS_Store").write_text("passed over")
    manifest = encode(str(src), tmp_path / "out")
    assert manifest.quarantined == 2
    assert manifest.splits["train"].count == 6
    lines = (tmp_path / "out" / str(manifest.quarantine)).read_text().splitlines()
    listed = {json.loads(line)["name"]: json.loads(line)["reason"] for line in lines}
    assert set(listed) == {"cat/broken.png", "dog/notes.txt"}
    assert all(listed.values())


def test_nothing_is_left_when_encode_fails(tmp_path: Path) -> None:
    src = tmp_path / "src" / "cat"
    src.mkdir(parents=True)
    (src / "a.png").write_text("no")
    with pytest.raises(DataError, match="no readable training image"):
        encode(str(src.parent), tmp_path / "out")
    (src / "b.png").write_bytes(png((8, 8, 3)))
    (src / "c.png").write_bytes(png((8, 10, 3)))
    with pytest.raises(DataError, match="--size"):
        encode(str(src.parent), tmp_path / "out")
    (src / "c.png").write_bytes(png((9, 9, 3)))
    (src / "b.png").unlink()
    with pytest.raises(DataError, match="multiples of 2"):
        encode(str(src.parent), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


def test_size_makes_unequal_images_equal(tmp_path: Path) -> None:
    src = tree(tmp_path / "src", shape=(20, 30, 3))
    (src / "cat" / "tall.png").write_bytes(png((90, 33, 3)))
    manifest = encode(str(src), tmp_path / "out", size=16)
    assert manifest.image_shape == (3, 16, 16)
    flat = centre_crop(Image.new("RGB", (100, 40), (9, 9, 9)), 16)
    assert flat.size == (16, 16)
    assert np.asarray(flat).min() == np.asarray(flat).max() == 9


def test_an_existing_directory_is_kept_unless_told(tmp_path: Path) -> None:
    src = str(tree(tmp_path / "src"))
    encode(src, tmp_path / "out")
    with pytest.raises(DataError, match="--overwrite"):
        encode(src, tmp_path / "out")
    assert encode(src, tmp_path / "out", limit=2, overwrite=True).splits["train"].count == 2
    with pytest.raises(DataError, match="will not remove"):
        encode(src, tmp_path / "src", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "src"]


def test_sources_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="was not found"):
        open_source(str(tmp_path / "nowhere"))
    (tmp_path / "file.txt").write_text("hello")
    with pytest.raises(DataError, match="uncompressed tar"):
        open_source(str(tmp_path / "file.txt"))
    with pytest.raises(DataError, match="no class folders"):
        open_source(str(tmp_path))
    with pytest.raises(DataError, match="no train folder"):
        arrange("x", ["val/cat/a.png", "test/cat/a.png"])
    with pytest.raises(DataError, match="lanes=0"):
        encode("digits", tmp_path / "out", lanes=0)


def test_labels_are_alphabetical_over_all_splits() -> None:
    names, items = arrange("x", ["s/train/b/1", "s/test/a/1", "s/val/c/1", "s/README"])
    assert names == ("a", "b", "c")
    assert items == {
        "test": [("s/test/a/1", 0)],
        "train": [("s/train/b/1", 1)],
        "val": [("s/val/c/1", 2)],
    }


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> str:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    model = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
        layers_per_block=1,
        scaling_factor=0.25,
        shift_factor=0.5,
    )
    path = tmp_path_factory.mktemp("vae")
    model.save_pretrained(path)
    return str(path)


def test_kl_stores_the_posterior_and_draws_it_afresh(tmp_path: Path, vae: str) -> None:
    src = tree(tmp_path / "src", shape=(8, 8))
    manifest = encode(str(src), tmp_path / "out", codec="kl", vae=vae, flips=True)
    assert manifest.posterior
    assert manifest.image_shape == (3, 8, 8)
    assert manifest.latent_shape == (4, 4, 4)
    assert manifest.stored_shape == (8, 4, 4)
    assert manifest.shift == [0.5] * 4
    assert manifest.scale == [0.25] * 4
    assert verify(tmp_path / "out").ok
    assert len(manifest.codec_hash) == 64
    codec = open_codec("kl", vae=vae)
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    mean, log_variance = codec.encode(images).chunk(2, 1)
    assert codec.decode(mean).shape == images.shape
    cfg = LoaderConfig(path=str(tmp_path / "out"), global_batch=6, codec="kl")
    with Loader(cfg, 0, 1, seed=0) as loader:
        batches = [batch for (batch, _), _ in zip(loader.start(Cursor()), range(40), strict=False)]
    first = [batch.x[batch.samples.tolist().index(0)] for batch in batches]
    assert len({x.numpy().tobytes() for x in first}) == 40
    # Mean and spread of the draws are those the codec gave; both orientations are among them.
    raw = manifest.denormalise(torch.cat([batch.x for batch in batches])).double()
    mean = torch.tensor(manifest.mean, dtype=torch.float64)
    std = torch.tensor(manifest.std, dtype=torch.float64)
    assert ((raw.mean((0, 2, 3)) - mean).abs() < 0.1 * std).all()
    torch.testing.assert_close(raw.std((0, 2, 3)), std, rtol=0.1, atol=0)
