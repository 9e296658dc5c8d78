"""How a run ends on all ranks when one rank fails, and who says what.

Each rank has a thread that posts where the main thread stands and looks for a verdict, on a board
beside the process group, which it never uses. A rank with an error of its own prints its traceback
and posts the verdict. A rank whose collective broke or timed out asks the board who is missing:
whose thread is silent is gone, and who is not waiting in a collective holds up the rest. Everyone
else ends on the verdict with one line.
"""

import faulthandler
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Protocol

import torch.distributed as dist

TICK = 0.5  # seconds between two looks at the board
PATIENCE = 5.0  # seconds without a sign of life after which a rank counts as gone
LIMIT = 15.0  # seconds in which a rank that has failed must have ended
OURS = ("pretrain", "parallel", "data_pipeline", "tests")  # code whose lines a place may name
_ROOT = Path(__file__).resolve().parents[1]


class Board(Protocol):
    """Short texts by name, seen by all ranks."""

    def post(self, name: str, text: str) -> None: ...
    def read(self, name: str) -> str | None: ...
    def claim(self, name: str) -> bool:
        """True for the first rank that asks, False for all others."""
        ...


class FolderBoard:
    """A board for the ranks of one machine."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self._folder = folder

    def post(self, name: str, text: str) -> None:
        part = self._folder / f".{name}.{os.getpid()}.{threading.get_ident()}"
        part.write_text(text)
        part.replace(self._folder / name)

    def read(self, name: str) -> str | None:
        path = self._folder / name
        return path.read_text() if path.exists() else None

    def claim(self, name: str) -> bool:
        try:
            (self._folder / name).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True


class StoreBoard:
    """A board in the store that the ranks met in, over a connection of its own."""

    def __init__(self, store: dist.Store) -> None:
        self._store = dist.PrefixStore("watch", store.clone())  # type: ignore[attr-defined]

    def post(self, name: str, text: str) -> None:
        self._store.set(name, text)

    def read(self, name: str) -> str | None:
        return self._store.get(name).decode() if self._store.check([name]) else None

    def claim(self, name: str) -> bool:
        return self._store.add(name, 1) == 1


@dataclass(frozen=True)
class Verdict:
    """Why the run ends."""

    text: str  # "rank 2 failed at …"
    code: int  # exit code of every rank
    blamed: tuple[int, ...]  # ranks at fault


class Watch:
    """One rank's thread, and the words of its main thread when that one fails."""

    def __init__(
        self,
        board: Board,
        rank: int,
        world: int,
        broken: Callable[[], str],
        stacks: Path | None = None,
    ) -> None:
        """broken: what a backend reports about its collectives, "" while all is well. stacks:
        where every rank writes its stacks when one has failed.
        """
        self._board, self._rank, self._world, self._broken = board, rank, world, broken
        self._stacks = stacks
        self._main = threading.get_ident()
        self._place: str | None = None  # where this rank failed
        self._over = threading.Event()
        self._leaving = self._speaking = False
        self._thread = threading.Thread(target=self._loop, name="watch", daemon=True)
        self._thread.start()

    def leave(self) -> None:
        """The work is done: a board that goes away is no failure any more."""
        self._leaving = True

    def stop(self) -> None:
        self._over.set()
        self._thread.join(LIMIT)

    def wrong_input(self, text: str) -> bool:
        """All ranks are to end with 2; whether this rank is the one that says why."""
        try:
            first = self._board.claim("cause")
            if first:
                self._speaking = True
                self._post(Verdict(f"rank {self._rank}: {text}", 2, (self._rank,)))
        except (dist.DistError, OSError):
            return True
        return first

    def fail(self, error: BaseException) -> int:
        """Says why this rank ends, and lets all others end; returns the exit code."""
        # why: whatever stands in the way of the words or of the exit, the process ends.
        faulthandler.dump_traceback_later(LIMIT, exit=True)
        place, _ = place_of(reversed(list(traceback.walk_tb(error.__traceback__))))
        summary = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]
        self._place, self._speaking = place, True
        self._dump(error)
        try:
            if is_consequence(error):
                return self._ask(place, summary)
            if self._board.claim("cause"):
                text = "".join(traceback.format_exception(error))
                say("".join(f"[rank {self._rank}] {line}\n" for line in text.splitlines()))
                words = f"rank {self._rank} failed at {place}: {summary}"
                self._post(Verdict(words, 1, (self._rank,)))
            else:
                say(f"rank {self._rank} failed too, at {place}: {summary}\n")
        except (dist.DistError, OSError):
            say(f"rank {self._rank} ended at {place}: {summary}; {_lost()}\n")
        return 1

    def _ask(self, place: str, summary: str) -> int:
        """A collective broke: finds out because of whom, says it, returns the exit code."""
        verdict = self._verdict()
        if verdict is None and self._board.claim("question"):
            verdict = self._inspect(place)
            if self._verdict() is None:
                say(f"rank {self._rank} ended at {place}: {summary}\n{verdict.text}\n")
                if self._stacks is not None:
                    say(f"the stacks of all ranks are in {self._stacks}\n")
                self._post(verdict)
                return 1
        end = time.monotonic() + 2 * PATIENCE
        while verdict is None and time.monotonic() < end:
            time.sleep(TICK / 5)
            verdict = self._verdict()
        if verdict is None:
            say(f"rank {self._rank} ended at {place}: {summary}\n")
        elif verdict.code == 1:
            say(f"rank {self._rank} ended because {verdict.text}\n")
        return 1 if verdict is None else verdict.code

    def _inspect(self, place: str) -> Verdict:
        """Which rank is silent, or stands elsewhere; a verdict that comes meanwhile wins."""
        others = [rank for rank in range(self._world) if rank != self._rank]
        first = {rank: self._beat(rank) for rank in others}
        silent, end = set(others), time.monotonic() + PATIENCE
        while silent and time.monotonic() < end:
            time.sleep(TICK)
            known = self._verdict()
            if known is not None:
                return known
            # why: two beats, so that the newer one was taken after the question.
            silent = {rank for rank in silent if self._beat(rank)[0] < first[rank][0] + 2}
        beats = {rank: self._beat(rank) for rank in others}
        if silent:
            gone = "; ".join(f"rank {rank} was last at {beats[rank][1]}" for rank in sorted(silent))
            words = f"{_ranks(silent)} ended or was killed without a word: {gone}"
            return Verdict(words, 1, tuple(sorted(silent)))
        places: dict[tuple[bool, str], list[int]] = {(True, place): [self._rank]}
        for rank, (_, where, waits) in beats.items():
            places.setdefault((waits, where), []).append(rank)
        if len(places) == 1:
            return Verdict(f"a collective took longer than the timeout, at {place}", 1, ())
        # who does not wait comes first, then who waits elsewhere than most
        order = sorted(places, key=lambda key: (key[0], len(places[key])))
        words = "; ".join(f"{_ranks(places[key])} at {key[1]}" for key in order)
        late = [rank for key in order if not key[0] for rank in places[key]] or places[order[0]]
        text = f"{_ranks(late)} did not join a collective in time: {words}"
        return Verdict(text, 1, tuple(sorted(late)))

    def _beat(self, rank: int) -> tuple[int, str, bool]:
        """Number, place, and whether the main thread waits in a collective."""
        text = self._board.read(f"beat{rank}")
        return tuple(json.loads(text)) if text else (-1, "its start", False)

    def _verdict(self) -> Verdict | None:
        text = self._board.read("verdict")
        return None if text is None else Verdict(**json.loads(text))

    def _post(self, verdict: Verdict) -> None:
        self._board.post("verdict", json.dumps(asdict(verdict)))

    def _loop(self) -> None:
        beat = 0
        while not self._over.wait(TICK):
            place, waits = self._place, True
            if place is None:
                place, waits = place_of(traceback.walk_stack(self._frame()))
            try:
                self._board.post(f"beat{self._rank}", json.dumps([beat, place, waits]))
                verdict = self._verdict()
            except OSError:
                continue  # why: a full disk stops the words of a failure, not the run
            except dist.DistError:
                # why: the main thread may have seen it too, and speaks with its own error.
                if not self._over.wait(TICK) and not self._leaving and not self._speaking:
                    say(f"rank {self._rank} ended at {place}: {_lost()}\n")
                    os._exit(1)
                return
            beat += 1
            if verdict is not None and not self._speaking:
                self._end(verdict)
            if not self._speaking and self._broken():
                self._speaking, self._place = True, place
                threading.Thread(target=self._stuck, args=(place,), daemon=True).start()

    def _stuck(self, place: str) -> None:
        """The main thread waits for a device that waits for a peer: it cannot raise."""
        faulthandler.dump_traceback_later(LIMIT, exit=True)
        try:
            self._ask(place, self._broken())
        finally:
            os._exit(1)

    def _dump(self, error: BaseException | None = None) -> None:
        """The stacks of this rank's threads, and the error it ends with."""
        if self._stacks is None:
            return
        with suppress(OSError):  # why: a full disk must not keep a rank from ending
            self._stacks.mkdir(parents=True, exist_ok=True)
            with (self._stacks / f"rank_{self._rank:05d}.txt").open("w") as file:
                if error is not None:
                    file.writelines(traceback.format_exception(error))
                file.flush()
                faulthandler.dump_traceback(file)

    def _end(self, verdict: Verdict) -> None:
        if verdict.code == 1:
            self._dump()
        if self._rank in verdict.blamed and verdict.code == 1:
            stack = "".join(traceback.format_stack(self._frame()))
            say(f"rank {self._rank} ended because the others waited for it; it stands at\n{stack}")
        elif verdict.code == 1:
            say(f"rank {self._rank} ended because {verdict.text}\n")
        os._exit(verdict.code)

    def _frame(self) -> FrameType | None:
        return sys._current_frames().get(self._main)


def place_of(frames: Iterable[tuple[FrameType, int]]) -> tuple[str, bool]:
    """The innermost line of ours, and whether it waits in a collective. frames: inner to outer."""
    collective = ""
    for frame, line in frames:
        ours, distributed = _whose(frame.f_code.co_filename)
        if ours:
            where = f"{ours}:{line} in {frame.f_code.co_name}"
            return where + (f", waiting in {collective}" * bool(collective)), bool(collective)
        if distributed:
            collective = frame.f_code.co_name
    return "no line of ours", bool(collective)


@cache
def _whose(file: str) -> tuple[str, bool]:
    """A file's path if it is ours, else ""; and whether it is a library of collectives."""
    path = Path(file)
    if file == __file__ or path.name == "c10d_logger.py":  # frames that only wrap others
        return "", False
    if path.is_relative_to(_ROOT) and path.relative_to(_ROOT).parts[0] in OURS:
        return str(path.relative_to(_ROOT)), False
    return "", "distributed" in path.parts


def is_consequence(error: BaseException) -> bool:
    """Whether this is a collective that broke or timed out, which another rank may have caused."""
    return any(
        isinstance(cause, dist.DistError)
        or (isinstance(cause, RuntimeError) and "gloo" in str(cause))
        for cause in _causes(error)
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def say(text: str) -> None:
    """To stderr in one piece, so that ranks do not write into each other's lines."""
    sys.stderr.flush()
    os.write(2, text.encode())


def _ranks(ranks: Iterable[int]) -> str:
    ranks = sorted(ranks)
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


def _lost() -> str:
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return f"{'torchrun' if agent else 'rank 0'}, which keeps the store the ranks met in, is gone"
