"""A process finds its place among the others by what its starter left in the environment."""

import os
import platform
import subprocess
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
    "SLURM_NODEID": "1",
}
LAST = SLURM | {"SLURM_PROCID": "9", "SLURM_NODEID": "2"}  # of the node of two
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "20", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "10"}


def environment(env: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*TORCHRUN, *SLURM, "SLURM_CPUS_PER_TASK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("env", "place"),
    [
        ({}, Place(0, 1, 0, 1)),
        ({"RANK": "3", "WORLD_SIZE": "4"}, Place(3, 4, 0, 1)),
        (SLURM, Place(5, 10, 1, 4)),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, Place(0, 1, 0, 1)),
        (LAST, Place(9, 10, 1, 2)),
        (SLURM | {"RANK": "5", "WORLD_SIZE": "10"}, Place(5, 10, 1, 4)),  # a container's hook
        (SLURM | TORCHRUN, Place(3, 20, 3, 10)),
    ],
)
def test_place(env: dict[str, str], place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    environment(env, monkeypatch)
    assert Place.here() == place


@pytest.mark.parametrize(
    ("env", "cores", "threads"),
    [
        (SLURM | {"SLURM_CPUS_PER_TASK": "16"}, 16, 16),  # bound: the share is all it sees
        (SLURM | {"SLURM_CPUS_PER_TASK": "16"}, 64, 16),
        (SLURM, 64, 16),
        (TORCHRUN | {"SLURM_CPUS_PER_TASK": "64"}, 64, 6),
        (SLURM | TORCHRUN | {"SLURM_CPUS_PER_TASK": "64"}, 64, 6),
        ({}, 64, 64),
    ],
)
def test_threads_are_the_share_of_a_rank(
    env: dict[str, str], cores: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment(env, monkeypatch)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(cores), raising=False)
    assert launch.default_threads(Place.here()) == threads


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


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_is_kept_for_what_comes_next() -> None:
    """Pages that a round of three tensors touches for the first time, after 20 rounds."""
    code = """
import resource, sys, torch
from parallel import launch
if sys.argv[1] == "kept":
    launch.keep_freed_memory()
for _ in range(20):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.ones(20_000_000) for _ in range(3)]
    touched = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    del tensors
print(touched)
"""
    env = {name: value for name, value in os.environ.items() if name not in launch.MALLOC}
    command = (sys.executable, "-c", code)
    kept, returned = (
        int(subprocess.run((*command, how), env=env, capture_output=True, check=True).stdout)
        for how in ("kept", "returned")
    )
    assert kept < returned / 4  # with huge pages there are few of either
