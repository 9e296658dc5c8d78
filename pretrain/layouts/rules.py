"""The small language in which other programs' weight files are described.

A layout is a list of rules, and a rule says: these keys of theirs are these tensors of ours, by one
pure function each way. Rules are applied one at a time, so a model is never held whole. Not here:
files, and which configurations a layout can hold.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]
Change = Callable[[Sequence[Tensor]], list[Tensor]]
TABLE_TOLERANCE = 1e-5  # of a table that we compute ourselves


class WeightsError(ValueError):
    """Weights that do not fit: what came, what was expected, what to change."""


@dataclass(frozen=True)
class Rule:
    """Keys of theirs that hold what tensors of ours hold."""

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    write: Change  # tensors of ours -> tensors of theirs; works on meta too
    read: Change  # tensors of theirs -> tensors of ours


Layout = list[Rule]


@dataclass
class Guess:
    """A model's configuration as far as the shapes of a file tell it."""

    values: dict[str, Any]
    assumed: dict[str, str] = field(default_factory=dict)  # what they do not tell, and why so
    sizes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # published ones by name


def _each(change: Callable[[Tensor], Tensor]) -> Change:
    return lambda tensors: [change(tensor) for tensor in tensors]


def same(theirs: str, ours: str) -> Rule:
    """Another name."""
    return Rule((theirs,), (ours,), list, list)


def module(theirs: str, ours: str, *, bias: bool = True) -> Layout:
    """Weight and bias of a module under other names."""
    parts = ("weight", "bias") if bias else ("weight",)
    return [same(f"{theirs}.{part}", f"{ours}.{part}") for part in parts]


def readout(theirs: str, ours: str, scale: float) -> Layout:
    """The last layer, whose input is multiplied by `scale` here and in no layout of others: their
    weight holds the scale."""
    if scale == 1.0:
        return module(theirs, ours)
    weight = Rule(
        (f"{theirs}.weight",),
        (f"{ours}.weight",),
        _each(lambda tensor: tensor * scale),
        _each(lambda tensor: tensor.float() / scale),
    )
    return [weight, same(f"{theirs}.bias", f"{ours}.bias")]


def kernel(theirs: str, ours: str, inner: Shape) -> Rule:
    """Their convolution (O, *inner) is our linear, its columns flattened; inner: (I, k, k)."""
    return Rule(
        (theirs,),
        (ours,),
        _each(lambda tensor: tensor.reshape(-1, *inner)),
        _each(lambda tensor: tensor.flatten(1)),
    )


def per_head(theirs: str, ours: str) -> Rule:
    """Their (heads, 1, 1) is our (heads,)."""
    return Rule(
        (theirs,),
        (ours,),
        _each(lambda tensor: tensor[:, None, None]),
        _each(lambda tensor: tensor.flatten()),
    )


def fused(theirs: str, ours: Sequence[str]) -> Rule:
    """Their one tensor is ours one after the other in dim 0, in equal parts."""
    return Rule(
        (theirs,),
        tuple(ours),
        lambda tensors: [torch.cat(list(tensors))],
        lambda tensors: list(tensors[0].chunk(len(ours))),
    )


def stacked(theirs: Sequence[str], ours: str) -> Rule:
    """Their tensors are the rows of our one, (E, …)."""
    return Rule(
        tuple(theirs),
        (ours,),
        lambda tensors: list(tensors[0].unbind()),
        lambda tensors: [torch.stack(list(tensors))],
    )


def copied(theirs: Sequence[str], ours: str) -> Rule:
    """Each of theirs is ours. Reading raises WeightsError unless they are all equal."""

    def read(tensors: Sequence[Tensor]) -> list[Tensor]:
        for key, tensor in zip(theirs, tensors, strict=True):
            if not torch.equal(tensor, tensors[0]):
                raise WeightsError(f"{key} is not equal to {theirs[0]}; here one tensor is both")
        return [tensors[0]]

    return Rule(tuple(theirs), (ours,), lambda tensors: [tensors[0]] * len(theirs), read)


def table(theirs: str, make: Callable[[], Tensor]) -> Rule:
    """Their stored table that we compute. Reading raises WeightsError if it is another one."""

    def read(tensors: Sequence[Tensor]) -> list[Tensor]:
        (found,), true = tensors, make()
        # why: a table stored in 16 bit is the right one as far as these bits go.
        allowed = max(TABLE_TOLERANCE, torch.finfo(found.dtype).eps)
        off = (found.double() - true.double()).abs().max().item()
        if not off <= allowed:
            raise WeightsError(
                f"{theirs} is not the table that this model computes (off by {off:.3g}, allowed "
                f"{allowed:.3g}); learned or moved positions are another model"
            )
        return []

    return Rule((theirs,), (), lambda _: [make()], read)


def unused(ours: str, size: int) -> Rule:
    """A vector of ours that the other form does not have: zeros. Writing raises WeightsError
    if it is anything else."""

    def write(tensors: Sequence[Tensor]) -> list[Tensor]:
        if not tensors[0].is_meta and tensors[0].count_nonzero():
            raise WeightsError(f"{ours} is not zero, and this layout has no place for it")
        return []

    return Rule((), (ours,), write, lambda _: [torch.zeros(size)])


def keys(layout: Layout, ours: Shapes) -> dict[str, Shape]:
    """Shape of every key of theirs, in order of the layout; ours: the shapes of our tensors."""
    found: dict[str, Shape] = {}
    for rule in layout:
        tensors = [torch.empty(ours[name], device="meta") for name in rule.ours]
        for key, tensor in zip(rule.theirs, rule.write(tensors), strict=True):
            found[key] = tuple(tensor.shape)
    return found


def check(expected: Shapes, found: Shapes, where: str, advice: str) -> None:
    """Raises WeightsError naming every missing key, every unexpected one and every other shape."""
    missing = [key for key in expected if key not in found]
    unexpected = [key for key in found if key not in expected]
    shapes = [
        f"{key}: {list(found[key])}, expected {list(expected[key])}"
        for key in expected
        if key in found and tuple(found[key]) != tuple(expected[key])
    ]
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    if not any(kinds.values()):
        return
    lines = [f"{where} does not fit: " + ", ".join(f"{len(v)} {k}" for k, v in kinds.items() if v)]
    for kind, names in kinds.items():
        lines += [f"  {kind}: {name}" for name in names]
    raise WeightsError("\n".join([*lines, advice]))


def need(found: Shapes, wanted: Mapping[str, int], where: str) -> None:
    """Raises WeightsError unless the keys from which a configuration is read are there.

    wanted: number of dims by key.
    """
    wrong = [
        f"  {key}: {list(found[key]) if key in found else 'missing'}, expected {dims} dims"
        for key, dims in wanted.items()
        if len(found.get(key, ())) != dims
    ]
    if wrong:
        raise WeightsError(
            "\n".join([f"the configuration cannot be read from {where}:", *wrong])
            + "\ngive --config, or the --family that this file is of"
        )


def count(names: Iterable[str], prefix: str) -> int:
    """How many numbered parts `PREFIX.i.` the keys speak of: the largest i, and one."""
    pattern = re.compile(re.escape(prefix) + r"\.(\d+)\.")
    return max((int(m[1]) + 1 for m in map(pattern.match, names) if m), default=0)
