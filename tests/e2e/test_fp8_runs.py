"""Training in emulated FP8: resumed bit for bit, at any layout, from and to bf16, or refused."""

import json
from pathlib import Path

import pytest
import torch

from parallel import storage
from parallel.fp8 import backends
from parallel.fp8.recipes import FP8Config
from pretrain import config, inspection, preflight
from pretrain.manifest import locate
from tests import ranks, tiny

FP8 = {"precision": "fp8", "model__zero_init_std": 0.05, "fp8__guard_every": 2}


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def digests(run: Path) -> dict[str, object]:
    return inspection.contents(run, digest=True)["tensors"]


@pytest.mark.parametrize(
    ("model", "recipe", "world"),
    [
        ("dit-moe", "delayed", 2),
        pytest.param("udit-moe", "delayed", 1, marks=pytest.mark.slow),
        pytest.param("udit-moe", "block", 1, marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_ends_as_the_undisturbed_one(
    model: str, recipe: str, world: int, digits: Path, tmp_path: Path
) -> None:
    changes = FP8 | {"fp8__recipe": recipe, "fp8__history": 2, "fp8__keep_first": 0}
    cfg = tiny.write(tmp_path, model, digits, **changes)
    calm, hurt = tmp_path / "calm", tmp_path / "hurt"
    ranks.train(cfg, calm, "steps=4", world=world)
    ranks.train(cfg, hurt, "steps=2", world=world)
    ranks.train(cfg, hurt, "steps=4", world=world)
    assert losses(hurt) == losses(calm)
    assert digests(hurt) == digests(calm)
    histories = [name for name in digests(calm) if name.startswith("fp8.")]
    assert bool(histories) == (recipe == "delayed")


@pytest.mark.slow
def test_a_checkpoint_loads_at_any_layout_and_with_or_without_fp8(
    digits: Path, tmp_path: Path
) -> None:
    cfg = tiny.write(tmp_path, "udit-moe", digits, **FP8)
    run = tmp_path / "run"
    ranks.train(cfg, run, "steps=2")
    name = "fp8.latent.blocks.0.first.attn.core.v.history"
    first = storage.read_alone([name], locate(run))[name]
    ranks.train(cfg, run, "steps=3", "mesh.tp=2", world=2)
    ranks.train(cfg, run, "steps=4", "mesh.ep=2", world=2)
    moved = storage.read_alone([name], locate(run))[name]
    assert torch.equal(moved[:, 2:4], first[:, :2])
    assert (moved[:, :2] > 0).all()
    ranks.train(cfg, run, "steps=5", "precision=bf16")
    assert not [n for n in storage.contents(locate(run)) if n.startswith("fp8.")]
    ranks.train(cfg, run, "steps=6")
    fresh = storage.read_alone([name], locate(run))[name]
    assert (fresh[:, 0] > 0).all()
    assert not fresh[:, 1:].any()
    assert all(torch.isfinite(torch.tensor(losses(run))))
    assert len(losses(run)) == 6


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        ("dit", "mesh.tp=2"),
        pytest.param("udit-moe", "mesh.tp=2", marks=pytest.mark.slow),
        pytest.param("udit-moe", "mesh.ep=2", marks=pytest.mark.slow),
        pytest.param("udit-moe", "mesh.dp_shard=2", marks=pytest.mark.slow),
    ],
)
def test_delayed_scales_and_losses_are_those_of_one_process(
    model: str, layout: str, digits: Path, tmp_path: Path
) -> None:
    cfg = tiny.write(tmp_path, model, digits, **FP8, steps=4, fp8__keep_first=0)
    alone, cut = tmp_path / "alone", tmp_path / "cut"
    ranks.train(cfg, alone)
    ranks.train(cfg, cut, layout, world=2)
    for one, other in zip(losses(alone), losses(cut), strict=True):
        assert one == pytest.approx(other, rel=1e-3)  # of bf16, whose partial sums are rounded
    names = [n for n in storage.contents(locate(alone)) if n.startswith("fp8.")]
    ours, theirs = (storage.read_alone(names, locate(run)) for run in (alone, cut))
    for name in names:
        # why: a phase of the 2×2 stage is one token, so its q and k get rounding as gradients
        real = 2 if "latent" in name and name.split(".")[-2] in ("q", "k") else 3
        assert torch.equal(ours[name][:real, 0] > 0, theirs[name][:real, 0] > 0), name
        # the largest magnitudes of weights are those of the whole tensor, of all ranks' rows
        torch.testing.assert_close(ours[name][1, :4], theirs[name][1, :4], rtol=0.01, atol=0)
        torch.testing.assert_close(ours[name][0, :4], theirs[name][0, :4], rtol=0.1, atol=0)


REFUSED = [
    (["engine=zero2"], "precision=fp8 with engine=zero2: DeepSpeed gathers fp32 weights"),
    (["fp8.keep_first=3", "fp8.keep_last=2"], r"= 3 \+ 2 leaves none of the model's 5 blocks"),
    (["fp8.backend=torch"], "fp8.backend=torch needs a GPU of .* 9.0 or above, this is a CPU"),
    (["fp8.backend=transformer_engine"], "needs a GPU of compute capability 9.0 or above"),
]


@pytest.mark.parametrize(("overrides", "said"), REFUSED)
def test_what_cannot_run_in_fp8_is_refused_with_the_reason(
    overrides: list[str], said: str, digits: Path, tmp_path: Path
) -> None:
    cfg = config.load(tiny.write(tmp_path, "udit-moe", digits, **FP8), overrides)
    with pytest.raises(preflight.LayoutError, match=said):
        preflight.check_fp8(cfg)


def test_fp8_attention_on_hopper_wants_heads_of_128(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg, hopper, blackwell = FP8Config(attention=True), (9, 0), (10, 0)
    monkeypatch.setattr(backends, "installed", lambda: True)
    dims = {"enc1": 128, "latent": 64}
    said = r"64 channels a head \(latent\): on Hopper .* exactly 128 .* set model.head_dim=128"
    with pytest.raises(preflight.LayoutError, match=said):
        backends.check_attention(cfg, hopper, dims)
    backends.check_attention(cfg, hopper, {"enc1": 128})
    backends.check_attention(cfg, blackwell, dims)
    backends.check_attention(FP8Config(), hopper, dims)
    backends.check_attention(cfg, None, dims)  # an emulation
    monkeypatch.setattr(backends, "installed", lambda: False)
    with pytest.raises(preflight.LayoutError, match="needs Transformer Engine: torch has no FP8"):
        backends.check_attention(cfg, hopper, dims)


def test_the_backend_is_the_best_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    for there, best in ((True, "transformer_engine"), (False, "torch")):
        monkeypatch.setattr(backends, "installed", lambda there=there: there)
        assert backends.backend_for(FP8Config(), (9, 0)) == best
        assert backends.backend_for(FP8Config(), (8, 0)) == "emulated"
        assert backends.backend_for(FP8Config(), None) == "emulated"
    with pytest.raises(preflight.LayoutError, match="not installed; pip install .*or set fp8.back"):
        backends.backend_for(FP8Config(backend="transformer_engine"), (9, 0))
    with pytest.raises(preflight.LayoutError, match=r"this is a GPU of 8.9; set fp8.backend=auto"):
        backends.backend_for(FP8Config(backend="torch"), (8, 9))
