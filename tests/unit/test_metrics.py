"""Where numbers go: what metrics.jsonl holds, what a resume leaves of it, what the console says."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from pretrain import metrics
from pretrain.metrics import Log, LogConfig, LogError, moe_load

QUIET = LogConfig(wandb="disabled")


@pytest.fixture(autouse=True)
def _no_wandb_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def write(folder: Path, steps: range, tail: str = "") -> None:
    text = "".join(json.dumps({"step": step, "loss": 1 / step}) + "\n" for step in steps)
    (folder / "metrics.jsonl").write_text(text + tail)


def test_record_keeps_every_bit_and_is_on_disk_at_once(tmp_path: Path) -> None:
    with Log(QUIET, tmp_path, rank=0, steps=10) as log:
        log.train(1, {"loss": torch.tensor(1 / 3), "lr": 0.1 + 0.2, "n": np.int64(2**53)})
        log.train(2, {"by_time": torch.tensor([0.5, math.inf]), "inner": {"a": (1.0, math.nan)}})
        found = lines(tmp_path)
    assert list(found[0]) == ["step", "loss", "lr", "n"]
    assert found[0]["loss"] == float(torch.tensor(1 / 3))
    assert (found[0]["lr"], found[0]["n"]) == (0.1 + 0.2, 2**53)
    assert found[1] == {"step": 2, "by_time": [0.5, None], "inner": {"a": [1.0, None]}}


def test_not_finite_is_null_in_the_file_and_said_on_the_console(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Log(QUIET, tmp_path, rank=0, steps=10) as log:
        log.train(3, {"loss": math.nan, "grad_norm": torch.tensor(math.inf), "mfu": None})
    assert lines(tmp_path) == [{"step": 3, "loss": None, "grad_norm": None, "mfu": None}]
    assert capsys.readouterr().out == "step 3/10  loss not finite  grad_norm not finite\n"


def test_plain_lines_without_a_terminal_and_a_copy_in_log_txt(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Log(QUIET, tmp_path, rank=0, steps=40) as log:
        log.say("a sentence [not markup]")
        log.tick(7)
        log.train(8, {"loss": 0.25, "lr": 1e-4, "skipped": torch.tensor(2.0), "other": 1})
    said = ["a sentence [not markup]", "step 8/40  loss 0.2500  lr 1.00e-04  skipped 2"]
    assert capsys.readouterr().out.splitlines() == said
    copied = (tmp_path / "log.txt").read_text().splitlines()
    assert [line[21:] for line in copied] == [said[0], said[1].replace("/40", "")]


def test_terminal_gets_one_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    with Log(QUIET, tmp_path, rank=0, steps=40, start=4) as log:
        bar = log._sinks[-1]
        assert isinstance(bar, metrics._Bar)
        log.tick(5)
        log.say("above the bar")
        log.train(6, {"loss": 0.5})
        (task,) = bar._progress.tasks
        assert (task.completed, task.total, task.fields["last"]) == (6, 40, "loss 0.5000")
    assert not bar._progress.live.is_started


def test_other_ranks_touch_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, range(1, 5))
    with Log(LogConfig(wandb="online"), tmp_path, rank=1, steps=10, start=2) as log:
        log.train(3, {"loss": 1.0})
        log.say("nobody hears")
        log.tick(3)
        log.picture(3, "samples", tmp_path / "none.png")
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert len(lines(tmp_path)) == 4
    assert capsys.readouterr().out == ""


def test_resume_cuts_back_to_the_restored_step(tmp_path: Path) -> None:
    write(tmp_path, range(1, 9), tail='{"step": 9, "lo')
    with Log(QUIET, tmp_path, rank=0, steps=10, start=6) as log:
        log.train(7, {"loss": 7.0})
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5, 6, 7]


def test_rewinding_takes_back_later_records_and_goes_on(tmp_path: Path) -> None:
    with Log(QUIET, tmp_path, rank=0, steps=10) as log:
        for step in (1, 2, 3, 4):
            log.train(step, {"loss": float(step)})
        log.rewind(2)
        log.train(3, {"loss": -3.0})
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [(1, 1), (2, 2), (3, -3)]


def test_load_of_even_and_of_collapsed_experts() -> None:
    even = torch.full((1, 2, 4), 5.0)
    assert moe_load(even) == {
        "moe.load_max": 1.0,
        "moe.load_entropy": pytest.approx(1.0),
        "moe.dead": 0,
        "moe.load_max_by_time": [1.0, 1.0],
        "moe.load_entropy_by_time": [pytest.approx(1.0)] * 2,
        "moe.layers": [
            {
                "load_max": 1.0,
                "load_entropy": pytest.approx(1.0),
                "dead": 0,
                "load_max_by_time": [1.0, 1.0],
                "load_entropy_by_time": [pytest.approx(1.0)] * 2,
            }
        ],
    }
    one = torch.zeros(1, 1, 4)
    one[..., 2] = 9.0
    found = moe_load(one)
    assert (found["moe.load_max"], found["moe.load_entropy"], found["moe.dead"]) == (4.0, 0.0, 3)


def test_load_is_told_per_layer_and_timestep_bin_and_summed_up_as_the_worst() -> None:
    counts = torch.tensor([[[4, 4], [0, 0], [6, 2]], [[8, 0], [0, 0], [8, 0]]])
    found = moe_load(counts)
    first, second = found["moe.layers"]
    assert first["load_max_by_time"] == [1.0, None, 1.5]
    assert first["load_max"] == pytest.approx(10 / 8)
    assert second["load_entropy_by_time"] == [0.0, None, 0.0]
    assert (first["dead"], second["dead"]) == (0, 1)
    assert found["moe.load_max"] == 2.0
    assert found["moe.load_entropy"] == 0.0
    assert found["moe.dead"] == 1
    assert found["moe.load_max_by_time"] == [2.0, None, 2.0]
    assert json.loads(json.dumps(found)) == found


def test_load_hides_nothing_when_bins_cancel_out() -> None:
    found = moe_load(torch.tensor([[[8.0, 0.0], [0.0, 8.0]]]))
    assert found["moe.load_max"] == 1.0
    assert found["moe.load_max_by_time"] == [2.0, 2.0]


def test_wandb_offline_writes_into_the_run_directory_and_keeps_its_id(tmp_path: Path) -> None:
    wandb = pytest.importorskip("wandb")
    values = {"loss": 0.5, "moe.layers": [{"dead": 0}], "mfu": None}
    for start in (0, 1):
        with Log(LogConfig(), tmp_path, rank=0, steps=3, start=start, settings={"lr": 1}) as log:
            log.train(start + 1, values)
    wandb.teardown()
    name = (tmp_path / "wandb" / "run_id").read_text()
    runs = list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert runs
    assert {path.stem for path in runs} == {f"run-{name}"}
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]


def test_wandb_variable_goes_before_the_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    with Log(LogConfig(wandb="online"), tmp_path, rank=0, steps=1):
        pass
    assert not (tmp_path / "wandb").exists()
    monkeypatch.setenv("WANDB_MODE", "sometimes")
    with pytest.raises(LogError, match="WANDB_MODE=sometimes came; expected offline"):
        Log(QUIET, tmp_path, rank=0, steps=1)


def test_missing_wandb_is_said_before_anything_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, range(1, 4))
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(LogError, match="log.wandb=offline came.*pip install wandb.*disabled"):
        Log(LogConfig(), tmp_path, rank=0, steps=1)
    assert len(lines(tmp_path)) == 3


def test_config_refuses_what_it_does_not_know() -> None:
    with pytest.raises(ValidationError, match="offline"):
        LogConfig(wandb="sometimes")  # pyrefly: ignore
    with pytest.raises(ValidationError, match="wandb_projekt"):
        LogConfig.model_validate({"wandb_projekt": "x"})
