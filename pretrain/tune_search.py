"""What a search tries and what its losses say: ranges, points, and whether the best one transfers.

Pure values: starts nothing, knows no config and no directory.
"""

import math
import random
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from statistics import fmean
from typing import Any, Literal

Value = int | float | str
Point = tuple[Value, ...]  # one value a parameter
Losses = Mapping[Point, Sequence[float]]  # of one width, by seed; inf: diverged

RANGE = re.compile(r"(log|lin):(.+?)\.\.(.+?)(?::([^:]*))?")
HOW = "write log:2^-13..2^-7 (factors of 2), log:1e-4..1e-2:5, lin:0..1:5 or a list a,b,c"

# What no search is over, and what to do instead.
_OTHER = "losses of other lengths or other data cannot be compared; run a search for each"
_WIDTH = "give --widths"
NOT_SEARCHED = {
    "run_dir": "give --out",
    "seed": "give --seeds",
    "threads": "it changes no loss",
    "parametrisation": "run a search for each",
    "steps": _OTHER,
    "data.path": _OTHER,
    "data.split": _OTHER,
    "model.size": _WIDTH,
    "model.width": _WIDTH,
    "model.num_heads": _WIDTH,
    "model.head_dim": "it is that of the family",
    "model.mup.base_width": "it is that of the family",
    "model.mup.base_depth": "it is that of the family",
}


class TuneError(ValueError):
    """A search that cannot be made: what came, what was expected, what to change."""


@dataclass(frozen=True)
class Space:
    """The values of one parameter, and the range they come from."""

    key: str
    text: str
    kind: Literal["log", "lin", "list"]
    values: Point  # of the grid; none for a range that is only drawn from
    ends: tuple[float, float] | None  # null: a list

    def draw(self, u: float) -> Value:
        """The value at u in [0, 1), of six digits, so that a name can state it."""
        if self.ends is None:
            return self.values[int(u * len(self.values))]
        low, high = self.ends
        if self.kind == "log":
            return _plain(float(f"{low * (high / low) ** u:.6g}"))
        return _plain(float(f"{low + (high - low) * u:.6g}"))


def space(word: str, *, grid: bool = True) -> Space:
    """Reads KEY=SPACE. grid: the values are wanted, not the range alone. Raises TuneError."""
    key, mark, text = word.partition("=")
    key, text = key.strip(), text.strip()
    if not (key and mark and text):
        raise TuneError(f"--param {word!r} is not KEY=SPACE; {HOW}")
    if not text.startswith(("log:", "lin:")):
        values = tuple(_value(item.strip(), word) for item in text.split(","))
        if len(set(values)) < len(values):
            raise TuneError(f"--param {word}: a value is there twice; name each once")
        return Space(key, text, "list", values, None)
    match = RANGE.fullmatch(text)
    if match is None:
        raise TuneError(f"--param {word}: {text!r} is no range; {HOW}")
    low, high = (_number(end, word) for end in match.group(2, 3))
    if not low < high:
        raise TuneError(f"--param {word}: the range begins at {low:g} and must end above it")
    count = None if match[4] is None else _count(match[4], word)
    if count is not None and not grid:
        raise TuneError(f"--param {word}: --random draws from the whole range; leave :{count} out")
    if match[1] == "lin":
        values = _linear(low, high, count, word, grid=grid)
        return Space(key, text, "lin", values, (low, high))
    if low <= 0:
        raise TuneError(f"--param {word}: log of {low:g}; begin above 0, or write lin:A..B:N")
    return Space(key, text, "log", _factors(low, high, count, word, grid=grid), (low, high))


def check_keys(spaces: Sequence[Space], overrides: Sequence[str], parametrisation: str) -> None:
    """Raises TuneError for a parameter that no search is over. overrides: key=value."""
    given = {word.partition("=")[0] for word in overrides}
    for key, times in Counter(one.key for one in spaces).items():
        if key in NOT_SEARCHED:
            raise TuneError(f"--param {key} is no parameter of a search: {NOT_SEARCHED[key]}")
        if times > 1 or key in given:
            raise TuneError(f"--param {key} is there twice, or {key} is set too; leave one out")
        if key.startswith("model.mup.") and parametrisation == "standard":
            raise TuneError(
                f"--param {key}: parametrisation=standard has no use for it; set "
                "parametrisation=mup, or leave it out"
            )


def _factors(low: float, high: float, count: int | None, word: str, *, grid: bool) -> Point:
    if count is not None:
        inner = (low * (high / low) ** (i / (count - 1)) for i in range(1, count - 1))
        return tuple(map(_plain, (low, *(float(f"{value:.6g}") for value in inner), high)))
    doublings = math.log2(high / low)
    if grid and not math.isclose(doublings, round(doublings), abs_tol=1e-9):
        near = low * 2.0 ** max(1, round(doublings))
        raise TuneError(
            f"--param {word}: {high:g} is not {low:g} times a power of 2; end at {near:g}, or give "
            "a number of points as log:A..B:N"
        )
    return tuple(_plain(low * 2.0**i) for i in range(round(doublings) + 1)) if grid else ()


def _linear(low: float, high: float, count: int | None, word: str, *, grid: bool) -> Point:
    if count is None:
        if grid:
            raise TuneError(f"--param {word}: how many points? write lin:{low:g}..{high:g}:5")
        return ()
    inner = (low + (high - low) * i / (count - 1) for i in range(1, count - 1))
    return tuple(map(_plain, (low, *(float(f"{value:.6g}") for value in inner), high)))


def _count(text: str, word: str) -> int:
    if not text.isdecimal() or int(text) < 2:
        raise TuneError(f"--param {word}: {text!r} points; expected a whole number of at least 2")
    return int(text)


def _number(text: str, word: str) -> float:
    """Of 0.5, 1e-4 or 2^-9."""
    base, mark, exponent = text.strip().partition("^")
    try:
        number = float(base) ** float(exponent) if mark else float(base)
    except (ValueError, OverflowError, ZeroDivisionError):
        number = math.nan
    if isinstance(number, complex) or not math.isfinite(number):
        raise TuneError(f"--param {word}: {text!r} is no number; write such as 0.5, 1e-4 or 2^-9")
    return number


def _value(text: str, word: str) -> Value:
    if not text or len(text.split()) != 1:
        raise TuneError(f"--param {word}: {text!r} in a list; expected values without blanks")
    try:
        return _plain(_number(text, word))
    except TuneError:
        return text


def _plain(number: float) -> Value:
    """Why: 32 is a batch, 32.0 is none."""
    return int(number) if number.is_integer() and abs(number) < 2**53 else number


def grid(spaces: Sequence[Space]) -> list[Point]:
    """All combinations, a coarser grid before its finer one, so that a small budget sees it all."""
    points = list(product(*(one.values for one in spaces)))
    bits = len(points).bit_length()
    order = sorted(range(len(points)), key=lambda i: f"{i:0{bits}b}"[::-1])
    return [points[i] for i in order]


def drawn(spaces: Sequence[Space], count: int, seed: int) -> list[Point]:
    """Point i is a function of (seed, i) and its keys alone; of equal ones the first is kept."""

    def point(index: int) -> Point:
        sources = (random.Random(f"{seed}/{index}/{one.key}") for one in spaces)
        return tuple(one.draw(source.random()) for one, source in zip(spaces, sources, strict=True))

    return list(dict.fromkeys(point(index) for index in range(count)))


def name(width: int, spaces: Sequence[Space], point: Point, seed: int) -> str:
    """Of a trial, and of its run directory: letters, digits and _ . + - alone."""
    last = [one.key.rpartition(".")[2] for one in spaces]
    keys = last if len(set(last)) == len(last) else [one.key for one in spaces]
    said = [v if isinstance(v, str) else f"{v:.6g}" for v in point]
    parts = (f"{key}{value}" for key, value in zip(keys, said, strict=True))
    text = "-".join((f"w{width}", *parts, f"s{seed}"))
    return re.sub(r"[^A-Za-z0-9_.+-]", "_", text)


def loss_of(score: float | None) -> float:
    """A score to compare by: none is that of a trial which diverged."""
    return math.inf if score is None else score


def mean(losses: Iterable[float]) -> float:
    """inf if one seed diverged."""
    found = list(losses)
    return fmean(found) if all(map(math.isfinite, found)) else math.inf


def ranked(losses: Losses) -> list[Point]:
    """The points that did not diverge, the best first; those of more seeds before others."""
    finite = [point for point, own in losses.items() if own and math.isfinite(mean(own))]
    return sorted(finite, key=lambda point: (-len(losses[point]), mean(losses[point])))


def verdict(spaces: Sequence[Space], by_width: Mapping[int, Losses], *, gridded: bool) -> Any:
    """The best point of each width, and for one numeric parameter whether it transfers.

    factor: the best value of the widest model ÷ that of the narrowest; moves: steps between them
    on the grid, as far as it was tried; transfers: at most one, and neither is the first or last
    that was tried; wider_is_better: at the narrowest's best value each wider model has a lower
    loss, over the seeds that all have there. null where that cannot be said.
    """
    widths = sorted(by_width)
    tried = [
        sorted({point[i] for own in by_width.values() for point in own}, key=str)
        for i in range(len(spaces))
    ]
    firsts = {width: next(iter(ranked(by_width[width])), None) for width in widths}
    rows = []
    for width, point in firsts.items():
        own = by_width[width][point] if point is not None else []
        row: dict[str, Any] = {"width": width}
        keys = [one.key for one in spaces]
        row["values"] = dict(zip(keys, point, strict=True)) if point is not None else None
        row |= {"loss": mean(own) if own else None, "seeds": len(own)}
        row |= {"spread": max(own) - min(own) if len(own) > 1 else None}
        rows.append(row | {"at_edge": _edges(keys, tried, point) if gridded and point else []})
    found: dict[str, Any] = {"best": rows, "factor": None, "moves": None, "transfers": None}
    found |= {"transferred": None, "losses_there": None, "wider_is_better": None}
    first, last = firsts[widths[0]], firsts[widths[-1]]
    if len(widths) < 2 or len(spaces) > 1 or first is None:
        return found
    there = {width: list(by_width[width].get(first, [])) for width in widths}
    common = min(map(len, there.values()))
    if common:
        losses = {str(width): mean(own[:common]) for width, own in there.items()}
        order = list(losses.values())
        found |= {"transferred": first[0], "losses_there": losses}
        found["wider_is_better"] = all(a > b for a, b in zip(order, order[1:], strict=False))
    if last is None or isinstance(first[0], str) or isinstance(last[0], str):
        return found
    found["factor"] = last[0] / first[0] if first[0] else None
    if gridded and (steps := _numbers(tried[0])):
        moves = abs(steps.index(last[0]) - steps.index(first[0]))
        open_ended = rows[0]["at_edge"] or rows[-1]["at_edge"]
        found |= {"moves": moves, "transfers": False if moves > 1 else None if open_ended else True}
    return found


def _edges(keys: Sequence[str], tried: Sequence[Sequence[Value]], point: Point) -> list[str]:
    """Keys whose best value is the first or last that was tried: the true one may lie outside."""
    ends = [(steps[0], steps[-1]) if (steps := _numbers(own)) else () for own in tried]
    return [key for key, v, two in zip(keys, point, ends, strict=True) if v in two]


def _numbers(values: Sequence[Value]) -> list[int | float]:
    """In order; none if one is a word."""
    found = [value for value in values if not isinstance(value, str)]
    return sorted(found) if len(found) == len(values) else []
