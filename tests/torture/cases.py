"""The cases: what is hurt, when, and where the same command goes on. All of it from one seed."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from tests.parity.table import BY_NAME, Layout
from tests.torture.hurts import Act, Hurt, Moment

STEPS, EVERY = 12, 4  # of a run; between its saves
Ending = Literal["one killed", "all killed", "asked", "failed"]

DP2, EP2, TP2 = BY_NAME["dp2"], BY_NAME["ep2"], BY_NAME["tp2"]
Z2, Z2_EP2 = BY_NAME["ZeRO-2"], BY_NAME["ZeRO-2×ep2"]
HSDP, EP2_TP2 = BY_NAME["HSDP 2×2"], BY_NAME["ep2×tp2"]
DP3 = Layout("dp3", 3)
ALONE = Layout("1", 1)


@dataclass(frozen=True)
class Case:
    """One run that is hurt. What is at rest is hurt after the first end, before the restart."""

    name: str
    start: Layout
    then: Layout
    ends: Ending  # how the hurt start ends
    hurts: tuple[Hurt, ...] = ()
    planted: tuple[Hurt, ...] = ()  # at every start, and in the reference too
    checkpoint: str = ""  # what is done to the newest checkpoint
    shard: str = ""  # what is done to a shard
    again: tuple[Hurt, ...] = ()  # at the second start, which ends as the first
    disk: bool = False  # the run directory is a small file system of its own
    server: bool = False  # shards come from a web server, which dies in the middle of one

    @property
    def same(self) -> bool:
        return self.start == self.then


# name, layout → layout, act, moment, rank; drawn: step and amount
_SIMPLE: tuple[tuple[str, Layout, Layout, Act, Moment, int], ...] = (
    ("one rank killed", DP2, DP2, "die", "forward", 1),
    ("one rank killed", EP2, EP2, "die", "update", 0),
    ("one rank killed", DP2, DP3, "die", "update", 1),
    ("one rank killed", EP2_TP2, DP2, "die", "forward", 3),
    ("one rank killed", Z2_EP2, EP2, "die", "forward", 0),
    ("all killed", DP2, DP2, "kill all", "forward", 0),
    ("all killed", Z2_EP2, Z2_EP2, "kill all", "update", 1),
    ("all killed", EP2, TP2, "kill all", "update", 0),
    ("all killed", DP2, HSDP, "kill all", "forward", 1),
    ("killed in a save: copy", DP2, DP2, "die", "copy", 0),
    ("killed in a save: copy", EP2, Z2, "kill all", "copy", 1),
    ("killed in a save: at a byte", DP2, DP2, "cap", "write", 1),
    ("killed in a save: before rename", DP2, DP2, "die", "rename", 0),
    ("killed in a save: after rename", EP2, EP2, "kill all", "renamed", 0),
    ("killed in a save: in fsync", Z2_EP2, Z2_EP2, "kill all", "fsync", 0),
    ("killed in the flush", DP2, DP2, "die", "flush", 1),
    ("killed in the flush", EP2, EP2, "kill all", "flush", 0),
    ("killed in the flush", DP2, Z2_EP2, "die", "flush", 0),
    ("SIGTERM", DP2, DP2, "TERM", "forward", 0),
    ("SIGTERM", Z2_EP2, DP3, "TERM", "update", 1),
    ("SIGTERM in the flush", DP2, DP2, "TERM", "flush", 0),
    ("SIGTERM twice at once", EP2, EP2, "TERM twice", "forward", 1),
    ("SIGTERM twice at once", DP2, ALONE, "TERM twice", "update", 0),
    ("stop file", DP2, DP2, "stop", "forward", 0),
    ("stop file", EP2, EP2_TP2, "stop", "update", 0),
    ("disk full: no room", DP2, DP2, "fill", "forward", 0),
    ("disk full: write fails (EFBIG)", Z2_EP2, Z2_EP2, "cap", "forward", 1),
    ("loader worker killed", DP2, DP2, "raise", "read", 1),
    ("shard truncated while read", DP2, DP2, "cut", "forward", 0),
)
# what is done at rest, and to which checkpoint or shard; a kill of all comes first
_AT_REST: tuple[tuple[str, Layout, Layout], ...] = (
    ("file truncated", DP2, DP2),
    ("file bit-flipped", EP2, EP2),
    ("file bit-flipped", DP2, Z2),
    (".metadata bit-flipped", DP2, DP2),
    ("manifest bit-flipped", DP2, DP2),
    ("manifest truncated", EP2, EP2),
    ("newest missing", DP2, DP2),
    ("file missing", Z2_EP2, Z2_EP2),
    ("newest without manifest", EP2, EP2),
    ("newest half-written", DP2, DP2),
    ("shard truncated", DP2, DP2),
    ("shard deleted", EP2, DP2),
)
_ENDS: dict[Act, Ending] = {
    "die": "one killed",
    "kill all": "all killed",
    "TERM": "asked",
    "TERM twice": "asked",
    "stop": "asked",
    "raise": "failed",
    "fill": "failed",
    "cut": "failed",
}


def drawn(seed: int) -> list[Case]:
    """All cases; the moments are random, and the same for the same seed."""
    served = [Case("server dies mid-stream", DP2, to, "failed", server=True) for to in (DP2, EP2)]
    return [*_simple(seed), *_at_rest(seed), *_nan(seed), *_while_restoring(seed), *served]


def _simple(seed: int) -> Iterator[Case]:
    for number, (name, start, then, act, at, rank) in enumerate(_SIMPLE):
        rng = random.Random(f"{seed} {number} {name}")
        ends = _ENDS.get(act) or ("one killed" if at == "write" else "failed")
        hurt = Hurt(act, at, _step(rng, act, at), rank, _amount(rng, act, at, rank))
        yield Case(name, start, then, ends, (hurt,), disk=act == "fill")


def _step(rng: random.Random, act: Act, at: Moment) -> int:
    if at in ("copy", "fsync", "flush", "rename", "renamed"):
        return rng.choice(range(EVERY, STEPS, EVERY))
    if act in ("fill", "cap", "cut"):
        return rng.randint(2, STEPS - EVERY)  # why: a save must follow
    # why: a request is agreed on a step later, and must not come with the last one
    return rng.randint(2, STEPS - 3 if _ENDS[act] == "asked" else STEPS - 1)


def _amount(rng: random.Random, act: Act, at: Moment, rank: int) -> int:
    if act in ("fill", "cap"):
        return rng.randint(300_000, 3_000_000)  # bytes; a rank's file has twice as many
    if act == "cut":
        return rng.randint(0, 200_000)
    if at in ("fsync", "flush"):
        return rng.randint(0, 2) if rank == 0 else 0  # others write one file
    return rng.randint(0, 100)  # tensors copied


def _at_rest(seed: int) -> Iterator[Case]:
    for number, (name, start, then) in enumerate(_AT_REST):
        rng = random.Random(f"{seed} rest {number} {name}")
        # why: the second save waits for the first, which is on the disk then
        step = rng.randint(2 * EVERY + 1, STEPS - 1)
        kill = Hurt("kill all", rng.choice(("forward", "update")), step)
        shard = name if name.startswith("shard") else ""
        yield Case(
            name, start, then, "all killed", (kill,), checkpoint="" if shard else name, shard=shard
        )


def _nan(seed: int) -> Iterator[Case]:
    for number, (act, then) in enumerate((("kill all", DP2), ("TERM", EP2))):
        rng = random.Random(f"{seed} nan {number}")
        # why: one place for all, so that one reference serves; the hurt falls before or after it
        planted = (Hurt("nan", "loss", random.Random(seed).randint(3, STEPS - 3), rank=1),)
        hurt = Hurt(act, "forward", _step(rng, act, "forward"), rank=0)
        yield Case("NaN batch", DP2, then, _ENDS[act], (hurt,), planted)


def _while_restoring(seed: int) -> Iterator[Case]:
    for act in ("kill all", "TERM"):
        rng = random.Random(f"{seed} restoring {act}")
        hurt = Hurt(act, "forward", rng.randint(EVERY + 2, STEPS - 3))
        again = (Hurt(act, "load", 0),)
        yield Case(f"{act}, and again in the restart", DP2, DP2, _ENDS[act], (hurt,), again=again)
