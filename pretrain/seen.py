"""Which samples each step has seen: RUN/seen/rank_00000.jsonl, one file a data rank.

The proof that a surviving history loses no sample and sees none twice. A rank cuts back its own
file, and the first one those of ranks that are no more, so nobody waits for anybody.
"""

from pathlib import Path

from data_pipeline.batch import Batch
from pretrain.lines import Lines, cut


class Seen:
    """One data rank's log. Of a tensor parallel group, one rank has one that is not `idle`."""

    def __init__(
        self,
        run_dir: Path,
        rank: int,
        *,
        of: int,
        start: int,
        enabled: bool,
        idle: bool = False,
    ) -> None:
        """rank, of: place among the data ranks. start: the restored step, which all files are cut
        back to even if nothing more is logged. enabled: log. idle: touch nothing.
        """
        self._folder, self._rank, self._ranks = run_dir / "seen", rank, of
        self._enabled, self._idle = enabled and not idle, idle
        self._file: Lines | None = None
        self.rewind(start)

    def append(self, step: int, position: int, batch: Batch) -> None:
        """What made a step. step: as in metrics.jsonl. position: of the whole batch."""
        if not self._enabled:
            return
        if self._file is None:
            self._folder.mkdir(exist_ok=True)
            self._file = Lines(self._path(self._rank))
        slots, samples = batch.slots.tolist(), batch.samples.tolist()
        self._file.append(step, {"position": position, "slots": slots, "samples": samples})

    def rewind(self, step: int) -> None:
        """Takes back later steps."""
        self.close()
        if self._idle:
            return
        cut(self._path(self._rank), step)
        if self._rank == 0:
            ours = {self._path(rank) for rank in range(self._ranks)}
            for path in set(self._folder.glob("rank_*.jsonl")) - ours:
                cut(path, step)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _path(self, rank: int) -> Path:
        return self._folder / f"rank_{rank:05d}.jsonl"
