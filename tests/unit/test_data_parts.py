"""Encoding in parts and joining them: the same set as encoding at once, whatever is killed."""

import io
import json
import math
import os
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipeline import parts
from data_pipeline.encode import encode
from data_pipeline.errors import DataError
from data_pipeline.merge import merge
from data_pipeline.moments import Moments
from data_pipeline.shards import Manifest, read_index
from data_pipeline.verify import verify

BATCH = 4
ASKED: dict[str, Any] = {"batch": BATCH, "shard_size_mb": 0.01, "seed": 3, "flips": True}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """26 train images, of which 2 are broken, and 5 of val, one broken."""
    root = tmp_path_factory.mktemp("source")
    rng = np.random.default_rng(0)
    for split, count, broken in (("train", 26, (4, 15)), ("val", 5, (2,))):
        for i in range(count):
            folder = root / split / ("cat", "dog", "owl")[i % 3]
            folder.mkdir(parents=True, exist_ok=True)
            out = io.BytesIO()
            pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(out, "PNG")
            data = out.getvalue()[:60] if i in broken else out.getvalue()
            (folder / f"{i}.png").write_bytes(data)
    return root


def in_parts(source: Path | str, out: Path, of: int, **asked: Any) -> Path:
    for number in range(1, of + 1):
        encode(str(source), out, part=(number, of), **(ASKED | asked))
    return out


def samples(root: Path) -> dict[str, list[tuple[int, bytes]]]:
    """Label and payloads of every sample, in order, as the index says."""
    manifest = Manifest.load(root)
    size = int(np.prod(manifest.stored_shape)) * np.dtype(manifest.dtype).itemsize
    found: dict[str, list[tuple[int, bytes]]] = {}
    for name, split in manifest.splits.items():
        tars = [(root / shard.name).read_bytes() for shard in split.shards]
        found[name] = [
            (int(row["label"]), b"".join(tars[row["shard"]][o : o + size] for o in row["offset"]))
            for row in read_index(root, split)
        ]
    return found


def keys(root: Path, split: str) -> list[str]:
    found = []
    for file in sorted(root.glob(f"{split}-*.tar")):
        with tarfile.open(file) as tar:
            found += [name.split(".")[0] for name in tar.getnames() if name.endswith(".cls")]
    return found


def equal(a: Path, b: Path) -> None:
    """Two sets hold the same, but for where the tars are cut."""
    one, two = Manifest.load(a), Manifest.load(b)
    for name, value in one.model_dump(exclude={"splits", "shift", "scale", "mean", "std"}).items():
        assert getattr(two, name) == value, name
    for name in ("shift", "scale", "mean", "std"):
        np.testing.assert_allclose(
            getattr(one, name), getattr(two, name), rtol=1e-15, atol=0, err_msg=name
        )
    assert samples(a) == samples(b)
    listed = [sorted(p.read_text().splitlines()) for p in (a, b) for p in p.glob("*.jsonl")]
    assert listed[: len(listed) // 2] == listed[len(listed) // 2 :]
    for split in one.splits:
        assert len(set(keys(b, split))) == two.splits[split].count
    assert verify(b).problems == []


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "set"
    encode(str(source), out, **ASKED)
    return out


# There are 7 batches of train and 2 of val: of 9 parts two hold no train, one nothing at all.
@pytest.mark.parametrize("of", [1, 2, 3, 7, 9])
def test_joined_parts_are_the_set_that_one_process_writes(
    source: Path, whole: Path, tmp_path: Path, of: int
) -> None:
    out = in_parts(source, tmp_path / "set", of)
    held = [Manifest.load(parts.place(out, (i, of))) for i in range(1, of + 1)]
    assert sum("train" not in part.splits for part in held) == max(0, of - 7)
    assert sum("val" not in part.splits for part in held) == max(0, of - 2)
    assert all(verify(parts.place(out, (i, of))).ok for i in range(1, of + 1))
    assert merge(out) == Manifest.load(out)
    assert Manifest.load(out).quarantined == 3
    equal(whole, out)
    assert {path.suffix for path in out.iterdir()} == {".tar", ".npy", ".json", ".jsonl"}


def test_an_autoencoders_numbers_come_from_its_weights(tmp_path: Path) -> None:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        layers_per_block=1,
        scaling_factor=0.25,
        shift_factor=0.5,
    ).save_pretrained(tmp_path / "vae")
    asked = ASKED | {"codec": "kl", "vae": str(tmp_path / "vae"), "limit": 9, "size": 8}
    encode("digits", tmp_path / "whole", **asked)
    out = in_parts("digits", tmp_path / "set", 4, **asked)
    assert merge(out).scale == [0.25] * 4
    equal(tmp_path / "whole", out)


def test_sums_do_not_depend_on_where_the_parts_are_cut() -> None:
    """A mean near zero, and a spread a million times smaller than the values."""
    generator = torch.Generator().manual_seed(0)
    batches = torch.randn(300, 1, 2, 3, 3, generator=generator)
    batches[:, :, 1] = 1000 + batches[:, :, 1] / 1000

    def seen(some: torch.Tensor) -> Moments:
        moments = Moments()
        for batch in some:
            moments.add(batch, posterior=False)
        return moments

    mean, std = seen(batches).result()
    exact = [math.fsum(batches[:, :, c].double().flatten().tolist()) / 2700 for c in range(2)]
    np.testing.assert_allclose(mean, exact, rtol=1e-14, atol=0)
    for size in (1, 7, 150):
        joined = Moments()
        for some in batches.split(size):
            plain = json.loads(json.dumps(seen(some).plain()))
            joined.join(**plain)
        assert joined.result()[0].tolist() == mean.tolist()
        assert joined.result()[1].tolist() == std.tolist()


def test_a_complete_part_is_left_and_a_damaged_one_written_anew(
    source: Path, tmp_path: Path
) -> None:
    out, said = tmp_path / "set", []
    asked = ASKED | {"part": (1, 2), "note": said.append}
    first = encode(str(source), out, **asked)
    place = parts.place(out, (1, 2))
    tar = place / "train-000000.tar"
    written = tar.stat().st_mtime_ns
    assert said == []
    assert encode(str(source), out, **asked) == first
    assert (len(said), tar.stat().st_mtime_ns) == (1, written)
    assert "complete" in said[0]
    for break_it in (
        lambda: tar.write_bytes(tar.read_bytes()[:-512]),
        lambda: (place / "train.index.npy").write_bytes(b"cut"),
        lambda: shutil.rmtree(place),
    ):
        break_it()
        leftover = place.parent / ".1-of-2.99.partial"
        leftover.mkdir()
        assert encode(str(source), out, **asked) == first
        assert verify(place).ok
        assert [path.name for path in place.parent.iterdir()] == ["1-of-2"]
    assert len(said) == 1
    written = tar.stat().st_mtime_ns
    encode(str(source), out, **(asked | {"overwrite": True}))
    assert tar.stat().st_mtime_ns > written


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"codec": "haar2"}, "codec"),
        ({"size": 4}, "size"),
        ({"flips": False}, "flips"),
        ({"seed": 4}, "seed"),
        ({"lanes": 8}, "lanes"),
        ({"batch": 5}, "batch"),
        ({"limit": 9}, "limit"),
        ({"shard_size_mb": 1}, "shard_bytes"),
    ],
)
def test_parts_of_other_settings_are_refused(
    source: Path, tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    out = tmp_path / "set"
    encode(str(source), out, part=(1, 2), **ASKED)
    with pytest.raises(DataError, match=f"other settings.*{named}"):
        encode(str(source), out, part=(1, 2), **(ASKED | change))
    encode(str(source), out, part=(2, 2), **(ASKED | change))
    with pytest.raises(DataError, match=f"other settings.*{named}"):
        merge(out)


def test_parts_of_another_list_of_images_are_refused(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    encode(str(source), out, part=(1, 2), **ASKED)
    other = tmp_path / "source"
    shutil.copytree(source, other)
    (other / "train" / "owl" / "2.png").rename(other / "train" / "owl" / "99.png")
    encode(str(other), out, part=(2, 2), **ASKED)
    with pytest.raises(DataError, match="other settings.*source"):
        merge(out)


def test_parts_that_are_missing_or_damaged_are_refused(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    for wrong in ("0/2", "3/2", "2", "a/b", "-1/2", "1/0"):
        with pytest.raises(DataError, match="expected I/N"):
            parts.parse(wrong)
    with pytest.raises(DataError, match="no parts"):
        merge(out)
    in_parts(source, out, 3)
    shutil.copytree(out, tmp_path / "good")
    (out / "parts" / "2-of-3" / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"lacks part 2/3.*--part 2/3"):
        merge(out)
    shutil.rmtree(out / "parts" / "2-of-3")
    shutil.copytree(out / "parts" / "3-of-3", out / "parts" / "2-of-3")
    with pytest.raises(DataError, match="does not hold part 2/3"):
        merge(out)
    encode(str(source), out, part=(2, 3), **(ASKED | {"overwrite": True}))
    encode(str(source), out, part=(1, 2), **ASKED)
    with pytest.raises(DataError, match=r"several cuts, into \[2, 3\]"):
        merge(out)
    shutil.rmtree(out / "parts" / "1-of-2")
    for name in ("train-000000.tar", "train.index.npy", "quarantine.jsonl"):
        file = next((out / "parts").glob(f"*/{name}"))
        data = file.read_bytes()
        file.unlink()
        with pytest.raises(DataError, match=f"is damaged: {name} is missing.*--part"):
            merge(out)
        if name != "quarantine.jsonl":
            file.write_bytes(data[:-9])
            with pytest.raises(DataError, match=f"is damaged: {name} has"):
                merge(out)
        file.write_bytes(data)
    assert not (out / "manifest.json").exists()
    assert merge(out) == merge(tmp_path / "good")


def test_parts_with_images_of_other_shapes_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "source" / "cat"
    folder.mkdir(parents=True)
    Image.new("L", (8, 8)).save(folder / "a.png")
    Image.new("L", (4, 4)).save(folder / "b.png")
    out = in_parts(tmp_path / "source", tmp_path / "set", 2, batch=1)
    with pytest.raises(DataError, match="--size"):
        merge(out)


class KilledError(Exception):
    pass


def test_a_merge_killed_anywhere_is_completed_by_the_next(
    source: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh = in_parts(source, tmp_path / "fresh", 3)
    real = {name: getattr(os, name) for name in ("rename", "unlink", "rmdir")}
    left = [0]

    def mortal(name: str) -> Any:
        def call(*words: Any, **options: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise KilledError(name)
            return real[name](*words, **options)

        return call

    deaths, seen = 0, set()
    for calls in range(1000):
        out = tmp_path / "set"
        shutil.copytree(fresh, out)
        with monkeypatch.context() as patched:
            left[0] = calls
            for name in real:
                patched.setattr(os, name, mortal(name))
            try:
                merge(out)
            except KilledError:
                deaths += 1
                whole_already = (out / "manifest.json").exists()
                assert not whole_already or verify(out).ok
                seen.add(whole_already)
        merge(out)
        equal(whole, out)
        assert not [path for path in out.iterdir() if path.is_dir()]
        shutil.rmtree(out)
        if left[0] >= 0:
            break
    assert deaths > 10
    assert seen == {False, True}  # killed before and after the set was whole
    assert merge(fresh) == merge(fresh)  # with nothing left to join it is what it is


def test_an_older_set_is_replaced_only_when_told(source: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    old = encode("digits", out, limit=4)
    with pytest.raises(DataError, match="--overwrite"):
        encode(str(source), out, part=(1, 2), **ASKED)
    in_parts(source, out, 2, overwrite=True)
    assert Manifest.load(out) == old  # until the parts are joined
    with pytest.raises(DataError, match="another set.*--overwrite"):
        merge(out)
    merge(out, overwrite=True)
    equal(whole, out)
    in_parts(source, out, 3, overwrite=True)
    lost = next((out / "parts").glob("1-of-3/train-*.tar"))
    lost.unlink()
    with pytest.raises(DataError, match=f"{lost.name} is missing"):
        merge(out, overwrite=True)
    equal(whole, out)


def test_the_manifest_of_a_part_keeps_every_bit(source: Path, tmp_path: Path) -> None:
    manifest = encode(str(source), tmp_path / "set", part=(1, 2), **ASKED)
    text = (tmp_path / "set" / "parts" / "1-of-2" / "manifest.json").read_text()
    assert json.loads(text)["part"]["total"] == parts.of(manifest).total
