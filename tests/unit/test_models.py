"""Whole models: adaLN-Zero starts, shapes, dtypes, label tables, and the merged U-DiT."""

import copy

import pytest
import torch
from torch import Tensor, nn

from pretrain.models.build import Model, build, build_form
from pretrain.models.dit import DiTConfig, DiTMoEConfig
from pretrain.models.init import initialise
from pretrain.models.layers import Block, Condition, Conditioning, LabelTable
from pretrain.models.moe import Router, moe_layers
from pretrain.models.udit import STAGES, UDiT, UDiTConfig, merge

Config = DiTConfig | DiTMoEConfig | UDiTConfig
DIT = DiTConfig(depth=2, width=32, num_heads=2, patch=2, input_size=8, num_classes=10)
DIT_MOE = DiTMoEConfig(
    depth=2, width=32, num_heads=2, patch=2, input_size=8, num_classes=10, qk_norm=True
)
UDIT = UDiTConfig(width=16, num_heads=2, depth=(1, 1, 2, 1, 1), input_size=16, num_classes=10)
UDIT_MOE = UDiTConfig(
    width=16,
    head_dim=8,
    depth=(1, 1, 2, 1, 1),
    input_size=16,
    num_classes=10,
    adaln_lora=4,
    moe={"experts": 6, "top_k": 2, "stages": ["latent", "dec2"], "every": 2},
)
ALL = {"dit": DIT, "dit-moe": DIT_MOE, "udit": UDIT, "udit-moe": UDIT_MOE}
every_family = pytest.mark.parametrize("cfg", ALL.values(), ids=ALL.keys())


def made(cfg: Config, zero_std: float = 0.0, seed: int = 0) -> Model:
    model = build(cfg)
    initialise(model, seed, zero_std)
    return model


def inputs(cfg: Config, batch: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    x_t = torch.randn(batch, 4, cfg.input_size, cfg.input_size, generator=generator)
    return x_t, torch.rand(batch, generator=generator) * 1000, torch.arange(batch)


@every_family
def test_a_fresh_model_outputs_exactly_zero(cfg: Config) -> None:
    x_t, t, cond = inputs(cfg)
    pred = made(cfg)(x_t, t, cond)
    assert pred.shape == (3, 8, cfg.input_size, cfg.input_size)
    assert pred.dtype == torch.float32
    assert pred.eq(0).all()


@every_family
def test_fresh_blocks_are_the_identity(cfg: Config) -> None:
    changed: list[bool] = []

    def watch(_: nn.Module, args: tuple[Tensor, ...], out: tuple[Tensor, object]) -> None:
        changed.append(not torch.equal(args[0], out[0]))

    model = made(cfg)
    for unit in model.units():
        unit.register_forward_hook(watch)
    model(*inputs(cfg))
    assert changed == [False] * len(model.units())


@every_family
def test_perturbed_zeros_reach_every_parameter(cfg: Config) -> None:
    model = made(cfg, zero_std=0.05)
    pred, routing = model(*inputs(cfg), routing=True)
    (pred.square().sum() + sum(r.probs.square().sum() + r.z.sum() for r in routing)).backward()
    # why: a bias on every key alike leaves softmax as it is; what gradient it shows is rounding.
    live = {n: p for n, p in model.named_parameters() if not n.endswith((".k.bias", "k_norm.bias"))}
    dead = {n for n, p in live.items() if p.grad is None or p.grad.abs().max() == 0}
    assert dead == set()
    assert len(routing) == len(model.routers()) == len(moe_layers(model))


@every_family
def test_units_hold_the_blocks_and_routers_are_found(cfg: Config) -> None:
    model = made(cfg)
    inside = {id(m) for unit in model.units() for m in unit.modules() if isinstance(m, Block)}
    assert inside == {id(m) for m in model.modules() if isinstance(m, Block)}
    assert all(isinstance(router, Router) for router in model.routers())
    assert model.routers() == [layer.router for layer in moe_layers(model)]


@every_family
def test_meta_then_empty_then_initialise_equals_a_direct_build(cfg: Config) -> None:
    with torch.device("meta"):
        late = build(cfg)
    late.to_empty(device="cpu")
    initialise(late, 0, 0.05)
    model = made(cfg, 0.05)
    args = inputs(cfg)
    assert torch.equal(late(*args), model(*args))
    stored = set(model.state_dict()) - {name for name, _ in model.named_parameters()}
    assert len(stored) == len(moe_layers(model))
    assert all(name.endswith(".router.bias") for name in stored)


@every_family
def test_bf16_weights_with_fp32_routers_stay_near_fp32(cfg: Config) -> None:
    model = made(cfg, 0.05)
    low = copy.deepcopy(model).to(torch.bfloat16)
    for router in low.routers():
        router.float()
    args = inputs(cfg)
    exact, rounded = model(*args), low(*args)
    assert rounded.dtype == torch.float32
    assert (exact - rounded).norm() < 0.05 * exact.norm()


def test_every_label_table_has_a_null_row() -> None:
    for cfg, count in ((DIT, 1), (UDIT, 3)):
        model = made(cfg)
        tables = [m for m in model.modules() if isinstance(m, LabelTable)]
        assert len(tables) == model.label_tables == count
        assert all(len(table.weight) == 11 for table in tables)


def test_labels_may_be_dropped_for_each_table_alone() -> None:
    model = made(UDIT, 0.05)
    x_t, t, _ = inputs(UDIT, 1)
    null = model(x_t, t, torch.tensor([[10, 10, 10]]))
    assert torch.equal(null, model(x_t, t, torch.tensor([10])))
    mixed = [model(x_t, t, torch.tensor([row])) for row in ([3, 10, 10], [10, 3, 10], [10, 10, 3])]
    assert all(not torch.equal(one, null) for one in mixed)
    single, column = torch.arange(3), torch.arange(3)[:, None]
    x_t, t, _ = inputs(DIT)
    dit = made(DIT, 0.05)
    assert torch.equal(dit(x_t, t, single), dit(x_t, t, column))


def test_skips_join_after_what_comes_up() -> None:
    model = made(UDIT, 0.05)
    assert isinstance(model, UDiT)
    seen: dict[str, Tensor] = {}

    def note(name: str) -> None:
        def hook(_: nn.Module, args: tuple[Tensor], out: Tensor | tuple[Tensor, object]) -> None:
            seen[name] = out if isinstance(out, Tensor) else out[0]
            seen[f"{name} in"] = args[0]

        model.get_submodule(name).register_forward_hook(hook)

    for name in ("enc1", "enc2", "up1", "up2", "reduce1", "reduce2"):
        note(name)
    model(*inputs(UDIT))
    for level in ("1", "2"):
        both = torch.cat([seen[f"up{level}"], seen[f"enc{level}"]], dim=-1)
        assert torch.equal(seen[f"reduce{level} in"], both)


def test_stages_take_their_published_conditions() -> None:
    model = made(UDIT)
    assert isinstance(model, UDiT)
    seen: dict[str, int] = {}

    def note(name: str) -> None:
        def hook(_: nn.Module, args: tuple[Tensor, Conditioning]) -> None:
            seen[name] = args[1].c.shape[-1]

        model.stages()[name].register_forward_pre_hook(hook)

    for name in STAGES:
        note(name)
    model(*inputs(UDIT))
    assert seen == {"enc1": 16, "enc2": 32, "latent": 64, "dec2": 32, "dec1": 32}


def test_shared_adaln_is_one_linear_a_condition() -> None:
    model = made(UDIT_MOE)
    shared = [m.adaln for m in model.modules() if isinstance(m, Condition)]
    assert [layer.weight.shape for layer in shared if layer is not None] == [
        (96, 16),
        (192, 32),
        (384, 64),
    ]
    adaln = next(m for m in model.modules() if isinstance(m, Block)).adaln
    assert adaln.down is not None
    assert (adaln.down.weight.shape, adaln.up.weight.shape) == ((4, 16), (96, 4))


def test_wrong_latents_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(B, 4, 8, 8\)"):
        made(DIT)(torch.zeros(1, 16, 8, 8), torch.zeros(1), torch.zeros(1, dtype=torch.int64))


@pytest.mark.parametrize("cfg", [UDIT, UDIT_MOE], ids=["udit", "udit-moe"])
def test_merged_form_is_equal_after_any_switches_and_the_source_is_untouched(
    cfg: UDiTConfig,
) -> None:
    model = made(cfg, 0.05)
    assert isinstance(model, UDiT)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    args = inputs(cfg)
    want = model(*args)
    for _ in range(3):
        model.eval()
        merged = merge(model)
        model.train()
        again = merge(merge(merged))
        merged.train().eval()
        torch.testing.assert_close(merged(*args), want, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(again(*args), want, atol=1e-5, rtol=1e-5)
        assert torch.equal(model(*args), want)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    shared = {p.data_ptr() for p in model.parameters()} & {
        p.data_ptr() for p in merged.parameters()
    }
    assert shared == set()
    with torch.device("meta"):
        shape = build_form(cfg, "merged")
    assert {n: p.shape for n, p in merged.named_parameters()} == {
        n: p.shape for n, p in shape.named_parameters()
    }


def test_kernels_applied_apart_give_the_same_values_and_gradients() -> None:
    at_once, apart = made(UDIT, 0.05), build_form(UDIT, "published")
    initialise(apart, 0, 0.05)
    args = inputs(UDIT)
    out = [model(*args) for model in (at_once, apart)]
    torch.testing.assert_close(out[0], out[1], atol=1e-5, rtol=1e-5)
    grads = [
        torch.autograd.grad(pred.square().sum(), list(model.parameters()))
        for pred, model in zip(out, (at_once, apart), strict=True)
    ]
    torch.testing.assert_close(grads[0], grads[1], atol=1e-3, rtol=1e-4)


def test_merging_keeps_float64() -> None:
    model = made(UDIT, 0.05).double()
    assert isinstance(model, UDiT)
    model.dtype = torch.float64
    args = inputs(UDIT)
    merged = merge(model)
    assert all(p.dtype == torch.float64 for p in merged.parameters())
    torch.testing.assert_close(merged(*args), model(*args), atol=1e-6, rtol=1e-6)
