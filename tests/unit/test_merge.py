"""Merging is the arithmetic it says, and gives a checkpoint like any other."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from parallel import storage
from pretrain import averaging, cli, config
from pretrain.layouts.official import shapes_of
from pretrain.layouts.rules import WeightsError
from pretrain.manifest import CheckpointError, read_manifest
from pretrain.merge import merge
from pretrain.trained import Trained
from tests import stored, tiny


def made(folder: Path, model: str = "udit-moe", **changes: Any) -> config.Config:
    return config.load(tiny.write(folder, model, folder, **changes), [])


def everything(folder: Path) -> dict[str, torch.Tensor]:
    return storage.read_alone(list(storage.contents(folder)), folder)


def test_a_mean_is_weighted_and_keeps_the_newest_buffers(tmp_path: Path) -> None:
    cfg = made(tmp_path)
    bias = "latent.blocks.0.first.ffn.router.bias"
    other = {f"model.{bias}": torch.full((4,), 0.5)}
    one = stored.write(tmp_path / "a", cfg, step=3, **other)
    two = stored.write(tmp_path / "b", cfg, step=2)
    said = merge([one, two], tmp_path / "out", by="1,3")
    assert "+0.250000 x ema of" in said[1]
    assert "+0.750000 x ema of" in said[2]
    first, second = stored.values(cfg, 300), stored.values(cfg, 200)
    found = everything(tmp_path / "out")
    _, trained = shapes_of(cfg.model)
    for name in trained:
        want = 0.25 * first[name].double() + 0.75 * second[name].double()
        torch.testing.assert_close(found[f"model.{name}"], want.float(), atol=1e-7, rtol=1e-6)
        assert torch.equal(found[f"model.{name}"], found[f"ema.{name}"])
    assert torch.equal(found[f"model.{bias}"], torch.full((4,), 0.5))
    assert read_manifest(tmp_path / "out")["state"]["step"] == 3
    assert not any(name.startswith("optim") for name in found)
    assert Trained.load(tmp_path / "out").step == 3


def test_a_run_means_all_its_checkpoints_and_the_default_is_the_plain_mean(tmp_path: Path) -> None:
    cfg = made(tmp_path, "dit")
    steps = (1, 2, 10)
    for step in steps:
        stored.write(tmp_path / "run", cfg, step=step)
    merge([tmp_path / "run"], tmp_path / "out", weights="model")
    full = [stored.values(cfg, step)["head.linear.weight"].double() for step in steps]
    found = everything(tmp_path / "out")["ema.head.linear.weight"]
    torch.testing.assert_close(found, (sum(full) / 3).float(), atol=1e-7, rtol=1e-6)


def test_a_length_is_rebuilt_from_all_snapshots(tmp_path: Path) -> None:
    cfg = made(tmp_path, "dit")
    names = ("ema", "ema_p0.05", "ema_p0.1")
    for step in (10, 20, 40):
        stored.write(tmp_path / "run", cfg, step=step, updates=step - 1, averages=names)
    said = merge([tmp_path / "run"], tmp_path / "out", std=0.07)
    snapshots = [(t, sigma) for t in (9, 19, 39) for sigma in (0.05, 0.1)]
    factors = averaging.coefficients(snapshots, (39, 0.07))
    assert len(said) == 1 + len(factors)
    name = "blocks.1.ffn.fc1.weight"
    seeds = [100 * step + i for step in (10, 20, 40) for i in (1, 2)]
    full = [stored.values(cfg, seed)[name].double() for seed in seeds]
    want = sum(f * part for f, part in zip(factors, full, strict=True))
    found = everything(tmp_path / "out")[f"model.{name}"].double()
    assert np.abs((found - want).numpy()).max() < 1e-6
    bare = tmp_path / "bare"
    _without(tmp_path / "run" / "checkpoints" / "step_00000040", bare, "optim.")
    with pytest.raises(WeightsError, match="was merged"):
        merge([bare], tmp_path / "again", std=0.07)


def _without(source: Path, target: Path, start: str) -> None:
    from pretrain.manifest import write_alone

    manifest = read_manifest(source)
    facts = {key: manifest[key] for key in ("model", "objective", "data", "latents", "config")}
    left = {name: t for name, t in everything(source).items() if not name.startswith(start)}
    write_alone(target, left.items(), manifest["state"], facts)


def test_a_merge_refuses_what_it_cannot_add_up(tmp_path: Path) -> None:
    one = stored.write(tmp_path / "a", made(tmp_path / "a", "dit"), step=1)
    two = stored.write(tmp_path / "b", made(tmp_path / "b", "dit", model__depth=3), step=2)
    three = stored.write(tmp_path / "c", made(tmp_path / "c", "dit"), step=3, averages=())
    out = tmp_path / "out"
    with pytest.raises(WeightsError, match=r"another model than .*model.depth=3"):
        merge([one, two], out)
    with pytest.raises(WeightsError, match="2 factors for 1 checkpoints"):
        merge([one], out, by="1,2")
    with pytest.raises(WeightsError, match="sum to 0"):
        merge([one, one], out, by="1,-1")
    with pytest.raises(WeightsError, match="write factors as 1,2,3"):
        merge([one], out, by="half")
    with pytest.raises(WeightsError, match=r"holds model \(here .*c/checkpoints/step_00000003"):
        merge([one, three], out)
    with pytest.raises(WeightsError, match="none of the checkpoints holds one"):
        merge([one], out, std=0.1)
    with pytest.raises(WeightsError, match="leave out --weights, --by"):
        merge([one], out, std=0.1, weights="model")
    with pytest.raises(WeightsError, match="holds no checkpoint"):
        merge([tmp_path / "none"], out)
    assert not out.exists()
    with pytest.raises(CheckpointError, match="exists"):
        merge([one], one)


def test_two_checkpoints_are_compared_like_diff(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = made(tmp_path, "dit")
    same = stored.write(tmp_path / "a", cfg)
    again = stored.write(tmp_path / "b", cfg)
    weight, label = "model.head.linear.weight", "model.condition.label.weight"
    values = stored.values(cfg, 1)
    moved, wide = values["head.linear.weight"].clone(), torch.zeros(3)
    moved[0, 0] += 0.25
    spoilt = values["condition.label.weight"].clone()
    spoilt[0] = float("nan")
    changes = {weight: moved, label: spoilt, "model.embed.bias": wide, "extra.x": wide}
    other = stored.write(tmp_path / "c", cfg, averages=("ema", "ema_h10"), **changes)

    def run(*words: object) -> tuple[int, dict[str, Any]]:
        monkeypatch.setattr("sys.argv", ["pretrain", "inspect", *map(str, words), "--json"])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        text = capsys.readouterr().out
        assert isinstance(ended.value.code, int)
        return ended.value.code, json.loads(text) if text else {}

    code, report = run(same, again, "--diff")
    assert (code, report["same"], report["other values"]) == (0, True, [])
    code, report = run("--diff", same, other)
    assert (code, report["same"], report["only in the first"]) == (1, False, [])
    assert "extra.x" in report["only in the second"]
    assert "ema_h10.embed.weight" in report["only in the second"]
    (row,) = report["other shape"]
    assert row == {"tensor": "model.embed.bias", "first": "float32 [32]", "second": "float32 [3]"}
    rows = {row["tensor"]: row for row in report["other values"]}
    assert rows.keys() == {weight, label}
    assert rows[weight]["absolute"] == pytest.approx(0.25)
    old, new = values["head.linear.weight"][0, 0].item(), moved[0, 0].item()
    assert rows[weight]["relative"] == pytest.approx(0.25 / max(abs(old), abs(new)))
    assert (rows[label]["absolute"], rows[label]["relative"]) == (None, None)
    assert run(same)[0] == 0
    assert run(same, other)[0] == 2
    assert run(same, "--diff")[0] == 2
    assert run(same, other, "--diff", "--digest")[0] == 2
    later = stored.write(tmp_path / "d", cfg, step=2)
    code, report = run(same, later, "--diff")
    assert (code, report["state"]) == (1, {"step": "1 | 2"})
