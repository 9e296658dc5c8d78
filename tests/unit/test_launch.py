"""A process finds its place among the others by what its starter left in the environment."""

import sys
import traceback
from pathlib import Path

import pytest

from parallel import launch, watch
from parallel.launch import Place

SLURM = {
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "10",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2),2",
}


@pytest.mark.parametrize(
    ("env", "place"),
    [
        ({}, Place(0, 1, 0, 1)),
        ({"RANK": "3", "WORLD_SIZE": "4"}, Place(3, 4, 0, 1)),
        (SLURM, Place(5, 10, 1, 4)),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, Place(0, 1, 0, 1)),
    ],
)
def test_place(env: dict[str, str], place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", *SLURM):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert Place.here() == place


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu[003-010,12],cpu7", "gpu003"),
        ("a1,b[2-3]", "a1"),
        ("rack-2-gpu[07,09-11]", "rack-2-gpu07"),
        ("node", "node"),
    ],
)
def test_the_tasks_of_a_slurm_step_meet_on_its_first_node(nodes: str, first: str) -> None:
    env = {"SLURM_STEP_NODELIST": nodes, "SLURM_JOB_ID": "1234567", "SLURM_STEP_ID": "0"}
    meeting = launch._meeting(env)
    assert meeting["MASTER_ADDR"] == first
    assert 20_000 <= int(meeting["MASTER_PORT"]) < 30_000
    assert launch._meeting(env | {"SLURM_STEP_ID": "1"}) != meeting


def test_a_place_is_the_innermost_line_of_ours() -> None:
    where, waits = watch.place_of(traceback.walk_stack(sys._getframe()))
    assert where.startswith("tests/unit/test_launch.py:")
    assert where.endswith("in test_a_place_is_the_innermost_line_of_ours")
    assert not waits


def test_the_first_rank_to_claim_gets_it(tmp_path: Path) -> None:
    board = watch.FolderBoard(tmp_path / "board")
    assert [board.claim("cause") for _ in range(3)] == [True, False, False]
    assert board.read("verdict") is None
    board.post("verdict", "one")
    board.post("verdict", "two")
    assert board.read("verdict") == "two"
