"""The place in the data as one small value. Not an iterator: it knows no rank, worker or file."""

from dataclasses import dataclass, replace

Stretch = tuple[int, int]  # positions [first, last)


@dataclass(frozen=True)
class Cursor:
    """How far the endless sample order has been consumed, by all ranks together."""

    position: int = 0  # samples
    passed_over: tuple[Stretch, ...] = ()  # positions that are never read, in order

    def __post_init__(self) -> None:
        assert self.position >= 0, f"a cursor cannot be negative: {self.position}"
        assert all(a < b for a, b in self.passed_over), f"an empty stretch: {self.passed_over}"

    def clear(self, n: int) -> "Cursor":
        """The cursor moved to where the next n samples touch nothing that is passed over."""
        position = self.position
        for first, last in sorted(self.passed_over):
            if position < last and position + n > first:
                position = last
        return replace(self, position=position)

    def advance(self, n: int) -> "Cursor":
        """The cursor n samples later, clear for the next n."""
        return replace(self, position=self.clear(n).position + n).clear(n)

    def pass_over(self, stretch: Stretch) -> "Cursor":
        """The same place, with one more stretch that will not be read."""
        return replace(self, passed_over=tuple(sorted({*self.passed_over, stretch})))
