"""What fits a checkpoint, what is kept of them, and how a save that fails is met."""

import errno
import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pretrain import inspection
from pretrain.manifest import CheckpointConfig, expired, root, stored
from tests import ranks, tiny


def refused(config: Path, run: Path, *overrides: str) -> str:
    """What is said by a run that must end with 2 and change nothing."""
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    log = run.parent / "refused.log"
    log.unlink(missing_ok=True)
    words = ("train", str(config), f"run_dir={run}", *overrides)
    assert ranks.wait(ranks.start(ranks.pretrain, 1, *words, log=log)) == [2]
    after = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    assert before == after
    said = log.read_text()
    assert "Traceback" not in said
    assert said.count("pretrain: ") == 1
    return said


def positions(run: Path) -> list[int]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["samples"] for line in lines]


@pytest.fixture(scope="module")
def trained(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A configuration and its run of 4 steps of 8 samples."""
    place = tmp_path_factory.mktemp("trained")
    config = tiny.write(place, "dit", digits, steps=4)
    ranks.train(config, place / "run")
    return config, place / "run"


def copied(trained: tuple[Path, Path], place: Path) -> tuple[Path, Path]:
    config, run = trained
    shutil.copytree(run, place / "run", ignore=shutil.ignore_patterns("ranks.log"))
    return config, place / "run"


def test_another_global_batch_is_refused_unless_accepted(
    trained: tuple[Path, Path], tmp_path: Path
) -> None:
    config, run = copied(trained, tmp_path)
    said = refused(config, run, "data.global_batch=4")
    assert "data.global_batch=4 (checkpoint: 8)" in said
    assert "checkpoint.accept=[global_batch]" in said
    accepted = ("data.global_batch=4", "checkpoint.accept=[global_batch]")
    ranks.train(config, run, "steps=6", *accepted)
    assert positions(run) == [8, 16, 24, 32, 36, 40]
    said = (run / "ranks.log").read_text()
    assert "other global batch accepted: 4 instead of 8. The order goes on at position 32" in said


def test_another_data_set_is_refused_unless_accepted(
    trained: tuple[Path, Path], tmp_path: Path
) -> None:
    from data_pipeline.encode import encode

    config, run = copied(trained, tmp_path)
    encode("digits", tmp_path / "other", codec="haar2", seed=1)
    other = f"data.path={tmp_path / 'other'}"
    said = refused(config, run, other)
    assert "data.path (SHA-256 of its index)=" in said
    assert "checkpoint.accept=[data]" in said
    ranks.train(config, run, "steps=6", other, "checkpoint.accept=[data]")
    assert positions(run)[4:] == [8, 16]
    said = (run / "ranks.log").read_text()
    assert "The old order ends at position 32; the new one begins at position 0" in said


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("model.width=64", ("model.width=64 (checkpoint: 32)", "set another run_dir")),
        ("objective.law=logit_normal", ("objective.law=logit_normal (checkpoint: uniform)",)),
    ],
)
def test_another_model_or_objective_is_refused(
    change: str, words: tuple[str, ...], trained: tuple[Path, Path], tmp_path: Path
) -> None:
    config, run = copied(trained, tmp_path)
    said = refused(config, run, change)
    assert all(word in said for word in words), said


def test_an_average_cannot_begin_halfway(trained: tuple[Path, Path], tmp_path: Path) -> None:
    config, run = copied(trained, tmp_path)
    assert "holds no average ema_h10, " in refused(config, run, "ema.half_lives=[10]")


@pytest.mark.parametrize(("number", "which"), [(99, "newer"), (1, "older")])
def test_another_format_is_refused(
    number: int, which: str, trained: tuple[Path, Path], tmp_path: Path
) -> None:
    config, run = copied(trained, tmp_path)
    path = stored(run)[-1] / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": number}))
    said = refused(config, run)
    assert f"has format {number}" in said
    assert f"install the {which} version that wrote it" in said


@pytest.mark.parametrize(
    ("cfg", "gone"),
    [
        ({"keep": 2}, [5, 10, 15, 20, 25]),
        ({"keep": 2, "keep_every": 20}, [5, 10, 15, 25]),
        ({"keep": 1, "ephemeral": 5, "every": 10}, [5, 10, 15, 20, 25]),
        ({"keep": 9, "ephemeral": 5, "every": 10}, [5, 15, 25]),
        ({"keep": 9, "ephemeral": 5, "every": 15}, [5, 10, 20, 25]),
        ({"keep": 1, "ephemeral": 5, "every": 15, "keep_every": 10}, [5, 15, 25]),
    ],
)
def test_what_is_kept(cfg: dict[str, int], gone: list[int]) -> None:
    steps = [5, 10, 15, 20, 25, 30, 35]
    config = CheckpointConfig(**cfg)  # type: ignore[arg-type]
    assert [s for s in expired(config, steps) if s < 30] == gone
    assert 35 not in expired(config, steps)


def full_disk(failing: int, *words: str) -> None:
    """Trains; the n-th write of a checkpoint's tensors on rank 1 finds no room."""
    from parallel import saving

    honest, seen = saving.write_file, [0]

    def write(path: Path, whole: memoryview) -> object:
        seen[0] += 1
        if os.environ["RANK"] == "1" and seen[0] <= failing:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return honest(path, whole)

    saving.write_file = write  # type: ignore[assignment]
    ranks.pretrain(*words)


def test_a_save_that_fails_is_said_and_tried_again(digits: Path, tmp_path: Path) -> None:
    config = tiny.write(tmp_path, "dit", digits, steps=12, checkpoint__every=4)
    run = tmp_path / "run"
    run.mkdir()
    words = ("train", str(config), f"run_dir={run}")
    ranks.run(full_disk, 2, 1, *words, log=run / "ranks.log")
    said = (run / "ranks.log").read_text()
    assert "step 4 could not be saved: rank 1 cannot write to " in said
    assert "No space left on device" in said
    assert [folder.name for folder in sorted(root(run).iterdir())] == [
        "step_00000008",
        "step_00000012",
    ]


def test_two_failed_saves_in_a_row_end_the_run(digits: Path, tmp_path: Path) -> None:
    config = tiny.write(tmp_path, "dit", digits, steps=12, checkpoint__every=4)
    run = tmp_path / "run"
    run.mkdir()
    words = ("train", str(config), f"run_dir={run}")
    codes = ranks.wait(ranks.start(full_disk, 2, 9, *words, log=run / "ranks.log"))
    assert codes == [1, 1]
    assert "No space left on device" in (run / "ranks.log").read_text()
    assert not (run / "done").exists()
    assert list(root(run).iterdir()) == []
    ranks.train(config, run, world=2)
    calm = tmp_path / "calm"
    ranks.train(config, calm, world=2)
    digests = [inspection.contents(r, digest=True)["tensors"] for r in (run, calm)]
    assert digests[0] == digests[1]


def flip(path: Path) -> None:
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 1
    path.write_bytes(whole)


def test_the_one_before_a_damaged_one_must_fit_too(
    trained: tuple[Path, Path], tmp_path: Path
) -> None:
    config, run = copied(trained, tmp_path)
    smaller = "data.global_batch=4"
    ranks.train(config, run, "steps=6", smaller, "checkpoint.accept=[global_batch]")
    flip(next(stored(run)[-1].glob("*.distcp")))
    words = ("train", str(config), f"run_dir={run}", "steps=8", smaller)
    assert ranks.wait(ranks.start(ranks.pretrain, 2, *words, log=tmp_path / "log")) == [2, 2]
    said = (tmp_path / "log").read_text()
    assert "step_00000004 was made with other data settings: data.global_batch=4" in said
    assert [step.name for step in stored(run)] == ["step_00000004", "step_00000006"]


def unreadable(*words: str) -> None:
    """Trains; on rank 1 the disk does not give the checkpoint."""
    honest = os.preadv

    def preadv(fd: int, buffers: list[memoryview], offset: int) -> int:
        if os.environ["RANK"] == "1" and "checkpoints" in os.readlink(f"/proc/self/fd/{fd}"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return honest(fd, buffers, offset)

    os.preadv = preadv
    ranks.pretrain(*words)


def test_a_disk_that_cannot_be_read_ends_the_run_and_costs_nothing(
    trained: tuple[Path, Path], tmp_path: Path
) -> None:
    config, run = copied(trained, tmp_path)
    before = sorted(root(run).rglob("*"))
    words = ("train", str(config), f"run_dir={run}", "steps=6")
    assert ranks.wait(ranks.start(unreadable, 2, *words, log=tmp_path / "log")) == [1, 1]
    assert "cannot be read: [Errno 5]" in (tmp_path / "log").read_text()
    assert sorted(root(run).rglob("*")) == before


def untidy(*words: str) -> None:
    """Trains; old checkpoints cannot be removed."""
    from pretrain import checkpoint

    def rmtree(path: Path, ignore_errors: bool = False) -> None:
        if ignore_errors:
            return
        raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(path))

    checkpoint.shutil.rmtree = rmtree  # type: ignore[assignment]
    ranks.pretrain(*words)


def test_a_save_counts_though_old_ones_cannot_be_removed(digits: Path, tmp_path: Path) -> None:
    config = tiny.write(tmp_path, "dit", digits, steps=6, checkpoint__every=1, checkpoint__keep=1)
    run = tmp_path / "run"
    run.mkdir()
    words = ("train", str(config), f"run_dir={run}")
    ranks.run(untidy, 2, *words, log=run / "ranks.log")
    said = (run / "ranks.log").read_text()
    assert "step 5 is saved, but old ones are not tidied up" in said
    assert "could not be saved" not in said
    assert stored(run)[-1].name == "step_00000006"


def reads_counted(log: str, *words: str) -> None:
    """Trains; writes how many bytes of each checkpoint file this rank read."""
    honest, counts = os.preadv, dict[str, int]()

    def preadv(fd: int, buffers: list[memoryview], offset: int) -> int:
        got = honest(fd, buffers, offset)
        path = os.readlink(f"/proc/self/fd/{fd}")
        counts[path] = counts.get(path, 0) + got
        return got

    os.preadv = preadv
    try:
        ranks.pretrain(*words)
    finally:
        (Path(log) / os.environ["RANK"]).write_text(json.dumps(counts))


@pytest.mark.parametrize("words", [("mesh.dp_replicate=4",), ("mesh.tp=2",)])
def test_replicas_read_each_byte_of_a_checkpoint_once(
    words: tuple[str, ...], trained: tuple[Path, Path], tmp_path: Path
) -> None:
    config, run = copied(trained, tmp_path)
    step = stored(run)[-1]
    sizes = {str(p): p.stat().st_size for p in step.iterdir() if p.name != "manifest.json"}
    everything = ("train", str(config), f"run_dir={run}", "steps=5", *words)
    ranks.run(reads_counted, 4, str(tmp_path), *everything, log=tmp_path / "log")
    read = dict.fromkeys(sizes, 0)
    for rank in range(4):
        for path, count in json.loads((tmp_path / str(rank)).read_text()).items():
            if path in read:
                read[path] += count
    assert read == sizes


def signals_itself(pause: float, *words: str) -> None:
    """Trains; every rank sends itself two SIGTERMs at its fifth step, so many seconds apart."""
    from pretrain import run
    from pretrain.engine import Engine

    honest, seen = Engine.step, [0]
    clock: Callable[[], float] = time.monotonic
    run.time.monotonic = lambda: clock() + (pause if seen[0] > 5 else 0)  # type: ignore[assignment]

    def step(self: Engine, *args: object, **named: object) -> object:
        seen[0] += 1
        if seen[0] in (5, 6):
            os.kill(os.getpid(), signal.SIGTERM)
        return honest(self, *args, **named)  # type: ignore[arg-type]

    Engine.step = step  # type: ignore[assignment,method-assign]
    ranks.pretrain(*words)


@pytest.mark.parametrize(("pause", "code"), [(0.0, 0), (6.0, 1)])
def test_a_second_signal_counts_only_later(
    pause: float, code: int, digits: Path, tmp_path: Path
) -> None:
    config = tiny.write(tmp_path, "dit", digits)
    run = tmp_path / "run"
    run.mkdir()
    words = ("train", str(config), f"run_dir={run}")
    codes = ranks.wait(ranks.start(signals_itself, 2, pause, *words, log=run / "ranks.log"))
    assert codes == [code, code]
    assert not (run / "done").exists()
    assert bool(stored(run)) == (code == 0)


def test_a_damaged_newest_checkpoint_is_passed_over_and_said(
    trained: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, run = copied(trained, tmp_path)
    (run / "checkpoints" / "step_00000005").mkdir()
    assert inspection.contents(run, digest=False)["step"] == 4
    assert "step_00000005 has no manifest.json" in capsys.readouterr().err
