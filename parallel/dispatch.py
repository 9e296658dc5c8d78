"""The way of tokens to experts on other ranks and back, with one face and two dispatchers.

`Exact` drops nothing; the sizes of what is sent must reach the host, one wait a layer. To a
compiler they are unknown numbers: nothing may branch on how many rows came. `Static` sends buffers
of a fixed size and never waits; picks that do not fit are dropped and counted.
Without a drop both give the same numbers, whatever the number of ranks: the rows of an expert stand
in the order of ranks and, within a rank, of tokens.

Not here: who chooses the experts, and what an expert computes.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from parallel.clock import spending
from parallel.experts import Order, Picks, combine, order_by_expert, spread, take
from parallel.mesh import ALONE, Axis
from parallel.tensor import enter, gather, reduce, scatter

Experts = Callable[[Tensor, Tensor], Tensor]  # rows (R, D), counts (E_local or one more) -> (R, D)
Beside = Callable[[], Tensor]  # work to do while rows travel

_ROUND = 8  # rows; a static buffer is a multiple of it


class Dispatched(NamedTuple):
    out: Tensor  # (T, D): weighted sum of the experts' outputs
    beside: Tensor | None  # what `beside` gave
    dropped: Tensor  # () float32: picks of this data rank's tokens that no expert saw


class Dispatcher(Protocol):
    """Applies experts, which live on the ranks of an expert axis, to this rank's tokens.

    x: (T, D) and picks are whole and equal on the ranks of the tensor axis; T is a multiple of its
    size. Each of these ranks sends its own slice of tokens, so that no expert computes twice.
    experts: those of this rank, on rows in order of expert and how many each has, as `grouped_mm`
    takes them; with one count more, the last rows must come out as zeros.
    """

    def __call__(
        self, x: Tensor, picks: Picks, experts: Experts, beside: Beside | None
    ) -> Dispatched: ...


@dataclass(frozen=True)
class Exact:
    """Every pick reaches its expert."""

    num_experts: int  # of all ranks together
    ep: Axis = ALONE
    tp: Axis = ALONE

    def __call__(
        self, x: Tensor, picks: Picks, experts: Experts, beside: Beside | None
    ) -> Dispatched:
        x, picks = _own(x, picks, self.num_experts, self.tp)
        order = _order(picks, self.num_experts)
        dropped = torch.zeros((), device=x.device)
        if self.ep.size == 1:
            out, side = _here(x, picks, order, experts, beside)
        else:
            mine = order.counts[: self.num_experts].view(self.ep.size, -1)
            come = _exchange(mine, self.ep)
            # sync: the sizes of what is sent and of what comes, once a layer
            # why: as one copy; compiled code takes a list number by number, each a wait.
            sent, received = torch.stack([mine.sum(1), come.sum(1)]).to("cpu").tolist()
            if not isinstance(picks.lengths, int):
                picks, order = _first(picks, order, sum(sent))
            way = _Way(received, sent, self.ep)
            out, side = _there(x, picks, order, come, way, experts, beside)
        return Dispatched(gather(out, self.tp, 0), side, dropped)


@dataclass(frozen=True)
class Static:
    """Each rank takes at most `capacity` times its even share of a rank's picks; none waits.

    Over that, each expert of the rank loses in proportion, its last picks in order of token. What
    is dropped depends on the layout. All ranks must come with the same number of picks.
    """

    num_experts: int  # of all ranks together
    capacity: float  # buffer ÷ even share, at least 1
    ep: Axis = ALONE
    tp: Axis = ALONE

    def __call__(
        self, x: Tensor, picks: Picks, experts: Experts, beside: Beside | None
    ) -> Dispatched:
        expected = picks.experts.numel() // self.tp.size
        x, picks = _own(x, picks, self.num_experts, self.tp)
        order = _order(picks, self.num_experts)
        dropped = torch.zeros((), device=x.device)
        if self.ep.size == 1:
            out, side = _here(x, picks, order, experts, beside)
        else:
            counts = order.counts[: self.num_experts].view(self.ep.size, -1)
            room = self.room(expected, picks.experts.numel())
            kept = _fit(counts, room)
            dropped = reduce((counts.sum() - kept.sum()).float(), self.tp)
            mine = F.pad(kept, (0, 1))  # (ep, E_local + 1): the last are nobody's rows
            mine[:, -1] = room - kept.sum(1)
            order = _buffered(picks, order, kept, mine, room)
            even = [room] * self.ep.size
            come, way = _exchange(mine, self.ep), _Way(even, even, self.ep)
            out, side = _there(x, picks, order, come, way, experts, beside)
        return Dispatched(gather(out, self.tp, 0), side, dropped)

    def room(self, expected: int, most: int) -> int:
        """Rows of the buffer to one rank, of a rank that sends about `expected` and at `most`."""
        rows = min(math.ceil(self.capacity * expected / self.ep.size), most)
        return math.ceil(rows / _ROUND) * _ROUND


class _Way(NamedTuple):
    """Who sends how many rows to whom."""

    received: list[int]  # rows from each rank
    sent: list[int]  # rows to each rank
    ep: Axis

    def back(self) -> "_Way":
        return _Way(self.sent, self.received, self.ep)


def _own(x: Tensor, picks: Picks, num_experts: int, tp: Axis) -> tuple[Tensor, Picks]:
    """This rank's slice of the tokens, (T/tp, D), and its picks."""
    if tp.size == 1:
        return x, picks
    x = scatter(x, tp, 0)
    experts, weights, tokens, lengths = picks
    weights = enter(weights, tp)
    tokens = tokens - tp.rank * len(x)
    if isinstance(lengths, int):
        mine = slice(tp.rank * len(x) * lengths, (tp.rank + 1) * len(x) * lengths)
        return x, Picks(experts[mine], weights[mine], tokens[mine], lengths)
    # why: how many picks are ours is known on the device only. So all stay, ours turned to the
    # front, and the others become nobody's.
    start = lengths[: tp.rank * len(x)].sum()
    lengths = lengths[tp.rank * len(x) :][: len(x)]
    place = torch.arange(len(tokens), device=x.device)
    turned, back = (place + start) % len(tokens), (place - start) % len(tokens)
    ours = place < lengths.sum()
    experts = torch.where(ours, experts[turned], num_experts)
    tokens = torch.where(ours, tokens[turned], 0)
    return x, Picks(experts, take(weights, turned, back), tokens, lengths)


def _order(picks: Picks, num_experts: int) -> Order:
    """Picks whose number varies may have some that are nobody's: they are counted after the last
    expert.
    """
    varies = not isinstance(picks.lengths, int)
    return order_by_expert(picks.experts, num_experts + varies)


def _first(picks: Picks, order: Order, rows: int) -> tuple[Picks, Order]:
    """Without nobody's picks, which stand last in both."""
    experts, weights, tokens, lengths = picks
    picks = Picks(experts[:rows], weights[:rows], tokens[:rows], lengths)
    return picks, Order(order.forth[:rows], order.back[:rows], order.counts)


def _fit(counts: Tensor, room: int) -> Tensor:
    """How many of each expert's picks fit. counts: (ep, E_local) -> the same, rows sum ≤ room."""
    ends = counts.cumsum(1)
    total = ends[:, -1:]
    # why: cutting the ends in proportion gives whole numbers that sum to the room exactly.
    ends = ends * total.clamp(max=room) // total.clamp(min=1)
    return ends.diff(dim=1, prepend=torch.zeros_like(total))


def _buffered(picks: Picks, order: Order, kept: Tensor, mine: Tensor, room: int) -> Order:
    """The order of picks in one buffer a rank. kept: (ep, E_local); mine: (ep, E_local + 1)."""
    row_of, fits = _starts(order.counts), F.pad(kept.flatten(), (0, 1))  # (E or one more,)
    slots = _starts(mine.flatten()).view_as(mine)  # where an expert begins in the buffers
    slot_of = F.pad(slots[:, :-1].flatten(), (0, 1))
    nth = order.back - row_of[picks.experts]  # of its expert's picks
    has_row = nth < fits[picks.experts]
    back = torch.where(has_row, slot_of[picks.experts] + nth, 0)

    run, nth = _runs(mine.flatten(), room * len(mine))
    real = run % mine.shape[1] < kept.shape[1]
    rows = F.pad(row_of[: kept.numel()].view_as(kept), (0, 1)).flatten()[run] + nth
    forth = order.forth[torch.where(real, rows, 0)]
    return Order(forth, back, order.counts, real, has_row)


def _starts(lengths: Tensor) -> Tensor:
    """Where each of consecutive runs begins: (n,) -> (n,)."""
    return lengths.cumsum(0) - lengths


def _runs(lengths: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Of each of `size` places, the run it lies in and its place there. lengths: (n,), sum size."""
    place = torch.arange(size, device=lengths.device)
    run = torch.searchsorted(lengths.cumsum(0), place, right=True)
    return run, place - _starts(lengths)[run]


def _by_column(lengths: Tensor, size: int) -> Tensor:
    """The order that takes rows laid out as runs (a, b), row by row, to column by column.

    lengths: (A, B), summing to size. Returns (size,): the old place of each new row. That of
    `lengths.t()` is its inverse.
    """
    run, place = _runs(lengths.t().flatten(), size)
    return _starts(lengths.flatten()).view_as(lengths).t().flatten()[run] + place


def _here(
    x: Tensor, picks: Picks, order: Order, experts: Experts, beside: Beside | None
) -> tuple[Tensor, Tensor | None]:
    rows = experts(spread(x, picks, order), order.counts)
    return combine(rows, picks, order), beside() if beside else None


def _there(
    x: Tensor,
    picks: Picks,
    order: Order,
    come: Tensor,
    way: _Way,
    experts: Experts,
    beside: Beside | None,
) -> tuple[Tensor, Tensor | None]:
    """Rows to the ranks of their experts, through them, and back.

    come: (ep, E_local or one more), rows from each rank for each expert of this one.
    """
    sent, coming = _Start.apply(spread(x, picks, order), way)
    side = beside() if beside else None
    size = sum(way.received)
    forth, back = _by_column(come, size), _by_column(come.t(), size)
    rows = take(_Finish.apply(sent, coming, way), forth, back)
    rows = take(experts(rows, come.sum(0)), back, forth)
    rows = _Finish.apply(*_Start.apply(rows, way.back()), way.back())
    return combine(rows, picks, order), side


def _exchange(counts: Tensor, ep: Axis) -> Tensor:
    """Row i goes to rank i. (ep, n) -> (ep, n), a row from each rank."""
    one = [1] * ep.size
    return _wait(_all_to_all(counts, _Way(one, one, ep)))


def _all_to_all(x: Tensor, way: _Way) -> Tensor:
    """Starts an exchange of rows; its result may be read after `_wait`."""
    assert way.ep.group is not None
    with spending("communication"):  # dist: the expert axis
        return torch.ops._c10d_functional.all_to_all_single(
            x.contiguous(), way.received, way.sent, way.ep.group.group_name
        )


def _wait(x: Tensor) -> Tensor:
    with spending("communication"):
        return torch.ops._c10d_functional.wait_tensor(x)


class _Start(torch.autograd.Function):
    """With `_Finish`, an exchange of rows that goes on while other work runs, in both directions.

    Why two: backward runs `_Finish` first, which starts the way back of the gradient, then what
    forward ran between the two, then `_Start`, which waits. Between them the gradient belongs to
    what was sent, so that is handed on beside what comes.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, way: _Way) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        coming = _all_to_all(rows, way)
        ctx.mark_non_differentiable(coming)
        return rows.view_as(rows), coming

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _wait(grads[0]), None


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, sent: Tensor, coming: Tensor, way: _Way) -> Tensor:
        ctx.back = way.back()
        return _wait(coming)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _all_to_all(grads[0], ctx.back), None, None
