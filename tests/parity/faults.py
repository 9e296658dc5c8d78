"""Faults planted on rank 1 of a run; the parity table must see each of them."""

import os

import torch

from tests import ranks

# fault → the model and the layout in which it is planted
FAULTS = {
    "expert output doubled": ("udit-moe", "ep2"),
    "two experts swapped": ("dit-moe", "ep2"),
    "head order reversed": ("dit", "tp2"),
    "gradient of one rank dropped": ("dit", "dp2"),
    "rates of one rank without muP": ("dit-moe+mup", "ep2"),
}


def train(fault: str, *words: str) -> None:
    """`pretrain …` in a rank, with a fault on rank 1, or with none for an empty name."""
    if fault and os.environ["RANK"] == "1":
        {
            "expert output doubled": _doubled,
            "two experts swapped": _swapped,
            "head order reversed": _reversed,
            "gradient of one rank dropped": _dropped,
            "rates of one rank without muP": _equal_rates,
        }[fault]()
    ranks.pretrain(*words)


def _doubled() -> None:
    from pretrain.models import moe

    honest = moe.Experts.forward

    def forward(self, rows, counts):  # type: ignore[no-untyped-def]
        out = honest(self, rows, counts)
        first = (torch.arange(len(rows)) < counts[0]).to(out.dtype)
        return out * (1 + first[:, None])

    moe.Experts.forward = forward  # type: ignore[method-assign]


def _swapped() -> None:
    from pretrain.models import moe

    honest = moe.grouped

    def grouped(rows, weight, *args):  # type: ignore[no-untyped-def]
        return honest(rows, torch.cat([weight[1:2], weight[:1], weight[2:]]), *args)

    moe.grouped = grouped


def _reversed() -> None:
    from pretrain.models import attention

    honest = attention.attend

    def attend(*args):  # type: ignore[no-untyped-def]
        return honest(*args).flip(1)

    attention.attend = attend


def _dropped() -> None:
    from parallel import fsdp

    honest = fsdp.FSDP.backward

    def backward(self, loss, *, last):  # type: ignore[no-untyped-def]
        honest(self, loss * 0.0, last=last)

    fsdp.FSDP.backward = backward  # type: ignore[method-assign]


def _equal_rates() -> None:
    from pretrain import state

    honest = state.factors
    state.factors = lambda cfg: dict.fromkeys(honest(cfg), (1.0, 1.0))
