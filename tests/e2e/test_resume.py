"""A run that is killed and started again is the run that never stopped, bit for bit."""

import json
import random
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

from parallel import storage
from pretrain import inspection, manifest
from tests import ranks, tiny

QUICK = [("udit-moe", 2, "fp32"), ("dit", 1, "bf16"), ("dit-moe+mup", 1, "fp32")]
ALL = [
    (model, world, precision)
    for model in ("dit", "udit", "udit-moe", "dit-moe+mup")
    for world in (1, 2)
    for precision in ("fp32", "bf16")
]
CASES = [
    pytest.param(
        *case, marks=() if case in QUICK else pytest.mark.slow, id="-".join(map(str, case))
    )
    for case in ALL
]


def history(run: Path) -> list[tuple[int, float, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines]


@pytest.mark.parametrize(("model", "world", "precision"), CASES)
def test_a_killed_run_ends_as_the_undisturbed_one(
    model: str, world: int, precision: str, digits: Path, tmp_path: Path
) -> None:
    config = tiny.write(tmp_path, model, digits, precision=precision, checkpoint__every=2, steps=9)
    calm, hurt = tmp_path / "calm", tmp_path / "hurt"
    ranks.train(config, calm, world=world)
    kills = random.Random(f"{model}{world}{precision}")
    for _ in range(2):
        seen = len(history(hurt)) if (hurt / "metrics.jsonl").exists() else 0
        hurt.mkdir(exist_ok=True)
        words = ("train", str(config), f"run_dir={hurt}")
        started = ranks.start(ranks.pretrain, world, *words, log=hurt / "ranks.log")
        goal = seen + kills.randint(3, 4)
        _until_lines(hurt, goal, started)
        for process in started:
            process.kill()
        ranks.wait(started)
    ranks.train(config, hurt, world=world)
    assert [step for step, *_ in history(hurt)] == list(range(1, 10))
    assert history(hurt) == history(calm)
    assert (
        inspection.contents(hurt, digest=True)["tensors"]
        == inspection.contents(calm, digest=True)["tensors"]
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_compiled_bf16_run_of_experts_resumes_bit_for_bit_on_a_gpu(
    digits: Path, tmp_path: Path
) -> None:
    changes = {"precision": "bf16", "compile": True, "deterministic": True, "steps": 20}
    config = tiny.write(tmp_path, "dit-moe", digits, **changes)
    calm, hurt = tmp_path / "calm", tmp_path / "hurt"
    ranks.train(config, calm)
    hurt.mkdir()
    words = ("train", str(config), f"run_dir={hurt}")
    started = ranks.start(ranks.pretrain, 1, *words, log=hurt / "ranks.log")
    _until_lines(hurt, 13, started)
    started[0].kill()
    ranks.wait(started)
    ranks.train(config, hurt)
    assert history(hurt) == history(calm)
    one, other = (inspection.contents(run, digest=True)["tensors"] for run in (hurt, calm))
    assert one == other


def _until_lines(run: Path, goal: int, started: list[BaseProcess]) -> None:
    """Waits until metrics.jsonl has so many lines or a rank has ended."""
    while all(process.is_alive() for process in started) and _lines(run) < goal:
        time.sleep(0.005)


def _lines(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def test_a_stop_file_saves_and_the_same_command_goes_on(digits: Path, tmp_path: Path) -> None:
    config = tiny.write(tmp_path, "dit", digits, steps=24)
    calm, stopped = tmp_path / "calm", tmp_path / "stopped"
    ranks.train(config, calm, world=2)
    stopped.mkdir()
    words = ("train", str(config), f"run_dir={stopped}")
    started = ranks.start(ranks.pretrain, 2, *words, log=stopped / "ranks.log")
    _until_lines(stopped, 5, started)
    (stopped / "stop").touch()
    assert ranks.wait(started) == [0, 0]
    assert not (stopped / "done").exists()
    assert not (stopped / "stop").exists()
    reached = int((stopped / "latest").read_text())
    assert 5 <= reached < 24
    ranks.train(config, stopped, world=2)
    assert history(stopped) == history(calm)
    assert (stopped / "done").read_text() == "24\n"


def test_a_half_written_newest_checkpoint_is_passed_over(digits: Path, tmp_path: Path) -> None:
    config = tiny.write(tmp_path, "dit", digits, steps=20)
    calm, hurt = tmp_path / "calm", tmp_path / "hurt"
    ranks.train(config, calm)
    ranks.train(config, hurt)
    newest = hurt / "checkpoints" / "step_00000020"
    data = next(newest.glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:-100])
    (hurt / "done").unlink()
    ranks.train(config, hurt)
    said = (hurt / "ranks.log").read_text()
    assert "step_00000020" in said
    assert "the one before it is used" in said
    assert history(hurt) == history(calm)


def test_a_flipped_bit_in_the_newest_checkpoint_is_found(digits: Path, tmp_path: Path) -> None:
    config = tiny.write(tmp_path, "dit", digits, steps=20)
    run = tmp_path / "run"
    ranks.train(config, run)
    data = next((run / "checkpoints" / "step_00000020").glob("*.distcp"))
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    ranks.train(config, run, "steps=21")
    assert "does not match its checksum" in (run / "ranks.log").read_text()
    assert [step for step, *_ in history(run)] == list(range(1, 22))


def test_a_run_goes_on_on_other_layouts_and_engines(digits: Path, tmp_path: Path) -> None:
    """Also with replicas whose shards are odd, and pieces that are empty on the first rank."""
    changes = {"model__zero_init_std": 0.05, "optim__lr": 1e-3, "data__global_batch": 12}
    config = tiny.write(tmp_path, "dit-moe", digits, steps=10, **changes)
    calm, moved = tmp_path / "calm", tmp_path / "moved"
    ranks.train(config, calm)
    for steps, world, words in (
        (2, 3, ("mesh.dp_replicate=3",)),
        (4, 2, ("engine=zero2", "mesh.ep=2")),
        (6, 4, ("mesh.tp=2", "mesh.ep=2", "model.moe.dispatcher=static")),
        (8, 2, ("engine=zero3",)),
        (10, 2, ()),
    ):
        ranks.train(config, moved, f"steps={steps}", *words, world=world)
        counted = storage.read_alone(["optim.updates"], manifest.locate(moved))
        assert counted["optim.updates"] == steps
    for (_, loss, norm), (_, calm_loss, calm_norm) in zip(
        history(moved), history(calm), strict=True
    ):
        assert loss == pytest.approx(calm_loss, rel=2e-6)
        assert norm == pytest.approx(calm_norm, rel=1e-5)
