"""Weights in and out by the command line: nothing lost, nothing run, everything wrong named."""

import argparse
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from parallel import storage
from pretrain import cli, config, trained
from pretrain.holding import Holding
from pretrain.manifest import read_manifest
from pretrain.models.build import build
from pretrain.models.init import initialise
from pretrain.weights import groups, open_weights
from tests import published, ranks, stored, tiny

DIT = published.dit_keys(2, 32, 2, 4, 5)
FILES = {
    "dit": (DIT, "dit"),
    "dit-moe": (published.dit_keys(2, 32, 2, 4, 5, experts=3), "dit-moe"),
    "dit-moe, normed": (published.dit_keys(2, 32, 2, 4, 5, experts=3, norm=16), "dit-moe"),
    "udit": (published.udit_keys([1, 2, 1, 1, 1], 16, 2, 5), "udit"),
}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(*words: str | Path) -> int:
    """The exit code of `pretrain WORDS`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["pretrain", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
    code = ended.value.code
    assert isinstance(code, int)
    return code


def refusal(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    capsys.readouterr()
    assert run(*words) == 2
    return capsys.readouterr().err


def same_bytes(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert torch.equal(ours[key].view(torch.int32), tensor.view(torch.int32)), key


@pytest.mark.parametrize("case", FILES)
def test_a_published_file_goes_in_and_comes_out_byte_for_byte(case: str) -> None:
    keys, family = FILES[case]
    state = published.state(keys)
    if "pos_embed" in state:
        from pretrain.models.layers import position_table

        state["pos_embed"] = position_table(32, 4)[None]  # why: the last bit of a sine may differ
    save_file(state, "there.safetensors")
    given = ["model.num_heads=2"] if "norm" not in case and family != "udit" else []
    if family == "udit":
        given = ["model.input_size=16"]
    assert run("import", "there.safetensors", "--family", family, *given) == 0
    for weights in ("ema", "model"):
        words = ("--to", "safetensors", "--weights", weights, "--out", weights)
        assert run("export", "runs/there", *words) == 0
        same_bytes(load_file(f"{weights}/model.safetensors"), state)


def test_a_torch_file_is_read_without_its_code(capsys: pytest.CaptureFixture[str]) -> None:
    state = published.state(DIT)
    worse = {key: tensor + 1 for key, tensor in state.items()}
    whole = {"ema": state, "model": worse, "opt": {"state": {}}, "args": argparse.Namespace(lr=1)}
    torch.save(whole, "train.pt")
    assert open_weights(Path("train.pt")).under == "ema"
    words = ("--family", "dit", "model.num_heads=2")
    assert run("import", "train.pt", *words) == 0
    held = storage.read_alone(["model.embed.bias"], Path("runs/train/checkpoints/step_00000000"))
    assert torch.equal(held["model.embed.bias"], state["x_embedder.proj.bias"])
    pickle.loads(pickle.dumps(Trap()))
    Path("trapped").unlink()  # the trap works
    torch.save({"ema": state, "hook": Trap()}, "hostile.pt")
    Path("plain.pth").write_bytes(pickle.dumps(Trap()))
    Path("broken.safetensors").write_bytes(b"\xff" * 64)
    for file in ("hostile.pt", "plain.pth"):
        assert "without running code from it" in refusal(capsys, "import", file, *words)
        assert not Path("trapped").exists()
    assert "as safetensors" in refusal(capsys, "import", "broken.safetensors", *words)
    assert "does not exist" in refusal(capsys, "import", "none.pt", *words)
    torch.save([1, 2], "list.pt")
    assert "holds list, expected a state dict" in refusal(capsys, "import", "list.pt", *words)
    assert not Path("runs/hostile").exists()


class Trap:
    """Leaves a file behind when it is unpickled."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return Path.touch, (Path("trapped"),)  # type: ignore[return-value]


def test_an_import_refuses_what_it_cannot_know_or_does_not_fit(
    capsys: pytest.CaptureFixture[str], digits: Path, tmp_path: Path
) -> None:
    save_file(published.state(published.dit_keys(2, 100, 2, 4, 5)), "odd.safetensors")
    told = refusal(capsys, "import", "odd.safetensors", "--family", "dit")
    assert "give model.num_heads=…" in told
    for family in ("uvit", "skip-dit"):
        told = refusal(capsys, "import", "odd.safetensors", "--family", family)
        assert f"--family {family}: its model is not in this version" in told
    assert "is not known" in refusal(capsys, "import", "odd.safetensors", "--family", "vit")
    assert "y_embedder_1" in refusal(capsys, "import", "odd.safetensors", "--family", "udit")
    cfg = tiny.write(tmp_path, "dit", digits, model__width=100, model__num_heads=2)
    told = refusal(capsys, "import", "odd.safetensors", "--family", "dit", "--config", cfg)
    assert "of another shape: x_embedder.proj.weight: [100, 4, 2, 2], expected [100, 16" in told
    told = refusal(capsys, "import", "odd.safetensors", "--family", "udit", "--config", cfg)
    assert "--family udit, but" in told
    assert not Path("runs").exists()
    assert run("import", "odd.safetensors", "--family", "dit", "model.num_heads=2") == 0
    told = refusal(capsys, "import", "odd.safetensors", "--family", "dit", "model.num_heads=2")
    assert "holds checkpoints already" in told


def test_an_import_says_what_it_assumed(capsys: pytest.CaptureFixture[str]) -> None:
    save_file(published.state(published.dit_keys(2, 64, 2, 4, 5, experts=3)), "x.safetensors")
    assert run("import", "x.safetensors", "--family", "dit-moe", "--out", "a") == 0
    said = capsys.readouterr().out
    assert "assumed model.num_heads=1: 64 channels a head" in said
    assert "assumed model.moe.top_k=2: as published" in said
    assert "assumed objective.kind=ddpm: as published" in said
    assert "latents: of stabilityai/sd-vae-ft-ema (as published)" in said
    given = ("model.head_dim=32", "objective.kind=flow")
    assert run("import", "x.safetensors", "--family", "dit-moe", "--out", "b", *given) == 0
    said = capsys.readouterr().out
    assert "num_heads" not in said
    assert "objective" not in said
    manifest = read_manifest(Path("b/checkpoints/step_00000000"))
    assert manifest["data"] is None
    assert manifest["model"]["num_heads"] == 2
    assert manifest["latents"]["scale"] == [0.18215] * 4


def test_training_and_sampling_go_on_from_an_import(digits: Path, tmp_path: Path) -> None:
    changes = {"ema__half_lives": [10.0], "ema__power": [0.1], "steps": 2, "checkpoint__every": 1}
    path = tiny.write(tmp_path, "dit-moe", digits, **changes)
    cfg = config.load(path, [])
    folder = stored.write(tmp_path / "other", cfg)
    assert run("export", folder, "--to", "safetensors", "--out", "own", "--names", "own") == 0
    words = ("--family", "dit-moe", "--config", path, "--out", tmp_path / "run")
    assert run("import", "own", *words) == 0
    ranks.train(path, tmp_path / "run")
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    out = tmp_path / "sample.png"
    held = tmp_path / "run" / "checkpoints" / "step_00000002"
    words = ("--out", out, "--per-class", "1", "--steps", "2", "--labels", "0-1")
    for weights in ("ema", "model", "ema_h10", "ema_p0.1"):
        assert run("sample", held, *words, "--weights", weights) == 0
        assert out.is_file()
        out.unlink()


def test_every_average_is_named_that_could_be_meant(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    cfg = config.load(tiny.write(tmp_path, "dit", tmp_path), [])
    held = stored.write(tmp_path, cfg, averages=("ema", "ema_h1000", "ema_p0.05"))
    for words in (("sample", held), ("export", held, "--to", "safetensors")):
        told = refusal(capsys, *words, "--weights", "ema_p0.1")
        assert "holds ema, ema_h1000, ema_p0.05 and model (" in told
    full = stored.values(cfg, 101)
    model = trained.Trained.load(held, "ema_h1000").model
    assert torch.equal(model.get_parameter("embed.weight"), full["embed.weight"])


@pytest.mark.parametrize("family", ["dit", "udit-moe"])
def test_an_export_in_parts_is_the_export_in_one(family: str, tmp_path: Path) -> None:
    cfg = config.load(tiny.write(tmp_path, family, tmp_path), [])
    held = stored.write(tmp_path, cfg, step=7)
    assert run("export", held, "--to", "safetensors", "--out", "one") == 0
    words = ("--out", "parts", "--shard-gb", "0.0001")
    assert run("export", held, "--to", "safetensors", *words) == 0
    whole = load_file("one/model.safetensors")
    index = json.loads(Path("parts/model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == whole.keys()
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    together: dict[str, Tensor] = {}
    for file in files:
        part = load_file(f"parts/{file}")
        bytes_held = sum(t.numel() * 4 for t in part.values())
        assert bytes_held <= 100_000 or len(part) == 1
        together |= part
    same_bytes(together, whole)
    with safe_open("one/model.safetensors", framework="pt") as file:
        facts = file.metadata()
    names = "own" if family == "udit-moe" else "official"
    assert (facts["names"], facts["weights"], facts["step"]) == (names, "ema", "7")
    assert json.loads(facts["config"])["model"]["family"] == cfg.model.family
    if family == "udit-moe":
        other = stored.values(cfg, 700)
        live = stored.values(cfg, 7)
        buffers = [name for name in live if name.endswith("router.bias")]
        assert buffers
        for name in whole:
            assert torch.equal(whole[name], (live if name in buffers else other)[name]), name


def test_our_own_names_tell_the_configuration_and_go_back_in(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"model__in_channels": 4, "model__moe__top_k": 1, "objective__kind": "flow"}
    cfg = config.load(tiny.write(tmp_path, "udit-moe", tmp_path, **changes), [])
    held = stored.write(tmp_path, cfg)
    words = ("--out", "parts", "--shard-gb", "0.0001")
    assert run("export", held, "--to", "safetensors", *words) == 0
    assert "names are our own: no published udit has model.moe" in capsys.readouterr().out
    assert "is of family udit, not dit" in refusal(capsys, "import", "parts", "--family", "dit")
    assert run("import", "parts", "--family", "udit", "--out", "back") == 0
    manifest = read_manifest(Path("back/checkpoints/step_00000000"))
    assert config.validate(manifest["config"]).model == cfg.model
    assert manifest["objective"]["kind"] == "flow"
    assert run("export", "back", "--to", "safetensors", "--weights", "model", "--out", "two") == 0
    sizes = {
        key: open_weights(Path("parts")).read(key) for key in open_weights(Path("parts")).shapes
    }
    same_bytes(load_file("two/model.safetensors"), sizes)


def opened(place: Path) -> tuple[nn.Module, config.Config]:
    """The model with the average that a checkpoint holds, and its configuration."""
    held = Holding.of(place)
    model = build(held.model)
    initialise(model, 0)
    stored_as = held.at("ema")
    full = storage.read_alone(list(stored_as.values()), held.folder)
    model.load_state_dict({name: full[key] for name, key in stored_as.items()})
    return model.eval(), config.validate(held.manifest["config"])


@pytest.mark.parametrize("names", ["own", "official"])
def test_a_model_under_mup_comes_back_as_it_was(
    names: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tiny.write(tmp_path, "udit+mup", tmp_path, model__in_channels=4)
    cfg = config.load(path, [])
    held = stored.write(tmp_path, cfg)
    words = ("--to", "safetensors", "--names", names, "--out", "parts")
    assert run("export", held, *words) == 0
    back = ("import", "parts", "--family", "udit", "model.input_size=8")
    assert run(*back, "--out", "back") == 0
    again, settings = opened(Path("back"))
    assert (settings.model, settings.parametrisation) == (cfg.model, "mup")
    ours, theirs = again.state_dict(), opened(held)[0].state_dict()
    for key, tensor in theirs.items():
        torch.testing.assert_close(ours[key], tensor, rtol=1e-6, atol=0)
    plain = (*back, "--out", "plain", "parametrisation=standard")
    if names == "own":
        assert "made with model.mup={'base_width': 8" in refusal(capsys, *plain)
        return
    assert run(*plain) == 0
    other, settings = opened(Path("plain"))
    assert settings.model.mup is None
    inputs = (torch.randn(2, 4, 8, 8), torch.tensor([3.0, 900.0]), torch.tensor([1, 10]))
    with torch.no_grad():
        torch.testing.assert_close(other(*inputs), again(*inputs))


def test_an_export_refuses_what_cannot_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = config.load(tiny.write(tmp_path, "udit", tmp_path), [])
    held = stored.write(tmp_path, cfg)
    told = refusal(capsys, "export", held, "--to", "diffusers")
    assert "without model.family=udit" in told
    assert "use one of safetensors, diffusers" in refusal(capsys, "export", held, "--to", "onnx")
    words = ("export", held, "--to", "safetensors")
    assert "use one of fp32, bf16" in refusal(capsys, *words, "--dtype", "fp8")
    assert "give more than 0" in refusal(capsys, *words, "--shard-gb", "0")
    assert run(*words) == 0
    assert f"{held.name}-ema-safetensors exists" in refusal(capsys, *words)
    assert [p.name for p in (tmp_path / "export").iterdir()] == [f"{held.name}-ema-safetensors"]
    assert run(*words, "--dtype", "bf16", "--out", "half") == 0
    full = load_file(tmp_path / "export" / f"{held.name}-ema-safetensors" / "model.safetensors")
    half = load_file("half/model.safetensors")
    assert {t.dtype for t in half.values()} == {torch.bfloat16}
    assert all(torch.equal(half[key], full[key].bfloat16()) for key in full)
    (held / "manifest.json").write_text("{}")
    assert "is damaged" in refusal(capsys, "export", held, "--to", "safetensors", "--out", "late")


def test_no_more_is_read_at_a_time_than_is_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = config.load(tiny.write(tmp_path, "dit-moe", tmp_path), [])
    held = stored.write(tmp_path, cfg)
    largest = max(tensor.numel() * 4 for tensor in stored.values(cfg, 1).values())
    read, sizes = storage.read_alone, []

    def watched(names: list[str], folder: Path) -> dict[str, Tensor]:
        full = read(names, folder)
        sizes.append(sum(tensor.numel() * tensor.itemsize for tensor in full.values()))
        return full

    monkeypatch.setattr(storage, "read_alone", watched)
    monkeypatch.setattr("pretrain.weights.AT_ONCE", 2 * largest)
    commands: list[tuple[str | Path, ...]] = [
        ("export", held, "--to", "safetensors", "--out", "out"),
        ("merge", held, held, "--out", "merged"),
        ("inspect", held, "--digest"),
        ("inspect", held, "merged", "--diff"),
    ]
    for words in commands:
        sizes.clear()
        run(*words)
        assert len(sizes) > 3
        assert max(sizes) <= 2 * largest


def test_groups_keep_order_and_bound() -> None:
    sizes = {"a": 4, "b": 4, "c": 9, "d": 1, "e": 5}
    assert list(groups(sizes, 8)) == [["a", "b"], ["c"], ["d", "e"]]
    assert list(groups({}, 8)) == []
