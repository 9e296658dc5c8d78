"""What the time of a step goes to, by kind, without waiting for the device.

    with spending("forward"):
        pred = model(x)          # a collective inside is "communication", not "forward"

A span begins and ends where the device stands in its own stream: on a GPU by events that are read
later, so a wait for a collective counts as long as it holds up computing, and one that is hidden
behind it counts nothing. There is one clock a process, because the parts that wait (a gather of
FSDP, an exchange of experts) are far below those that ask.
"""

import functools
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch

OTHER = "other"  # what belongs to no span
T = TypeVar("T", bound=Callable[..., Any])


class Clock:
    """Seconds by kind, of one device. Every moment belongs to the innermost span it lies in."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._kinds = [OTHER]  # of the open spans, innermost last
        self._marks: deque[tuple[str, Any]] = deque()  # from this moment on, time is of this kind
        self._spare: list[torch.cuda.Event] = []
        self._seconds: dict[str, float] = {}
        self._mark(OTHER)

    @contextmanager
    def span(self, kind: str) -> Iterator[None]:
        self._kinds.append(kind)
        self._mark(kind)
        try:
            yield
        finally:
            self._kinds.pop()
            self._mark(self._kinds[-1])

    def read(self) -> dict[str, float]:
        """Seconds by kind since the last time it was read. sync: the device has come this far."""
        self._mark(self._kinds[-1])
        if self._cuda:
            self._marks[-1][1].synchronize()  # sync: where somebody wants to know
        self._settle()
        seconds, self._seconds = self._seconds, {}
        return seconds

    def _mark(self, kind: str) -> None:
        if not self._cuda:
            self._marks.append((kind, time.perf_counter()))
        else:
            event = self._spare.pop() if self._spare else torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((kind, event))
        if len(self._marks) > 64:
            self._settle()

    def _settle(self) -> None:
        """Adds up what the device has passed; waits for nothing."""
        while len(self._marks) > 1:
            (kind, begin), (_, end) = self._marks[0], self._marks[1]
            if not self._cuda:
                took = end - begin
            elif end.query():
                took = begin.elapsed_time(end) / 1000
                self._spare.append(begin)
            else:
                return
            self._marks.popleft()
            self._seconds[kind] = self._seconds.get(kind, 0.0) + took


_clock: Clock | None = None


def start(device: torch.device) -> Clock:
    """The clock of this process from now on."""
    global _clock
    _clock = Clock(device)
    return _clock


def spending(kind: str) -> AbstractContextManager[None]:
    """The time inside is of this kind; nothing where no clock runs, or a compiler reads along."""
    # why: in this order a graph does not depend on the clock, which starts after the warm-up.
    if torch.compiler.is_compiling() or _clock is None:
        return nullcontext()
    return _clock.span(kind)


def spends(kind: str) -> Callable[[T], T]:
    """The same for every call of a function."""

    def timed(function: T) -> T:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with spending(kind):
                return function(*args, **kwargs)

        return call  # type: ignore[return-value]

    return timed
