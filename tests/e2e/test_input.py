"""A mistake in the input ends with exit code 2 and one message, and leaves nothing half written.

Most of it happens before a rank exists, so the command line runs in the test's own process.
"""

import io
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.encode import encode
from parallel import launch
from pretrain import cli
from tests import ranks, tiny

Refuse = Callable[..., str]


def never(*_: object) -> None:
    raise AssertionError("the mistake was not found before the start")


def end_of(monkeypatch: pytest.MonkeyPatch, *words: object) -> object:
    """The exit code of the command line, run in this process."""
    monkeypatch.setattr(sys, "argv", ["pretrain", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return end.value.code


@pytest.fixture
def refuse(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refuse:
    """Gives the command line these words; what it says on stderr when it ends with 2."""
    monkeypatch.setattr("pretrain.train.train", never)
    monkeypatch.setattr(launch, "spawn", never)

    def run(*words: object) -> str:
        code, said = end_of(monkeypatch, *words), capsys.readouterr()
        assert (code, said.out) == (2, ""), said.err
        return said.err

    return run


def one_message(said: str, *parts: str) -> None:
    """It is one, for people, and has these parts (regular expressions) in this order."""
    assert said.startswith("pretrain: ")
    assert said.count("pretrain: ") == 1
    for noise in ("Traceback", "Error", "pydantic", "https://", "valid dictionary", "Input should"):
        assert noise not in said
    assert max(map(len, said.splitlines())) < 500, said
    assert re.search("(?s)" + ".*".join(parts), said), said


def files(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def trained(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(configuration, run directory) of a DiT trained for two steps."""
    folder = tmp_path_factory.mktemp("trained")
    config = tiny.write(folder, "dit", digits, steps=2)
    ranks.train(config, folder / "run")
    return config, folder / "run"


TYPED = [  # overrides; parts of the message
    ("optimm.lr=1", ['unknown key optimm: did you mean "optim"']),
    ("optim.lrr=1e-4", ['unknown key optim.lrr: did you mean "lr"']),
    ("model.dpeth=3", ['unknown key model.dpeth: did you mean "depth"']),
    ("data.global_bacth=8", ['unknown key data.global_bacth: did you mean "global_batch"']),
    ("objective.lawe=uniform", ['unknown key objective.lawe: did you mean "law"']),
    ("mesh.zzz=1", ["unknown key mesh.zzz: use one of dp_replicate, dp_shard, ep"]),
    ("steps=many", ["steps='many' must be a whole number; change steps"]),
    ("steps=null", ["steps=null must be a whole number; change steps"]),
    ("optim.lr=-1", ["optim.lr=-1 must be greater than 0; change optim.lr"]),
    ("optim.lr=fast", ["optim.lr='fast' must be a number"]),
    ("data.global_batch=0", ["data.global_batch=0 must be greater than 0"]),
    ("data.check_crc=maybe", ["data.check_crc='maybe' must be true or false"]),
    ("precision=fp4", ["precision='fp4' must be 'fp32'.* or 'fp8'; change precision"]),
    ("mesh=2", ["mesh=2 must be a group of keys"]),
    ("model=dit", ["model='dit' must be a group of keys"]),
    ("model.family=ditt", ['model.family=ditt is not known: did you mean "dit"']),
    ("objective.kind=flo", ['objective.kind=flo is not known: did you mean "flow"']),
    ("schedule.kind=x", ["schedule.kind=x is not known: use one of constant, cosine, wsd"]),
    ("model.size=M/2", ["model: size='M/2' is not a published size; use one of S/2, S/4"]),
    ("model.size=[1]", ["model: size=.* is not a published size"]),
    ("parametrisation=nup", ["parametrisation='nup' must be 'standard' or 'mup'"]),
    ("parametrisation=mup", ["parametrisation=mup needs model.mup.base_width, .* model.width=32"]),
    ("parametrisation=mup model.mup.base_widht=16", ['did you mean "base_width"']),
    (
        "parametrisation=mup model.mup.base_width=24",
        ["model.mup.base_width=24 is no width .* the multiples of 16 .*; use such as 32"],
    ),
    ("model.input_size=9", ["model: input_size=9 must be a multiple of 2 .*such as 8"]),
    ("objective.kind=ddpm", ["objective.kind=ddpm", "set model.learn_sigma=true or"]),
    ("optim.lr", ["override 'optim.lr' is not KEY=VALUE; write such as optim.lr=1e-4"]),
    ("=3", ["override '=3' is not KEY=VALUE"]),
    ("optim.betas=[0.9", ["override 'optim.betas=.0.9' is not YAML: [^\n]*'; correct it"]),
    ("optim.lr=${nothing}", ["optim.lr: .*'nothing' not found; correct it"]),
    ("optim.lrr=1 steps=many", ["steps='many' .*\nunknown key optim.lrr"]),
    # The layout.
    ("accum=3", ["data.global_batch=8 must be a multiple of .*= 3; set data.global_batch=9"]),
    ("mesh.dp_shard=3", ["= 3, but the number of ranks is 1; set mesh.dp_shard=1 or start 3"]),
    ("mesh.tp=2", ["= 2, but the number of ranks is 1; start 2 ranks"]),
    ("mesh.ep=2", ["ep·etp = 2·1 must divide dp_shard·sp·tp = 1; set mesh.ep=1"]),
    ("mesh.dp_replicate=2", ["= 2, but the number of ranks is 1; start 2 ranks"]),
    ("mesh.sp=2", ["mesh.sp=2: .* set mesh.sp=1"]),
    ("mesh.etp=2", ["mesh.etp=2: .* set mesh.etp=1"]),
    # The data.
    ("data.path=nowhere", ["'nowhere' does not exist; make it with `pretrain data encode"]),
    ("data.path=configs", ["'configs' has no manifest.json", "`pretrain data encode"]),
    ("data.split=test", ["split 'test' is not in the set", "set data.split to one of"]),
    ("data.codec=kl", ["codec haar2, data.codec=kl was expected; set data.codec=haar2"]),
    ("model.in_channels=4", ["of 16 channels, the model takes 4; set model.in_channels=16"]),
    ("model.input_size=16", ["latents of 8x8, the model takes 16x16; set model.input_size=8"]),
    ("model.num_classes=5", ["has label .*, the model knows 0..4", "set model.num_classes=10"]),
    # The rest.
    ("run_dir=README.md/x", ["run_dir=.*: README.md is no directory; set another run_dir"]),
    ("sample.every=1 sample.sampler=ddim", ["sampler=ddim does not fit .* flow; set sampler="]),
]


@pytest.mark.parametrize(("overrides", "parts"), TYPED, ids=[typed for typed, _ in TYPED])
def test_what_is_typed(
    overrides: str, parts: list[str], refuse: Refuse, digits: Path, tmp_path: Path
) -> None:
    config = tiny.write(tmp_path, "dit", digits)
    one_message(refuse("train", config, *overrides.split()), *parts)
    assert not (tmp_path / "run").exists()


NPROC = [
    ("data.global_batch=9", "must be a multiple of .*2·1 = 2; set data.global_batch=8"),
    ("data.path=nowhere", "does not exist; make it with"),
    ("mesh.tp=3", "start 3 ranks or change the degrees"),
    ("mesh.dp_shard=3", "the number of ranks is 2; set mesh.dp_shard=2 or start 3 ranks"),
    ("mesh.ep=2", "mesh.ep=2, but the model has no experts; set mesh.ep=1"),
    ("engine=zero1 mesh.dp_replicate=2", "set mesh.dp_replicate=1 mesh.dp_shard=2, or engine=fsdp"),
    ("engine=zero2 deterministic=true", "set deterministic=false or engine=fsdp2"),
    ("engine=zero4", "engine='zero4' must be 'fsdp2', 'zero1', 'zero2' or 'zero3'"),
]


@pytest.mark.parametrize(("override", "part"), NPROC, ids=[typed for typed, _ in NPROC])
def test_the_parent_of_nproc_starts_no_rank(
    override: str, part: str, refuse: Refuse, digits: Path, tmp_path: Path
) -> None:
    config = tiny.write(tmp_path, "dit", digits)
    one_message(refuse("train", config, *override.split(), "--nproc", 2), part)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("model", "ranks", "overrides", "part"),
    [
        (
            "dit",
            4,
            "mesh.tp=4",
            "divide the 2 attention heads of model.num_heads; set mesh.tp=2",
        ),
        ("udit", 4, "mesh.tp=4", "must divide the 2 attention heads of .*; set mesh.tp=2"),
        (
            "dit-moe",
            3,
            "mesh.ep=3 data.global_batch=9",
            "divide model.moe.experts=4; set mesh.ep=2",
        ),
        ("dit-moe", 2, "engine=zero3 mesh.ep=2", "set engine=zero2, or mesh.ep=1, or engine=fsdp2"),
        (
            "dit-moe",
            2,
            "engine=zero3 mesh.tp=2",
            "experts: .* set engine=zero2, or mesh.tp=1",
        ),
        (
            "dit",
            2,
            "model.mlp_ratio=1.03 mesh.tp=2",
            "not divide dim 0 of blocks.0.ffn.fc1",
        ),
        ("dit-moe", 2, "model.moe.every=5", "leaves none of depth=2 blocks with experts"),
        ("udit-moe", 2, "model.moe.stages=[]", "leaves no sub-block with experts"),
        ("dit", 2, "remat.mode=full remat.every=9", "chooses none of the model's 2 units"),
        ("dit-moe", 2, "compile=true mesh.ep=2 remat.mode=full", "set remat.mode=selective"),
        ("dit", 2, "engine=zero3 compile=true", "engine=zero3 with compiled units"),
        ("dit-moe", 2, "model.moe.capacity=0.5", "model.moe.capacity=0.5 must be greater than or"),
        ("dit-moe", 2, "model.moe.balance=expert_choice", "set both losses to 0, or balance to"),
    ],
)
def test_a_layout_that_does_not_cut_the_model_is_refused(
    model: str, ranks: int, overrides: str, part: str, refuse: Refuse, digits: Path, tmp_path: Path
) -> None:
    config = tiny.write(tmp_path, model, digits, data__global_batch=12)
    one_message(refuse("train", config, *overrides.split(), "--nproc", ranks), part)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("model.moe.expert=4", ['unknown key model.moe.expert: did you mean "experts"']),
        ("model.moe.score=max", ["model.moe.score='max' must be 'softmax' or 'sigmoid'"]),
        ("model.moe.stages=[enc9]", ["model.moe.stages.0='enc9' must be 'enc1', 'enc2'"]),
        (
            "parametrisation=mup model.mup.base_width=8 model.moe.hidden=8",
            ["model.moe.hidden=8 stays .* experts must grow .* set model.moe.hidden_ratio"],
        ),
        (
            "parametrisation=mup model.mup.base_width=8 model.mup.base_depth=2",
            ["mup.base_depth=2: a U-DiT has the depth of its family; leave it out"],
        ),
        ("model.depth=[1,1]", ["model.depth=.1, 1. has too few values; add the others\n$"]),
    ],
)
def test_what_is_typed_inside_the_experts(
    override: str, parts: list[str], refuse: Refuse, digits: Path, tmp_path: Path
) -> None:
    config = tiny.write(tmp_path, "udit-moe", digits)
    one_message(refuse("train", config, *override.split()), *parts)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (None, ["config file .*/x.yaml does not exist; give a YAML file, see configs/"]),
        ("model: {a: [1\nsteps: 3}", ["x.yaml is not YAML: .* in line \\d+, column \\d+; correct"]),
        ("- a\n- b", ["x.yaml holds .*, no keys; write KEY: VALUE, see configs/"]),
        ("", ["model is missing; set it in the YAML file or as model=…\n", "steps is missing"]),
        ("model: {width: 8}", ["model.family is missing; set it to one of dit, dit-moe, udit"]),
        ("model: {family: dit, size: S/2, deep: 3}", ["unknown key model.deep: did you mean"]),
        ("steps: ???", ["steps"]),
        (b"\xff\xfe\x00", ["x.yaml"]),
    ],
    ids=["missing", "broken", "list", "empty", "no family", "typo", "mandatory", "binary"],
)
def test_configuration_files(
    text: str | bytes | None, parts: list[str], refuse: Refuse, tmp_path: Path
) -> None:
    config = tmp_path / "x.yaml"
    if text is not None:
        config.write_bytes(text if isinstance(text, bytes) else text.encode())
    said = refuse("train", config)
    one_message(said, *parts)
    one_message(refuse("plan", config), *parts)
    assert len(list(tmp_path.iterdir())) == (text is not None)


def test_a_truncated_tar(refuse: Refuse, digits: Path, tmp_path: Path) -> None:
    hurt = tmp_path / "hurt"
    shutil.copytree(digits, hurt)
    tar = next(hurt.glob("train-*.tar"))
    os.truncate(tar, 100_000)
    config = tiny.write(tmp_path, "dit", hurt)
    said = refuse("train", config)
    one_message(said, re.escape(str(tar)), "100000 bytes, expected \\d+", "first at offset \\d+")
    one_message(said, "data.max_bad=0", "restore the file, encode again, or set data.max_bad")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("model.depth=3", ["other model settings: model.depth=3 \\(checkpoint: 2\\)"]),
        ("model.family=dit-moe", ["model.family=dit-moe \\(checkpoint: dit\\), model.moe={…} "]),
        (
            "parametrisation=mup model.mup.base_width=16",
            ["other model settings: parametrisation, model.mup={…} \\(checkpoint: null\\)"],
        ),
        ("data.global_batch=16", ["other data settings: data.global_batch=16 \\(checkpoint: 8\\)"]),
        ("seed=1", ["other data settings: seed=1 \\(checkpoint: 0\\)"]),
        ("data.path=OTHER", ["other data settings: data.path \\(SHA-256 of its index\\)="]),
    ],
)
def test_a_checkpoint_of_another_run_is_not_continued(
    override: str, parts: list[str], refuse: Refuse, trained: tuple[Path, Path], tmp_path: Path
) -> None:
    config, run = trained
    words = override.split()
    if "OTHER" in override:
        encode("digits", tmp_path / "other", codec="haar2", limit=100)
        words = [f"data.path={tmp_path / 'other'}"]
    if "moe" in override:
        words.append("model.moe.experts=4")
    before = files(run)
    said = refuse("train", config, *words)
    one_message(said, "checkpoints/step_00000002", *parts)
    one_message(said, "restore them to resume, or set another run_dir to start anew")
    assert files(run) == before


@pytest.mark.parametrize("command", ["sample", "eval", "inspect"])
def test_nothing_is_opened_where_no_checkpoint_is(
    command: str, refuse: Refuse, tmp_path: Path
) -> None:
    expected = "give a run directory with checkpoints/step_.*, or one such step directory"
    one_message(refuse(command, tmp_path), "holds no checkpoint", expected)
    one_message(refuse(command, tmp_path / "no"), "is no directory", expected)
    (tmp_path / "checkpoints" / "step_00000003").mkdir(parents=True)
    one_message(refuse(command, tmp_path), "step_00000003 has no manifest.json", expected)
    assert not files(tmp_path)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ("sample --sampler ddim", ["sampler=ddim does not fit .* flow; set sampler=euler or heun"]),
        ("eval --sampler ddpm", ["sampler=ddpm does not fit"]),
        ("sample --sampler best", ["sampler='best' must be 'ddpm', 'ddim', 'euler' or 'heun'"]),
        ("sample --labels 99", ["--labels: 99 is out of range; use 0-9"]),
        ("sample --labels three", ["--labels 'three': write classes as 3,1,4 or 0-9"]),
        ("sample --labels 5-3", ["--labels 5-3: no class is meant"]),
        ("sample --weights best", ["--weights best: a checkpoint holds ema and model"]),
        ("sample --guidance-channels 4", ["guidance_channels='4' must be 'all' or 3"]),
        ("eval --data nowhere", ["data directory 'nowhere' does not exist"]),
    ],
)
def test_what_is_asked_of_a_trained_model(
    words: str, parts: list[str], refuse: Refuse, trained: tuple[Path, Path]
) -> None:
    _, run = trained
    before = files(run)
    command, *options = words.split()
    one_message(refuse(command, run, *options), *parts)
    assert files(run) == before


def test_guidance_of_three_channels_can_be_asked_for(
    monkeypatch: pytest.MonkeyPatch, trained: tuple[Path, Path], tmp_path: Path
) -> None:
    out = tmp_path / "x.png"
    words = "--guidance-channels 3 --labels 0 --per-class 1 --steps 1 --out"
    assert end_of(monkeypatch, "sample", trained[1], *words.split(), out) == 0
    assert out.is_file()


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ("nowhere", ["source 'nowhere' was not found", "Give a folder of class folders"]),
        (".ci", ["source '.ci' has no class folders", "expected .ci/CLASS/FILE"]),
        ("digits --codec jpeg", ["codec 'jpeg' is unknown; choose haar"]),
        ("digits --codec kl", ["codec 'kl' needs weights: give --vae DIRECTORY or a hub id"]),
        ("digits --size 9", ["is 9x9, but codec haar1 needs multiples of 2; give --size"]),
        ("digits --limit 0", ["limit=0 is not possible; give 1 or more"]),
    ],
)
def test_encode(words: str, parts: list[str], refuse: Refuse, tmp_path: Path) -> None:
    src, *options = words.split()
    one_message(refuse("data", "encode", src, "--out", tmp_path / "out", *options), *parts)
    assert not list(tmp_path.iterdir())


def test_encode_does_not_write_over_a_set(refuse: Refuse, digits: Path) -> None:
    before = files(digits)
    said = refuse("data", "encode", "digits", "--out", digits)
    one_message(said, "exists already; choose another --out or give --overwrite")
    assert files(digits) == before


@pytest.mark.parametrize(
    "words",
    [
        "trian configs/demo.yaml",
        "train",
        "train configs/demo.yaml --nprco 2",
        "train configs/demo.yaml --nproc two",
        "data encode digits",
        "sample runs/none --steps 0",
    ],
)
def test_commands_and_options_that_do_not_exist(words: str, refuse: Refuse) -> None:
    said = refuse(*words.split())
    assert "Usage: " in said
    assert "Traceback" not in said


def test_a_file_that_is_no_image_is_left_out_and_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pixels = np.random.default_rng(0)
    for name in ("cat/0", "cat/1", "dog/0", "dog/1"):
        file = tmp_path / "src" / f"{name}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        memory = io.BytesIO()
        Image.fromarray(pixels.integers(0, 256, (8, 8, 3), np.uint8)).save(memory, "PNG")
        file.write_bytes(memory.getvalue() if name != "dog/1" else b"no image")
    out = tmp_path / "out"
    assert end_of(monkeypatch, "data", "encode", tmp_path / "src", "--out", out) == 0
    said = capsys.readouterr().out
    assert "3 train" in said
    assert f"left out because no image: 1, listed in {out / 'quarantine.jsonl'}" in said
    assert json.loads((out / "quarantine.jsonl").read_text()) == {
        "name": "dog/1.png",
        "reason": "not an image file",
    }
    assert json.loads((out / "manifest.json").read_text())["quarantined"] == 1


def parent(*words: str) -> None:
    """The command line as a person starts it, outside any world."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", launch.STORE):
        del os.environ[name]
    ranks.pretrain(*words)


@pytest.mark.parametrize(
    ("target", "world", "words"),
    [
        (parent, 1, ["data.path=nowhere"]),
        (parent, 1, ["data.path=nowhere", "--nproc", "2"]),
        (ranks.pretrain, 2, ["data.path=nowhere"]),
    ],
    ids=["alone", "nproc", "a rank of two"],
)
def test_real_processes_say_it_once(
    target: Callable[..., None], world: int, words: list[str], digits: Path, tmp_path: Path
) -> None:
    config = tiny.write(tmp_path, "dit", digits)
    log = tmp_path / "log"
    codes = ranks.wait(ranks.start(target, world, "train", str(config), *words, log=log))
    assert codes == [2] * world
    said = log.read_text()
    one_message(said, "'nowhere' does not exist")
    assert said.count("\n") == 1
    assert not (tmp_path / "run").exists()
