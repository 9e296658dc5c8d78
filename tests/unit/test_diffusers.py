"""An exported DiT computes in diffusers what it computes here."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoModel, DiTTransformer2DModel
from diffusers.utils import dynamic_modules_utils
from torch import Tensor

from pretrain import config, export
from pretrain.layouts.rules import WeightsError
from pretrain.models.build import build
from pretrain.models.init import initialise
from tests import stored, tiny


@pytest.fixture(autouse=True)
def _no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))


def checkpoint(folder: Path, **changes: Any) -> tuple[config.Config, Path]:
    cfg = config.load(tiny.write(folder, "dit", folder, **changes), [])
    return cfg, stored.write(folder, cfg)


def inputs(cfg: config.Config) -> tuple[Tensor, Tensor, Tensor]:
    """Every time with every label in turn, the null label too."""
    draw = torch.Generator().manual_seed(0)
    model = cfg.model
    x = torch.randn(1000, model.in_channels, model.input_size, model.input_size, generator=draw)
    labels = torch.arange(1000) % (model.num_classes + 1)
    return x, torch.arange(1000), labels


def ours(cfg: config.Config) -> Tensor:
    model = build(cfg.model)
    initialise(model, 0)
    model.load_state_dict(stored.values(cfg, 100))  # the average of step 1
    with torch.no_grad():
        return model.eval()(*inputs(cfg))


def theirs(model: Any, cfg: config.Config) -> Tensor:
    x, t, labels = inputs(cfg)
    with torch.no_grad():
        return model(x, timestep=t, class_labels=labels).sample


def off(a: Tensor, b: Tensor) -> float:
    assert a.std() > 0.01
    return (a - b).abs().max().item()


@pytest.mark.parametrize("sigma", [False, True])
def test_with_diffusers_frequencies_the_plain_class_is_exact(tmp_path: Path, sigma: bool) -> None:
    cfg, held = checkpoint(tmp_path, model__sinusoid_shift=1, model__learn_sigma=sigma)
    said = export.export(held, "diffusers", out=tmp_path / "out")
    assert "DiTTransformer2DModel.from_pretrained" in said[0]
    assert not list((tmp_path / "out").glob("*.py"))
    model = DiTTransformer2DModel.from_pretrained(tmp_path / "out")
    assert model.config.norm_eps == 1e-6
    assert off(ours(cfg), theirs(model, cfg)) < 1e-5


def test_with_published_frequencies_the_class_that_goes_along_is_exact(tmp_path: Path) -> None:
    cfg, held = checkpoint(tmp_path)
    said = export.export(held, "diffusers", out=tmp_path / "out", shard_gb=1e-4)
    assert "AutoModel.from_pretrained(DIRECTORY, trust_remote_code=True)" in said[0]
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert "diffusion_pytorch_model.safetensors.index.json" in files
    assert json.loads((tmp_path / "out/config.json").read_text())["norm_eps"] == 1e-6
    model = AutoModel.from_pretrained(str(tmp_path / "out"), trust_remote_code=True)
    assert type(model).__name__ == "PublishedDiT"
    assert off(ours(cfg), theirs(model, cfg)) < 1e-5
    plain = DiTTransformer2DModel.from_pretrained(tmp_path / "out")
    assert off(ours(cfg), theirs(plain, cfg)) > 1e-3  # why the class goes along
    model.save_pretrained(tmp_path / "again")
    assert type(model).from_pretrained(tmp_path / "again").config.num_layers == cfg.model.depth


def test_under_mup_the_last_weight_holds_the_readouts_scale(tmp_path: Path) -> None:
    mup = {"base_width": 16, "output_mult": 3.0}
    changes = {"parametrisation": "mup", "model__mup": mup, "model__sinusoid_shift": 1}
    cfg, held = checkpoint(tmp_path, **changes)
    export.export(held, "diffusers", out=tmp_path / "out")
    model = DiTTransformer2DModel.from_pretrained(tmp_path / "out")
    assert off(ours(cfg), theirs(model, cfg)) < 1e-5


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model__qk_norm": True}, "model.qk_norm=true"),
        ({"model__mlp_ratio": 2.0}, "mlp_ratio=2"),
        (
            {"parametrisation": "mup", "model__mup": {"base_width": 16, "base_depth": 1}},
            "model.mup.base_depth",
        ),
    ],
)
def test_what_the_class_cannot_compute_is_refused(
    tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    _, held = checkpoint(tmp_path, **changes)
    with pytest.raises(WeightsError, match=named):
        export.export(held, "diffusers", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
