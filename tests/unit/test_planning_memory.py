"""Bytes that are planned beside bytes that are held: what autograd keeps of a block, and the peak
of real training steps by the profiler's memory events.

    python -m tests.unit.test_planning_memory      a table of all layouts
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from parallel.precision import COMPUTE
from pretrain import config
from pretrain.config import Config
from pretrain.models.build import build
from pretrain.models.init import initialise
from pretrain.models.layers import Block
from pretrain.planning import activations, planned
from pretrain.planning.activations import Sizes
from pretrain.planning.anatomy import anatomy
from tests import measured, ranks

MARGIN = 0.10
UDIT = {"family": "udit", "width": 32, "num_heads": 4, "depth": [1, 1, 2, 1, 1]}
MODELS: dict[str, dict[str, Any]] = {
    "dit": {"family": "dit", "depth": 6, "width": 128, "num_heads": 4, "patch": 2},
    "dit-moe": {
        "family": "dit-moe",
        "depth": 4,
        "width": 128,
        "num_heads": 4,
        "patch": 2,
        "qk_norm": True,
        "moe": {"experts": 4, "hidden_ratio": 1.0, "router_input": "unmodulated"},
    },
    "udit": UDIT,
    "udit-moe": UDIT
    | {"moe": {"experts": 4, "hidden_ratio": 0.5, "stages": ["enc2", "latent"]}, "adaln_lora": 4},
}


def tree_of(model: str, *words: str) -> dict[str, Any]:
    shape = {"input_size": 16, "in_channels": 4, "num_classes": 10, "learn_sigma": False}
    tree = OmegaConf.create(
        {
            "model": MODELS[model] | shape,
            "objective": {"kind": "flow"},
            "data": {"path": "nowhere", "global_batch": 16},
            "schedule": {"kind": "constant"},
            "steps": 9,
            "run_dir": "nowhere",
        }
    )
    for word in words:
        tree = OmegaConf.merge(tree, OmegaConf.from_dotlist([word]))
    made = OmegaConf.to_container(tree)
    assert isinstance(made, dict)
    return {str(key): value for key, value in made.items()}


class Saved:
    """What autograd keeps inside, each storage once, weights and tables not."""

    def __init__(self, model: nn.Module) -> None:
        fixed = (*model.parameters(), *model.buffers())
        self._fixed = {t.untyped_storage()._cdata for t in fixed}
        self._kept: dict[int, Tensor] = {}

    def hooks(self) -> saved_tensors_hooks:
        return saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage()._cdata
        if place not in self._fixed:
            self._kept.setdefault(place, tensor)  # kept alive, so that no other gets its number
        return tensor

    @property
    def bytes(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in self._kept.values())


def by_hooks(cfg: Config, images: int) -> tuple[dict[str, int], int]:
    """Bytes autograd keeps of each block, and of what is around them."""
    model = build(cfg.model)
    initialise(model, 0, 0.05)
    model.to(COMPUTE[cfg.precision])
    model.dtype = COMPUTE[cfg.precision]
    for router in model.routers():
        router.float()
    blocks: dict[str, Saved] = {}
    for name, block in model.named_modules():
        if isinstance(block, Block):
            run, blocks[name] = block.forward, Saved(model)

            def forward(*args: Any, run: Any = run, name: str = name) -> Any:
                with blocks[name].hooks():
                    return run(*args)

            block.forward = forward  # type: ignore[method-assign]
    around, size = Saved(model), cfg.model.input_size
    with around.hooks():
        model(torch.randn(images, 4, size, size), torch.rand(images), torch.arange(images))
    return {name: saved.bytes for name, saved in blocks.items()}, around.bytes


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("model", MODELS)
def test_what_autograd_keeps_of_a_block_is_what_is_planned(model: str, precision: str) -> None:
    """Within 1 % of every block, and 5 % of what is small around them."""
    cfg = config.validate(tree_of(model, f"precision={precision}"))
    sizes = Sizes(3, COMPUTE[cfg.precision].itemsize)
    kept, around = by_hooks(cfg, 3)
    for site in anatomy(cfg.model).sites:
        made = sum(t.bytes for t in activations.block(site, sizes) if t.saved)
        made += sizes.images * site.tokens * site.width * sizes.item  # what comes in
        assert made == pytest.approx(kept[site.path], rel=0.01), site.path
    assert activations.around(cfg.model, sizes) == pytest.approx(around, rel=0.05, abs=30_000)


def test_a_block_by_hand() -> None:
    """DiT, width 8, 4 tokens, 2 heads, hidden 16, float32, one image: 32 values a stream."""
    tree = tree_of("dit", "model.width=8", "model.num_heads=2", "model.mlp_ratio=2")
    site = anatomy(config.validate(tree | {"model": tree["model"] | {"patch": 8}}).model).sites[0]
    found = {t.name: t.bytes for t in activations.block(site, Sizes(1, 4))}
    assert found == {
        "modulation": 6 * 8 * 4,
        "statistics of a norm": 2 * 4 * 4,
        "modulated": 32 * 4,
        "q and k": 2 * 32 * 4,
        "v": 32 * 4,
        "read": 32 * 4,
        "sums of exponentials": 4 * 2 * 4,
        "out": 32 * 4,
        "attended stream": 32 * 4,
        "expanded": 64 * 4,
        "bent": 64 * 4,
        "fed forward": 32 * 4,
    }


FAST = (
    ("udit-moe", 2, "mesh.ep=2 remat.mode=selective"),
    ("dit", 2, "engine=zero3"),
)
SLOW = (
    ("dit-moe", 1, ""),
    ("dit", 2, "accum=2"),
    ("udit", 2, "mesh.dp_replicate=2"),
    ("udit", 2, "mesh.tp=2 precision=bf16"),
    ("udit-moe", 2, "mesh.ep=2 model.moe.dispatcher=static"),
    ("udit-moe", 2, "engine=zero1"),
    ("dit-moe", 2, "engine=zero2 precision=bf16"),
)
OTHERS = (  # in the table only
    ("udit-moe", 2, "mesh.ep=2 remat.mode=selective precision=bf16"),
    ("dit", 1, "remat.mode=full"),
    ("udit", 2, ""),
    ("dit", 1, "precision=bf16 accum=2"),
    ("udit", 1, "remat.mode=full remat.every=2"),
    ("udit-moe", 1, "remat.mode=selective"),
    ("dit", 2, "mesh.unit_mb=0"),
    ("dit-moe", 2, "mesh.ep=2"),
    ("dit-moe", 2, "mesh.tp=2"),
    ("udit", 2, "mesh.reshard_after_forward=false"),
    ("udit", 2, "engine=zero2 accum=2"),
    ("udit-moe", 2, "engine=zero3"),
)


def named(case: tuple[str, int, str]) -> str:
    return f"{case[0]} on {case[1]} {case[2]}".strip()


def held_and_planned(case: tuple[str, int, str], folder: Path) -> tuple[int, int]:
    """The peak of training steps, and the plan's. Of ranks the least: see `measured.Peak`."""
    model, world, words = case
    tree = tree_of(model, *words.split())
    ranks.run(measured.peak, world, tree, folder, log=folder / "log")
    held = [json.loads((folder / f"{rank}.json").read_text())["steps"] for rank in range(world)]
    return min(held), planned.counted(config.validate(tree), world).plan.per_rank.total


@pytest.mark.parametrize("case", FAST, ids=named)
def test_the_peak_of_a_run_is_as_planned(case: tuple[str, int, str], tmp_path: Path) -> None:
    held, made = held_and_planned(case, tmp_path)
    assert made == pytest.approx(held, rel=MARGIN)


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW, ids=named)
def test_the_peak_of_other_layouts_is_as_planned(
    case: tuple[str, int, str], tmp_path: Path
) -> None:
    held, made = held_and_planned(case, tmp_path)
    assert made == pytest.approx(held, rel=MARGIN)


if __name__ == "__main__":  # the table: python -m tests.unit.test_planning_memory
    import tempfile

    for one in FAST + SLOW + OTHERS:
        with tempfile.TemporaryDirectory() as place:
            got, want = held_and_planned(one, Path(place))
        error = 100 * (want / got - 1)
        print(f"{named(one):60} {got / 1e6:8.1f} {want / 1e6:8.1f} MB {error:+5.1f} %", flush=True)
