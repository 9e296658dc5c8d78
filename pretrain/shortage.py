"""Out of memory: a snapshot for torch's viewer, and a message that says what would fit."""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch


class ShortageError(RuntimeError):
    """A device had no memory left; the message says how much was held and what would fit."""


@contextmanager
def explained(folder: Path, rank: int, fitting: Callable[[], str]) -> Iterator[None]:
    """Around a run: torch's error becomes a ShortageError, its snapshot RUN/memory_rank_R.pickle.

    fitting: says what would fit; asked only then.
    """
    if torch.cuda.is_available():
        # perf: what stands at the end and where it was made, not the history of all that went.
        torch.cuda.memory._record_memory_history("state", stacks="python")
    try:
        yield
    except torch.OutOfMemoryError as error:
        held = ""
        if torch.cuda.is_available():
            held = (
                f" {torch.cuda.max_memory_allocated() / 1e9:.1f} GB were held at most, "
                f"{torch.cuda.memory_reserved() / 1e9:.1f} GB reserved, of "
                f"{torch.cuda.get_device_properties().total_memory / 1e9:.1f} GB."
            )
            path = folder / f"memory_rank_{rank:05d}.pickle"
            with contextlib.suppress(OSError):  # why: the message matters more
                torch.cuda.memory._dump_snapshot(str(path))
                held += f" What held them: {path}, for https://pytorch.org/memory_viz."
        first = str(error).partition("\n")[0]
        raise ShortageError(f"rank {rank} ran out of memory: {first}{held} {fitting()}") from error
