"""muP's rules beside what the `mup` package says of the same models, and what they do to a run."""

import math
from fnmatch import fnmatch

import mup.init
import pytest
import torch
from mup import MuAdamW, MuReadout, set_base_shapes
from mup.infshape import InfShape
from pydantic import TypeAdapter
from torch import Tensor, nn

from parallel.shards import Box, Extent, Piece
from pretrain import config
from pretrain.models.build import Model, ModelConfig, build
from pretrain.models.families import build_form
from pretrain.models.init import Fill, Init, Normal, Zero, initialise
from pretrain.models.layers import times
from pretrain.models.mup import MupError, Rule, at_width, check_family, factors, rules
from pretrain.models.udit import UDiT, merge
from pretrain.optim import AdamW, OptimConfig

read = TypeAdapter(ModelConfig).validate_python
SHAPE = {"input_size": 8, "num_classes": 10, "mup": {"base_width": 16, "output_mult": 3.0}}
TREES = {
    "dit": {"family": "dit", "depth": 2, "width": 16, "num_heads": 2, "patch": 2},
    "dit-moe": {
        "family": "dit-moe",
        "depth": 2,
        "width": 16,
        "num_heads": 2,
        "patch": 2,
        "qk_norm": True,
        "moe": {"experts": 4},
    },
    "udit": {"family": "udit", "width": 16, "num_heads": 2, "depth": [1, 1, 1, 1, 1]},
    "udit-moe": {
        "family": "udit",
        "width": 16,
        "head_dim": 8,
        "depth": [1, 1, 1, 1, 1],
        "adaln_lora": 4,
        "moe": {"experts": 4, "stages": ["enc2", "latent"]},
    },
}
BASE: dict[str, ModelConfig] = {name: read(tree | SHAPE) for name, tree in TREES.items()}
every_family = pytest.mark.parametrize("name", BASE)
every_width = pytest.mark.parametrize("width", [8, 16, 64])
# Where the package's word is not taken, with the reasons in `mup`'s docstring.
ROUTERS = ("*.router.weight", "*.router.time")
ADALN = ("*.adaln.up.weight", "condition?.adaln.weight")
DEPTHWISE = ("*.mix.weight", "*.mix.five.weight", "*.mix.three.weight", "*.mix.one.weight")


def like(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def bare(cfg: ModelConfig) -> Model:
    with torch.device("meta"):
        return build_form(cfg, "trained")


def packaged(cfg: ModelConfig) -> Model:
    """The model on meta as a user of the package makes it; a convolution has no MuReadout there."""
    base, delta = (bare(at_width(cfg, width)) for width in (16, 48))
    model = bare(cfg)
    with torch.device("meta"):
        for one in (model, base, delta):
            if not isinstance(one, UDiT):
                last = one.head.linear
                one.head.linear = MuReadout(
                    last.in_features, last.out_features, readout_zero_init=True, output_mult=3.0
                )
    set_base_shapes(model, base, delta=delta, rescale_params=False, do_assert=False)
    return model


def packaged_std(parameter: Tensor) -> float:
    """Standard deviation that the package's kaiming start gives; of experts, to one of them."""
    shape = parameter.infshape
    if parameter.ndim == 3:
        parameter = nn.Parameter(parameter[0])
        parameter.infshape = InfShape(shape[1:])
    parameter.normal_ = lambda mean, std: std  # type: ignore[method-assign]
    return mup.init.kaiming_normal_(parameter, nonlinearity="linear")


@every_family
@every_width
def test_factors_are_those_of_the_package_but_for_the_routers(name: str, width: int) -> None:
    cfg, m = at_width(BASE[name], width), width / 16
    model, ours = packaged(cfg), rules(cfg)
    groups = MuAdamW(model.parameters(), lr=1.0, weight_decay=1.0).param_groups
    theirs = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert ours.keys() == {key for key, _ in model.named_parameters()}
    for key, parameter in model.named_parameters():
        said = theirs[id(parameter)]
        if like(key, ROUTERS):
            assert said == (1, 1)
            said = (1 / m, m)
        assert (ours[key].lr, ours[key].decay) == said, key
    assert {rule.lr for rule in ours.values()} == {1.0, 1 / m}


@every_family
@every_width
def test_starts_are_those_of_the_package_but_for_routers_and_depthwise(
    name: str, width: int
) -> None:
    cfg = at_width(BASE[name], width)
    ours = rules(cfg)
    checked = 0
    for key, parameter in packaged(cfg).named_parameters():
        init = ours[key].init
        if parameter.ndim < 2:
            fixed = {"weight": Fill(1.0), "logit_scale": Fill(math.log(10))}
            assert init == fixed.get(key.split(".")[-1], Zero()), key
        elif key.endswith("label.weight"):
            assert init == Normal(1.0)
        elif key in ("head.linear.weight", "head.out.weight") or key.endswith("router.time"):
            assert init == Zero()
        elif name.startswith("udit") and like(key, ADALN):
            assert init == Zero(), "adaLN-Zero is kept"
        elif like(key, ROUTERS):
            assert isinstance(init, Normal)
            # A tenth of the hidden matrices'; the package shrinks it with the width besides.
            assert init.std == pytest.approx(0.1 * packaged_std(parameter) / math.sqrt(width / 16))
        elif like(key, DEPTHWISE):
            summed = 1 if key.endswith("mix.weight") else 3
            kernel = parameter.shape[-1]
            assert init == Normal(1 / math.sqrt(summed * kernel**2)), key
        else:
            assert isinstance(init, Normal), key
            assert init.std == pytest.approx(packaged_std(parameter)), key
            checked += 1
    assert checked > 10


@every_family
def test_adaln_starts_at_zero_where_that_is_asked_for(name: str) -> None:
    for keep in (True, False):
        mup_tree = SHAPE["mup"] | {"adaln_zero": keep}
        ours = rules(read(TREES[name] | SHAPE | {"mup": mup_tree}))
        found = {type(rule.init) for key, rule in ours.items() if like(key, ADALN)}
        assert found == {Zero if keep else Normal}
        assert {rule.kind for key, rule in ours.items() if like(key, ADALN)} == {"hidden"}


@every_family
@every_width
def test_the_readout_reads_what_the_packages_readout_reads(name: str, width: int) -> None:
    cfg = at_width(BASE[name], width)
    model, ours = packaged(cfg), rules(cfg)
    scaled = {key: rule.multiplier for key, rule in ours.items() if rule.multiplier != 1.0}
    last = model.head.out if isinstance(model, UDiT) else model.head.linear
    expected = 3.0 / MuReadout.width_mult(last)  # type: ignore[arg-type]
    assert scaled == {f"{model.readout}.weight": expected}
    if isinstance(last, MuReadout):
        shape = last.weight.infshape
        last.to_empty(device="cpu")
        last.weight.infshape = shape
        nn.init.normal_(last.weight)
        nn.init.zeros_(last.bias)
        x = torch.randn(5, last.in_features)
        torch.testing.assert_close(last(x), nn.functional.linear(x * expected, last.weight))


def test_dit_at_twice_the_base_has_the_published_table() -> None:
    tree = {"family": "dit", "size": "XL/2", "width": 576, "num_heads": 8, "depth": 2}
    found = rules(read(tree | {"mup": {"base_width": 288, "output_mult": 4.0}}))
    hidden, wide = Normal(1 / 24), Normal(1 / 48)

    def rule(key: str) -> tuple[Init, float, float]:
        return found[key].init, found[key].lr, found[key].multiplier

    assert rule("embed.weight") == (Normal(1 / 4), 1, 1)
    assert rule("condition.time1.weight") == (Normal(1 / 16), 1, 1)
    assert rule("condition.label.weight") == (Normal(1.0), 1, 1)
    for part in ("adaln.up", "attn.q", "attn.k", "attn.v", "attn.out", "ffn.fc1"):
        assert rule(f"blocks.1.{part}.weight") == (hidden, 0.5, 1), part
    assert rule("blocks.1.ffn.fc2.weight") == (wide, 0.5, 1)
    assert rule("condition.time2.weight") == rule("head.adaln.up.weight") == (hidden, 0.5, 1)
    assert rule("head.linear.weight") == (Zero(), 1, 2)
    biases = [key for key in found if key.endswith(".bias")]
    assert {rule(key) for key in biases} == {(Zero(), 1.0, 1.0)}
    named = {"embed", "condition", "blocks", "head"}
    assert {key.split(".")[0] for key in found} == named


@every_family
def test_a_model_starts_as_its_rules_say(name: str) -> None:
    cfg = at_width(BASE[name], 64)
    model = build(cfg)
    initialise(model, 0)
    for key, parameter in model.named_parameters():
        init = rules(cfg)[key].init
        if isinstance(init, Normal):
            off = 5 / math.sqrt(parameter.numel())  # five standard errors, and more
            assert parameter.std().item() == pytest.approx(init.std, rel=off), key
        else:
            value = init.value if isinstance(init, Fill) else 0.0
            assert parameter.eq(value).all(), key


@every_family
def test_scales_in_the_forward_pass_are_scales_of_the_last_weights(name: str) -> None:
    mup_tree = SHAPE["mup"] | ({} if name.startswith("udit") else {"base_depth": 1})
    cfg = at_width(read(TREES[name] | SHAPE | {"mup": mup_tree}), 32)
    plain = read(cfg.model_dump() | {"mup": None})
    scaled, other = build(cfg).eval(), build(plain).eval()
    initialise(scaled, 0, zero_std=0.05)
    initialise(other, 0)
    weights = scaled.state_dict()
    weights[f"{scaled.readout}.weight"] = weights[f"{scaled.readout}.weight"] * 1.5
    for key in weights if "base_depth" in mup_tree else ():
        if like(key, ("*.attn.out.*", "*.ffn.fc2.*", "*.experts.down", "*.shared.down.weight")):
            weights[key] = weights[key] * math.sqrt(0.5)
    other.load_state_dict(weights)
    inputs = (torch.randn(3, 4, 8, 8), torch.tensor([3.0, 400.0, 900.0]), torch.arange(3))
    with torch.no_grad():
        ours, theirs = scaled(*inputs), other(*inputs)
        assert ours.std() > 0.01
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        if isinstance(scaled, UDiT):
            torch.testing.assert_close(merge(scaled)(*inputs), ours, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["dit", "dit-moe"])
def test_a_deeper_model_has_smaller_rates_in_its_blocks(name: str) -> None:
    """Four times base_depth: half the rate of the same parameter outside of it."""
    flat = read(TREES[name] | SHAPE | {"depth": 8})
    deep = read(TREES[name] | SHAPE | {"depth": 8, "mup": SHAPE["mup"] | {"base_depth": 2}})
    assert (flat.residual_scale, deep.residual_scale) == (1.0, 0.5)
    ours, theirs = rules(deep), rules(flat)
    for key, rule in theirs.items():
        by = 0.5 if key.startswith("blocks.") else 1.0
        assert (ours[key].lr, ours[key].decay) == (by * rule.lr, rule.decay / by), key
        assert ours[key].init == rule.init


@pytest.mark.parametrize("name", ["dit", "udit"])
def test_adamw_with_factors_is_the_packages(name: str) -> None:
    cfg = at_width(BASE[name], 64)
    ours, theirs = build(cfg), build(cfg)
    for model in (ours, theirs):
        initialise(model, 0, zero_std=0.05)
    base, delta = (bare(at_width(cfg, width)) for width in (16, 48))
    set_base_shapes(theirs, base, delta=delta, rescale_params=False, do_assert=False)
    kinds = [[p for p in theirs.parameters() if (p.ndim > 1) == matrix] for matrix in (True, False)]
    optim = OptimConfig(lr=1e-2, weight_decay=0.1, betas=(0.9, 0.95))
    decays = ((kinds[0], optim.weight_decay), (kinds[1], 0.0))
    package = MuAdamW(
        [{"params": parameters, "weight_decay": decay} for parameters, decay in decays],
        lr=optim.lr,
        betas=optim.betas,
        fused=True,
    )
    pieces = {key: piece(parameter) for key, parameter in ours.named_parameters()}
    adamw = AdamW(optim, pieces, factors(cfg))
    for _ in range(3):
        gradients = {key: torch.randn_like(value) for key, value in theirs.named_parameters()}
        for key, parameter in theirs.named_parameters():
            parameter.grad = gradients[key]
        package.step()
        flat = {key: value.flatten() for key, value in gradients.items()}
        used = adamw.step(flat, 1.0, torch.tensor(1.0), torch.tensor(False))
        assert used == optim.lr
    for key, parameter in theirs.named_parameters():
        assert torch.equal(ours.get_parameter(key), parameter), key


def piece(parameter: nn.Parameter) -> Piece:
    shape = tuple(parameter.shape)
    box = Box(shape, (0,) * len(shape), shape)
    return Piece(parameter.data.view(-1), Extent(box, 0, parameter.numel()))


@every_family
def test_the_standard_parametrisation_is_untouched(name: str) -> None:
    tree = {
        "model": TREES[name] | SHAPE | {"learn_sigma": False},
        "objective": {"kind": "flow"},
        "data": {"path": "none", "global_batch": 8},
        "schedule": {"kind": "constant"},
        "steps": 1,
        "run_dir": "none",
    }
    chosen = config.validate(tree | {"parametrisation": "mup"}).model
    assert chosen.mup is not None
    with pytest.raises(
        config.ConfigError, match="which has no use for it; set parametrisation=mup"
    ):
        config.validate(tree)
    cfg = config.validate(tree | {"parametrisation": "standard"}).model
    assert cfg.mup is None
    plain = {key: value for key, value in tree["model"].items() if key != "mup"}
    assert cfg == read(plain)
    declared = {
        f"{prefix}.{own}" if prefix else own: module.inits[own]
        for prefix, module in bare(cfg).named_modules()
        for own, _ in module.named_parameters(recurse=False)
    }
    assert rules(cfg) == {key: Rule(None, init) for key, init in declared.items()}
    assert set(factors(cfg).values()) == {(1.0, 1.0)}
    assert cfg.readout_scale == 1.0
    x = torch.randn(2)
    assert times(x, 1.0) is x
    one, other = build(cfg), bare(cfg).to_empty(device="cpu")
    initialise(one, 3)
    initialise(other, 3)
    for key, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key


@pytest.mark.parametrize(
    ("tree", "change", "said"),
    [
        ("dit", {"depth": 3}, "model.depth is 2 in the proxy and 3 in the target"),
        ("dit", {"num_heads": 4}, "model.head_dim (channels of a head) is 8"),
        ("dit", {"patch": 1}, "model.patch is 2"),
        ("dit", {"family": "dit-moe", "moe": {"experts": 4}}, "model.family is dit"),
        ("dit", {"in_channels": 8}, "model.in_channels is 4"),
        ("dit", {"mlp_ratio": 2.0}, "model.mlp_ratio is 4.0"),
        ("dit", {"mup": {"base_width": 32}}, "model.mup.base_width is 16"),
        ("dit-moe", {"moe": {"experts": 8}}, "model.moe.experts is 4"),
        ("dit-moe", {"moe": {"experts": 4, "top_k": 1}}, "model.moe.top_k is 2"),
        ("dit-moe", {"qk_norm": False}, "model.qk_norm is True"),
        ("udit", {"depth": [1, 1, 2, 1, 1]}, "model.depth is [1, 1, 1, 1, 1]"),
        ("udit", {"num_heads": 4}, "model.head_dim (channels of a head, enc1) is 8"),
        ("udit", {"adaln_lora": 4}, "model.adaln_lora is None"),
        ("udit-moe", {"moe": None}, "model.moe.experts is 4 in the proxy and None"),
        ("udit-moe", {"head_dim": 4}, "model.head_dim (channels of a head, enc1) is 8"),
    ],
)
def test_what_is_no_family_is_refused_by_name(
    tree: str, change: dict[str, object], said: str
) -> None:
    target = read(TREES[tree] | SHAPE | change)
    for proxy in (BASE[tree], at_width(BASE[tree], 32)):
        with pytest.raises(MupError) as caught:
            check_family(proxy, target)
        assert said in str(caught.value)


def test_what_is_a_family_is_none_of_the_refused() -> None:
    small, large = (read({"family": "udit", "size": size}) for size in "SL")
    check_family(small, large)
    assert at_width(small, 384) == large.model_copy(update={"size": None})
    for name, cfg in BASE.items():
        for width in (8, 16, 64):
            other = at_width(cfg, width)
            assert (other.width, rules(other).keys()) == (width, rules(cfg).keys()), name
            check_family(other, cfg)
    deep = {"mup": {"base_width": 16, "base_depth": 2}, "depth": 8}
    tree = TREES["dit"] | SHAPE | deep
    check_family(read(tree | {"depth": 2}), read(tree))
    static = {"experts": 4, "stages": ["enc2", "latent"], "dispatcher": "static"}
    check_family(BASE["udit-moe"], read(TREES["udit-moe"] | SHAPE | {"moe": static}))


@pytest.mark.parametrize(
    ("name", "width", "said"),
    [
        ("dit", 20, "width=20 is no width of this model's family, which are the multiples of 8"),
        ("dit", 0, "(2 of them make 16); use such as 8"),
        ("udit-moe", 12, "the multiples of 8"),
        ("udit", -8, "width=-8"),
    ],
)
def test_a_width_between_the_heads_is_refused(name: str, width: int, said: str) -> None:
    with pytest.raises(MupError) as caught:
        at_width(BASE[name], width)
    assert said in str(caught.value)


PROXIES = {
    "proxy_dit": ("dit_xl2_in256", 288, ["model.width=144"]),
    "proxy_udit": ("udit_l_in256", 96, ["model.width=48", "model.num_heads=2"]),
    "proxy_udit_moe": ("udit_xl_moe", 128, ["model.width=256"]),
}
# What a proxy's file has otherwise: it is shorter, on fewer devices, and its rate is to be found.
OTHERWISE = {"model", "parametrisation", "run_dir", "steps", "optim", "schedule", "accum", "remat"}
OTHERWISE |= {"mesh"}


@pytest.mark.parametrize("proxy", PROXIES)
def test_a_shipped_proxy_is_its_flagship_at_another_width(proxy: str) -> None:
    target, base, other_width = PROXIES[proxy]
    small, narrow = (config.load(f"configs/{proxy}.yaml", words) for words in ([], other_width))
    switch = ["parametrisation=mup", f"model.mup.base_width={base}"]
    large = config.load(f"configs/{target}.yaml", switch)
    assert small.model.width == base
    for one in (small, narrow):
        check_family(one.model, large.model)
    ours, theirs = (cfg.model_dump(exclude=OTHERWISE) for cfg in (small, large))
    assert ours == theirs
    assert small.optim == large.optim.model_copy(update={"lr": small.optim.lr})
    assert type(small.schedule) is type(large.schedule)
    plain = config.load(f"configs/{target}.yaml", [])
    assert config.load(f"configs/{target}.yaml", [switch[1], "parametrisation=standard"]) == plain


def test_experts_that_do_not_grow_are_refused() -> None:
    cfg = read(TREES["udit-moe"] | SHAPE | {"moe": {"experts": 4, "hidden_ratio": 0.001}})
    with pytest.raises(MupError, match=r"latent.* has the shape .* must grow with the width"):
        rules(cfg)


def test_experts_of_fixed_size_are_no_family() -> None:
    cfg = read(TREES["dit-moe"] | SHAPE | {"moe": {"experts": 4, "hidden": 8}})
    with pytest.raises(MupError, match="model.moe.hidden=8 stays .* set model.moe.hidden_ratio"):
        at_width(cfg, 32)
