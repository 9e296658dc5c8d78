"""muP: how each parameter's start, learning rate and decay follow from the model's width.

Which dims of a parameter grow is told by the shapes of three models of one family, through the
`mup` package. Everything is keyed by the parameter's full name, before any cut. Models apply the
forward multipliers by themselves, from numbers their config derives (`readout_scale`,
`residual_scale`); a rule restates the readout's. Not here: the optimizer.

| parameter                                  | start            | lr  | decay | multiplier        |
|--------------------------------------------|------------------|-----|-------|-------------------|
| hidden: fan_in and fan_out grow            | N(0, 1/fan_in)   | 1/m | m     | 1                 |
| input-like: only fan_out grows             | N(0, 1/fan_in)   | 1   | 1     | 1                 |
| label table                                | N(0, 1)          | 1   | 1     | 1                 |
| adaLN, hidden too, if it keeps its zero    | 0                | 1/m | m     | 1                 |
| readout: the last linear or convolution    | 0                | 1   | 1     | output_mult/m     |
| router                                     | N(0, 0.1²/fan_in)| 1/m | m     | 1                 |
| router's time term                         | 0                | 1/m | m     | 1                 |
| depthwise k×k                              | N(0, 1/k²)       | 1   | 1     | 1                 |
| bias, qk-norm, cosine scale                | as declared      | 1   | 1     | 1                 |

m: this parameter's fan_in ÷ that at `base_width`. An expert is hidden, the number of experts a
finite dim. Of three parallel depthwise kernels each has a third of the variance, so that their
merged sum has that of one. adaLN is hidden. The published muP for DiT gives adaLN-Zero up, and so
do DiT and DiT-MoE here unless `adaln_zero` says otherwise. U-DiT keeps it: with gates of full size
from the first step on, its tokens explode at rates at which it otherwise learns best (LOG.md).

With a `base_depth`, s = sqrt(base_depth/depth) multiplies what blocks add to the tokens and all
learning rates inside of them (decay: 1/s): the sum of more blocks is, and moves, of one size.

Where this is not what the package says, and why:
- Router (growing fan_in, finite fan_out, no readout). The package would have the learning rate 1, a
  multiplier 1/m and a start that shrinks the logits by sqrt(m). Adam's updates move the logits
  equally in both; here they start of one size at every width, so that routing starts alike. That
  size is small because the gradient that comes through this matrix (an auxiliary loss has no other
  way) moves the tokens along its rows, and with them the logits by its size times sqrt(fan_in): at
  0.1 the router's own updates are far above that, at 1 they are not (LOG.md).
- Depthwise kernels. The package gives learning rate 1 as here, but leaves the start as it was:
  xavier's fan_out holds the width, so the kernels would vanish as it grows.
- Cosine scale: one number a head. Learning rate 1 as in the package; q and k are normalised over a
  head_dim that never grows, so the start and the logits know no width.
Source: Yang et al., Tensor Programs V, table 8, and VI (depth); Zheng et al., Scaling Diffusion
Transformers Efficiently via muP.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from pydantic import ValidationError
from torch import nn

from pretrain.models.families import Model, ModelConfig, build_form
from pretrain.models.init import Init, Normal, Zero
from pretrain.models.layers import Block, Depthwise, LabelTable
from pretrain.models.moe import Router
from pretrain.models.rep import Kernels
from pretrain.models.udit import STAGES, UDiTConfig

Kind = Literal["hidden", "input", "table", "readout", "router", "depthwise", "vector"]
# What a proxy may have otherwise than its target: how a width is said, and what no trained number
# of a model knows.
_FREE = {"size", "width", "num_heads", "head_dim", "zero_init_std", "moe.dispatcher"}
_FREE |= {"moe.capacity"}
_ROUTER = 0.1  # size of its logits at the start


class MupError(ValueError):
    """Models that are no width family: what came, what was expected, what to change."""


@dataclass(frozen=True)
class Rule:
    """What one parameter is given."""

    kind: Kind | None  # null: standard parametrisation
    init: Init
    lr: float = 1.0  # multiplies AdamW's learning rate
    decay: float = 1.0  # multiplies AdamW's weight decay
    multiplier: float = 1.0  # of what the parameter's layer reads


@lru_cache(maxsize=8)
def rules(cfg: ModelConfig) -> Mapping[str, Rule]:
    """The rule of every parameter, by name.

    In the standard parametrisation every factor is 1 and every start the declared one. Raises
    MupError if base_width is no width of this family.
    """
    with torch.device("meta"):
        model = build_form(cfg, "trained")
    if cfg.mup is None:
        return {name: Rule(None, m.inits[own]) for name, m, own, _ in _parameters(model)}
    with torch.device("meta"):
        base, delta = (
            build_form(at_width(cfg, n * cfg.mup.base_width, "model.mup.base_width"), "trained")
            for n in (1, 2)
        )
    from mup.shape import set_base_shapes  # perf: pandas and seaborn come with it, seconds a rank

    set_base_shapes(model, base, delta=delta, rescale_params=False, do_assert=False)
    parallel = {m for k in model.modules() if isinstance(k, Kernels) for m in k.children()}
    blocks = {m for k in model.modules() if isinstance(k, Block) for m in k.modules()}
    keep_zero = cfg.keeps_adaln_zero if cfg.mup.adaln_zero is None else cfg.mup.adaln_zero
    found: dict[str, Rule] = {}
    for name, module, own, parameter in _parameters(model):
        kind = _kind(name, module, parameter, readout=name.startswith(f"{model.readout}."))
        declared, summed = module.inits[own], 3 if module in parallel else 1
        init = _start(kind, declared, parameter.shape, summed, keep_zero=keep_zero)
        scale = cfg.readout_scale if kind == "readout" else 1.0
        depth = cfg.residual_scale if module in blocks else 1.0
        adamw = _adamw(kind, parameter.infshape.width_mult(), depth)
        found[name] = Rule(kind, init, *adamw, scale)
    return found


def factors(cfg: ModelConfig) -> dict[str, tuple[float, float]]:
    """What multiplies AdamW's learning rate and weight decay, by parameter name."""
    return {name: (rule.lr, rule.decay) for name, rule in rules(cfg).items()}


def declare(model: Model, cfg: ModelConfig) -> None:
    """Has each parameter of a model that is not cut declare its start under muP, in place; nothing
    in the standard parametrisation."""
    if cfg.mup is None:
        return
    chosen = rules(cfg)
    for name, module, own, _ in _parameters(model):
        module.inits[own] = chosen[name].init


def at_width(cfg: ModelConfig, width: int, key: str = "width") -> ModelConfig:
    """The same model at another width: more or fewer heads of the same channels.

    key: what a message calls the width. Raises MupError if no member of this family has it.
    """
    if width == cfg.width:
        return cfg
    moe = getattr(cfg, "moe", None)
    if moe is not None and moe.hidden is not None:
        raise MupError(
            f"model.moe.hidden={moe.hidden} stays when the width changes, and experts must grow "
            "with it; set model.moe.hidden_ratio instead"
        )
    unit = _unit(cfg)
    if width < 1 or width % unit:
        near = max(1, round(width / unit)) * unit
        raise MupError(
            f"{key}={width} is no width of this model's family, which are the multiples of {unit} "
            f"({cfg.width // unit} of them make {cfg.width}); use such as {near}"
        )
    values = cfg.model_dump() | {"size": None, "width": width}
    if cfg.num_heads is not None:
        values["num_heads"] = cfg.num_heads * width // cfg.width
    try:
        return type(cfg).model_validate(values)
    except ValidationError as error:
        reason = str(error.errors()[0]["msg"]).removeprefix("Value error, ")
        raise MupError(f"{key}={width} is no width of this model's family: {reason}") from error


def check_family(proxy: ModelConfig, target: ModelConfig) -> None:
    """Raises MupError, naming the key, unless the two differ in width alone.

    Depth may differ too where both have one mup.base_depth.
    """
    ours, theirs = _fixed(proxy), _fixed(target)
    for key in dict.fromkeys((*ours, *theirs)):
        one, other = ours.get(key), theirs.get(key)
        if one != other:
            raise MupError(
                f"model.{key} is {one} in the proxy and {other} in the target, which are a family "
                "only if nothing but the width differs; make the two equal"
            )
    at_width(proxy, target.width, "the target's model.width")


def _parameters(model: nn.Module) -> Iterator[tuple[str, Any, str, Any]]:
    """Full name, module, name in the module, parameter."""
    for prefix, module in model.named_modules():
        for own, parameter in module.named_parameters(recurse=False):
            yield f"{prefix}.{own}" if prefix else own, module, own, parameter


def _kind(name: str, module: nn.Module, parameter: Any, *, readout: bool) -> Kind:
    """name: for messages."""
    shape = parameter.infshape
    if isinstance(module, LabelTable):
        return "table"
    if parameter.ndim < 2:
        return "vector"
    if isinstance(module, Depthwise):
        return "depthwise"
    if shape.ninf() == 2:
        return "hidden"
    if readout:
        return "readout"
    if isinstance(module, Router):
        return "router"
    if [dim.isinf() for dim in shape] != [True] + [False] * (len(shape) - 1):
        raise MupError(
            f"{name} has the shape {tuple(parameter.shape)} in every width of this family; it must "
            "grow with the width (model.moe.hidden_ratio too small?)"
        )
    return "input"


def _start(
    kind: Kind, declared: Init, shape: torch.Size, parallel: int, *, keep_zero: bool
) -> Init:
    """parallel: how many kernels are summed to one. keep_zero: of adaLN."""
    if kind == "vector" or (kind == "router" and isinstance(declared, Zero)):
        return declared
    if kind == "hidden" and isinstance(declared, Zero) and keep_zero:
        return declared
    if kind == "table":
        return Normal(1.0)
    if kind == "readout":
        return Zero()
    # why: (E, out, in) of experts; all others are (out, in, ...).
    fan_in = math.prod(shape[2:] if len(shape) == 3 else shape[1:])
    size = _ROUTER if kind == "router" else 1.0
    return Normal(size / math.sqrt(parallel * fan_in))


def _adamw(kind: Kind, ratio: float, depth: float) -> tuple[float, float]:
    """AdamW's column of the table: what multiplies learning rate and decay. ratio: m; depth: s.

    Another optimizer is another function like this one. Decay is multiplied so that learning rate
    times decay, by which AdamW shrinks weights, knows neither width nor depth.
    """
    narrower = ratio if kind in ("hidden", "router") else 1.0
    return depth / narrower, narrower / depth


def _unit(cfg: ModelConfig) -> int:
    """The number that every width of this family is a multiple of."""
    heads = cfg.num_heads
    channels = cfg.width // heads if heads is not None else cfg.head_dim
    assert channels is not None, "a config has heads or their channels"
    if isinstance(cfg, UDiTConfig):
        return math.lcm(channels, 2, cfg.adaln_lora or 1)
    return math.lcm(channels, 4)


def _fixed(cfg: ModelConfig) -> dict[str, Any]:
    """What all members of a family share, by key."""
    values = cfg.model_dump(mode="json")
    flat = {"family": values.pop("family")}
    for key, value in values.items():
        inner = value if isinstance(value, dict) else None
        flat |= {key: value} if inner is None else {f"{key}.{k}": v for k, v in inner.items()}
    flat = {key: value for key, value in flat.items() if key not in _FREE}
    if cfg.mup is not None and cfg.mup.base_depth is not None:
        flat.pop("depth")
    if isinstance(cfg, UDiTConfig):
        dims = {s: cfg.stage_width(s) // cfg.stage_heads(s) for s in STAGES}
        return flat | {f"head_dim (channels of a head, {s})": dim for s, dim in dims.items()}
    return flat | {"head_dim (channels of a head)": cfg.width // cfg.num_heads}
