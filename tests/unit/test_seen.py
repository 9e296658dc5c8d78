"""Lines of a run that can be cut back, and the log of which samples a rank has seen."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_pipeline.batch import Batch
from pretrain.lines import cut
from pretrain.seen import Seen

NAME = "some.jsonl"


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(folder: Path, steps: range, tail: str = "") -> None:
    text = "".join(json.dumps({"step": step, "loss": 1 / step}) + "\n" for step in steps)
    (folder / NAME).write_text(text + tail)


def test_cut_counts_what_it_drops_and_leaves_the_rest_as_it_was(tmp_path: Path) -> None:
    assert cut(tmp_path / NAME, 5) == 0
    write(tmp_path, range(1, 6))
    before = (tmp_path / NAME).read_bytes()
    assert cut(tmp_path / NAME, 5) == 0
    assert (tmp_path / NAME).read_bytes() == before
    write(tmp_path, range(1, 6), tail='{"step": 2}')
    assert cut(tmp_path / NAME, 5) == 1
    assert (tmp_path / NAME).read_bytes() == before
    write(tmp_path, range(1, 6), tail='\0\0\n[1]\n{"loss": 2}\n{"step": 4}\n')
    assert cut(tmp_path / NAME, 3) == 6
    assert [line["step"] for line in lines(tmp_path / NAME)] == [1, 2, 3]
    assert cut(tmp_path / NAME, 0) == 3
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


def batch(*samples: int) -> Batch:
    size = len(samples)
    labels = torch.zeros(size, dtype=torch.int64)
    return Batch(torch.zeros(size, 1, 2, 2), labels, np.arange(size) + 4, np.array(samples))


def test_a_line_a_step_is_on_disk_at_once_and_says_which_samples(tmp_path: Path) -> None:
    seen = Seen(tmp_path, 1, of=2, start=0, enabled=True)
    seen.append(1, 0, batch(9, 7))
    seen.append(2, 8, batch(3, 2))
    assert lines(tmp_path / "seen" / "rank_00001.jsonl") == [
        {"step": 1, "position": 0, "slots": [4, 5], "samples": [9, 7]},
        {"step": 2, "position": 8, "slots": [4, 5], "samples": [3, 2]},
    ]


def test_every_file_is_cut_back_also_those_of_another_layout(tmp_path: Path) -> None:
    for rank in range(3):
        seen = Seen(tmp_path, rank, of=3, start=0, enabled=True)
        for step in (1, 2, 3):
            seen.append(step, 8 * step, batch(step))
        seen.close()
    ours = [Seen(tmp_path, rank, of=2, start=2, enabled=rank == 0) for rank in range(2)]
    ours[0].append(3, 40, batch(5))
    files = [tmp_path / "seen" / f"rank_0000{rank}.jsonl" for rank in range(3)]
    assert [[line["position"] for line in lines(file)] for file in files] == [
        [8, 16, 40],
        [8, 16],
        [8, 16],
    ]
    for seen in ours:
        seen.rewind(1)
    ours[0].append(2, 48, batch(6))
    assert [[line["position"] for line in lines(file)] for file in files] == [[8, 48], [8], [8]]


def test_nothing_is_written_unless_asked_for(tmp_path: Path) -> None:
    seen = Seen(tmp_path, 0, of=1, start=0, enabled=False)
    seen.append(1, 0, batch(1))
    seen.rewind(0)
    seen.close()
    assert list(tmp_path.iterdir()) == []
