"""The loader: the same batches on any number of ranks, from any cursor, with damage noticed."""

import json
import shutil
import threading
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline.batch import Batch
from data_pipeline.cursor import Cursor
from data_pipeline.encode import encode
from data_pipeline.errors import DataError
from data_pipeline.loader import Loader, LoaderConfig, check
from data_pipeline.shards import Manifest, SplitWriter, read_index
from data_pipeline.verify import verify

COUNT = 150
SHAPE = (2, 3, 5)


def write_set(root: Path, *, posterior: bool = False, variants: int = 2, lanes: int = 8) -> Path:
    root.mkdir()
    rng = np.random.default_rng(1)
    stored = (SHAPE[0] * (1 + posterior), *SHAPE[1:])
    writer = SplitWriter(root, "train", shard_bytes=100_000, variants=variants)
    for i in range(COUNT):
        latents = [rng.standard_normal(stored).astype("<f2") for _ in range(variants)]
        writer.write(latents, i % 7)
    Manifest(
        codec="haar1",
        codec_hash="0",
        codec_source=None,
        image_shape=(1, 6, 10),
        latent_shape=SHAPE,
        stored_shape=stored,
        posterior=posterior,
        dtype="float16",
        shift=[0.5, -1.0],
        scale=[2.0, 0.25],
        mean=[0.0, 0.0],
        std=[1.0, 1.0],
        class_names=list("abcdefg"),
        num_classes=7,
        lanes=lanes,
        flips=variants == 2,
        seed=0,
        splits={"train": writer.close()},
        quarantined=0,
        quarantine=None,
    ).save(root)
    return root


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "posterior"])
def stored(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_set(tmp_path_factory.mktemp("data") / "set", posterior=request.param)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return write_set(tmp_path / "set")


def take(
    path: Path,
    n: int,
    *,
    rank: int = 0,
    size: int = 1,
    cursor: Cursor | None = None,
    **fields: object,
) -> list[tuple[Batch, Cursor]]:
    cfg = LoaderConfig.model_validate({"path": str(path), "global_batch": 24, **fields})
    with Loader(cfg, rank, size, seed=11) as loader:
        return list(islice(loader.start(cursor or Cursor()), n))


def same(a: Batch, b: Batch) -> bool:
    arrays = (a.slots == b.slots).all() and (a.samples == b.samples).all()
    return bool(arrays) and torch.equal(a.x, b.x) and torch.equal(a.labels, b.labels)


@pytest.mark.parametrize("order", ["chunks", "samples"])
@pytest.mark.parametrize("size", [2, 3, 24])
def test_ranks_together_give_the_one_rank_batch(stored: Path, size: int, order: str) -> None:
    whole = take(stored, 9, order=order)
    parts = [take(stored, 9, rank=rank, size=size, order=order, workers=3) for rank in range(size)]
    for step, (batch, cursor) in enumerate(whole):
        mine = [part[step][0] for part in parts]
        assert all(part[step][1] == cursor == Cursor(24 * (step + 1)) for part in parts)
        joined = Batch(
            torch.cat([b.x for b in mine]),
            torch.cat([b.labels for b in mine]),
            np.concatenate([b.slots for b in mine]),
            np.concatenate([b.samples for b in mine]),
        )
        assert same(joined, batch)
        assert batch.slots.tolist() == list(range(24))


def test_a_resumed_loader_goes_on_as_if_never_stopped(stored: Path) -> None:
    whole = take(stored, 20)
    for stop in (1, 6, 13):  # 24 does not divide 150: batches straddle epochs
        rest = take(stored, 20 - stop, cursor=whole[stop - 1][1], workers=1, prefetch=7)
        assert all(
            same(a, b) and ca == cb for (a, ca), (b, cb) in zip(whole[stop:], rest, strict=True)
        )


def test_the_pieces_in_which_a_batch_is_decoded_leave_no_trace(
    stored: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = take(stored, 4)
    stored_elements = int(np.prod(Manifest.load(stored).stored_shape))
    for rows in (1, 7, 24):
        monkeypatch.setattr("data_pipeline.loader.PIECE", rows * stored_elements)
        assert all(same(a, b) for (a, _), (b, _) in zip(whole, take(stored, 4), strict=True))


def test_workers_leave_the_threads_of_torch_alone(stored: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        cfg = LoaderConfig(path=str(stored), global_batch=24, workers=1)
        with Loader(cfg, 0, 1, seed=0) as loader:
            assert loader._pool.submit(torch.get_num_threads).result() == 1
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_what_is_passed_over_is_not_read_and_all_else_is_as_it_was(stored: Path) -> None:
    whole = take(stored, 60)
    cursor = Cursor().pass_over((48, 96)).pass_over((24 * 40, 24 * 45))
    rest = take(stored, 53, cursor=cursor, workers=3)
    wanted = [step for step in range(60) if step not in (2, 3, *range(40, 45))]
    for (batch, after), step in zip(rest, wanted, strict=True):
        assert same(batch, whole[step][0])
        assert after.passed_over == cursor.passed_over
    assert [rest[step][1].position for step in (0, 1, 37, 38)] == [24, 96, 24 * 45, 24 * 46]
    again = take(stored, 10, cursor=rest[1][1], rank=1, size=2)
    for (batch, _), (one, _) in zip(again, rest[2:12], strict=True):
        assert (batch.samples == one.samples[12:]).all()


def test_every_epoch_has_every_sample_once(stored: Path) -> None:
    ids = np.concatenate([batch.samples for batch, _ in take(stored, 25)])
    assert (np.sort(ids.reshape(4, COUNT), 1) == np.arange(COUNT)).all()


def test_values_are_the_normalised_ones_of_the_chosen_orientation(tmp_path: Path) -> None:
    path = write_set(tmp_path / "set")
    manifest = Manifest.load(path)
    rng = np.random.default_rng(1)
    raw = torch.tensor(
        np.stack([rng.standard_normal(SHAPE).astype("<f2") for _ in range(2 * COUNT)])
    )
    want = manifest.normalise(raw.float()).view(COUNT, 2, *SHAPE)
    torch.testing.assert_close(manifest.denormalise(want[:, 0]), raw[::2].float())
    picked = []
    for batch, _ in take(path, 12):
        assert batch.x.dtype == torch.float32
        assert batch.labels.tolist() == [i % 7 for i in batch.samples]
        for x, sample in zip(batch.x, batch.samples, strict=True):
            hits = [torch.equal(x, want[sample, v]) for v in (0, 1)]
            assert sum(hits) == 1
            picked.append(hits.index(True))
    assert 90 < sum(picked) < 198


def test_batch_splits_into_equal_pieces(stored: Path) -> None:
    batch, _ = take(stored, 1)[0]
    pieces = batch.split(3)
    assert [piece.slots.tolist() for piece in pieces] == np.arange(24).reshape(3, 8).tolist()
    assert torch.equal(torch.cat([piece.x for piece in pieces]), batch.x)
    assert same(batch.to("cpu"), batch)
    with pytest.raises(ValueError, match="24 samples cannot be cut into 5"):
        batch.split(5)


def test_closing_ends_the_threads(stored: Path) -> None:
    before = threading.active_count()
    loader = Loader(LoaderConfig(path=str(stored), global_batch=24, workers=4), 0, 1, seed=0)
    batches = loader.start(Cursor())
    next(batches)
    assert threading.active_count() > before
    loader.close()
    loader.close()
    assert threading.active_count() == before


def test_verify_finds_a_flipped_byte(copy: Path) -> None:
    assert verify(copy).ok
    assert verify(copy).samples == COUNT
    index = read_index(copy, Manifest.load(copy).split("train"))
    file = copy / "train-000001.tar"
    data = bytearray(file.read_bytes())
    data[int(index[index["shard"] == 1]["offset"][0, 0]) + 3] ^= 1
    file.write_bytes(data)
    problems = verify(copy).problems
    assert any("SHA-256" in problem for problem in problems)
    assert any("CRC-32" in problem and "train-000001.tar" in problem for problem in problems)
    with pytest.raises(DataError, match=r"train-000001\.tar' at offset \d+: sample \d+"):
        take(copy, 40)
    assert len(take(copy, 40, check_crc=False)) == 40


def test_verify_notices_missing_files_and_wrong_labels(copy: Path) -> None:
    (copy / "train-000001.tar").unlink()
    file = copy / "train.index.npy"
    index = np.load(file)
    index["label"][3] = 99
    np.save(file, index)
    text = "\n".join(verify(copy).problems)
    assert "train-000001.tar: missing" in text
    assert "train.index.npy: SHA-256" in text
    assert "first is 99 of sample 3" in text
    file.write_bytes(b"nothing")
    assert "cannot be read" in verify(copy).problems[0]


def cut(path: Path, keep: int) -> int:
    """Cut the second tar; returns how many (sample, orientation) pairs are lost."""
    file = path / "train-000001.tar"
    file.write_bytes(file.read_bytes()[:keep])
    index = read_index(path, Manifest.load(path).split("train"))
    rows = index[index["shard"] == 1]
    return int((rows["offset"] + np.prod(SHAPE) * 2 > keep).sum())


def fit(path: Path, **fields: object) -> Manifest:
    cfg = LoaderConfig.model_validate({"path": str(path), "global_batch": 24, **fields})
    return check(cfg, num_classes=7, channels=2, input_size=3)


def square(path: Path) -> None:
    """Make the manifest claim square latents, which check wants."""
    file = path / "manifest.json"
    raw = json.loads(file.read_text())
    raw["latent_shape"] = [2, 3, 3]
    file.write_text(json.dumps(raw))


def test_a_truncated_tar_is_refused_before_the_start(copy: Path) -> None:
    square(copy)
    assert fit(copy).num_classes == 7
    cut(copy, 50_000)
    with pytest.raises(DataError, match=r"train-000001\.tar' has 50000 bytes.*at offset \d+"):
        fit(copy)
    with pytest.raises(DataError, match="data.max_bad=3"):
        fit(copy, max_bad=3)
    assert fit(copy, max_bad=COUNT).num_classes == 7
    (copy / "train-000001.tar").unlink()
    with pytest.raises(DataError, match=r"train-000001\.tar' is missing"):
        fit(copy)


@pytest.mark.parametrize("deleted", [False, True])
def test_bad_samples_are_replaced_alike_on_every_rank(copy: Path, deleted: bool) -> None:
    clean = take(copy, 10)
    lost = cut(copy, 0 if deleted else 60_000)
    if deleted:
        (copy / "train-000001.tar").unlink()
    whole = take(copy, 10, max_bad=lost)
    cfg = LoaderConfig(path=str(copy), global_batch=24, max_bad=lost)
    parts = []
    for rank in range(2):
        with Loader(cfg, rank, 2, seed=11) as loader:
            parts.append([batch for batch, _ in islice(loader.start(Cursor()), 10)])
            assert 0 < loader.bad <= lost
            assert all("train-000001" in bad.shard for bad in loader.quarantine)
            assert len(loader.quarantine) == loader.bad
    changed = 0
    for step in range(10):
        batch, before = whole[step][0], clean[step][0]
        assert (np.concatenate([p[step].samples for p in parts]) == batch.samples).all()
        assert torch.equal(torch.cat([p[step].x for p in parts]), batch.x)
        moved = batch.samples != before.samples
        changed += int(moved.sum())
        assert torch.equal(batch.x[~moved], before.x[~moved])
        assert batch.labels.tolist() == [i % 7 for i in batch.samples]
    assert changed > 0


def test_too_many_bad_samples_stop_the_iterating_thread(copy: Path) -> None:
    lost = cut(copy, 60_000)
    with pytest.raises(DataError, match=r"train-000001\.tar' at offset \d+.*data\.max_bad=2"):
        take(copy, 20, max_bad=2)
    shutil.copy(copy / "train-000000.tar", copy / "train-000001.tar")
    with pytest.raises(DataError, match="CRC-32"):
        take(copy, 20, max_bad=lost // 8)
    (copy / "train-000001.tar").unlink()
    with pytest.raises(DataError, match="No such file"):
        take(copy, 20)


def edit(change: Callable[[dict[str, object]], object]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        raw = json.loads((path / "manifest.json").read_text())
        change(raw)
        (path / "manifest.json").write_text(json.dumps(raw))

    return apply


@pytest.mark.parametrize(
    ("harm", "fields", "match"),
    [
        (shutil.rmtree, {}, "does not exist.*pretrain data encode"),
        (lambda p: (p / "manifest.json").unlink(), {}, "no manifest.json.*pretrain data encode"),
        (lambda p: (p / "manifest.json").write_text("{"), {}, "not readable as JSON"),
        (edit(lambda raw: raw.update(format=9)), {}, "format 9, this program reads format 1"),
        (edit(lambda raw: raw.pop("codec")), {}, "damaged: codec"),
        (edit(lambda raw: raw["splits"]["train"]["shards"][0].update(name="../x")), {}, "plain"),
        (square, {"split": "val"}, r"split 'val'.*\['train'\]"),
        (square, {"codec": "kl"}, "codec haar1.*data.codec=kl"),
        (square, {"model": (7, 4, 3)}, "2 channels, the model takes 4"),
        (square, {"model": (7, 2, 8)}, "3x3, the model takes 8x8"),
        (square, {"model": (5, 2, 3)}, r"label 5, the model knows 0\.\.4"),
        (lambda p: (p / "train.index.npy").unlink(), {"square": True}, "index .* cannot be read"),
        (lambda p: np.save(p / "train.index.npy", np.zeros(3)), {"square": True}, "promises 150"),
    ],
)
def test_check_refuses_with_one_clear_message(
    copy: Path, harm: Callable[[Path], object], fields: dict[str, object], match: str
) -> None:
    if fields.pop("square", False):
        square(copy)
    harm(copy)
    num_classes, channels, size = fields.pop("model", (7, 2, 3))
    cfg = LoaderConfig.model_validate({"path": str(copy), "global_batch": 24, **fields})
    with pytest.raises(DataError, match=f"(?s){match}"):
        check(cfg, num_classes=num_classes, channels=channels, input_size=size)


def test_a_batch_that_ranks_cannot_share_is_refused(copy: Path) -> None:
    with pytest.raises(DataError, match="global_batch=24 .* by 5 data ranks"):
        take(copy, 1, size=5)


def test_digits_end_to_end(tmp_path: Path) -> None:
    encode("digits", tmp_path / "d", limit=100, lanes=16)
    cfg = LoaderConfig(path=str(tmp_path / "d"), global_batch=50, codec="haar")
    manifest = check(cfg, num_classes=10, channels=4, input_size=16)
    with Loader(cfg, 0, 1, seed=0) as loader:
        x = torch.cat([batch.x for batch, _ in islice(loader.start(Cursor()), 2)])
    assert manifest == loader.info
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(4), atol=1e-4, rtol=0)
    # One scale for all bands: their mean variance is 1.
    torch.testing.assert_close(x.var((0, 2, 3)).mean(), torch.tensor(1.0), atol=1e-2, rtol=0)
