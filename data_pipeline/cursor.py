"""The place in the data as one small value. Not an iterator: it knows no rank, worker or file."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Cursor:
    """How far the endless sample order has been consumed, by all ranks together."""

    position: int = 0  # samples

    def __post_init__(self) -> None:
        assert self.position >= 0, f"a cursor cannot be negative: {self.position}"

    def advance(self, n: int) -> "Cursor":
        """The cursor n samples later."""
        return Cursor(self.position + n)
