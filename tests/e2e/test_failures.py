"""A rank that raises, is killed or hangs ends all ranks in time; the message says who and where."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from data_pipeline.order import Order
from data_pipeline.shards import Manifest, read_index
from parallel import launch
from parallel.mesh import Mesh, MeshConfig, degrees
from tests import ranks, tiny

TIMEOUT = 3  # seconds of a collective
GRACE = 15  # seconds after which all ranks must have ended
WORLD = 4
HURT = 3  # the rank that fails


class BrokenError(RuntimeError):
    """What the failing rank raises."""


def nothing() -> None:
    """Starts the server that ranks are forked from, so that tests measure ranks alone."""


@pytest.fixture(autouse=True, scope="module")
def _warm() -> None:
    ranks.run(nothing, 1)


def raises() -> None:
    raise BrokenError("of its own making")


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hangs() -> None:
    threading.Event().wait()


def finishes() -> None:
    os._exit(0)


def wrong_input() -> None:
    raise ValueError("a bad sample")


def works(axis: str, failure: Callable[[], None], stacks: Path) -> None:
    """Collectives on one axis and on the world; rank HURT fails before the second round."""
    place = launch.Place.here()
    with launch.guarded(expected=(ValueError,)):
        launch.join(place, threads=1, timeout=timedelta(seconds=TIMEOUT), stacks=stacks)
        cfg = MeshConfig(tp=2 if axis == "tp" else 1, ep=2 if axis == "ep" else 1)
        mesh = Mesh(degrees(cfg, place.world), "cpu")
        group = {"tp": mesh.tp.group, "ep": mesh.ep.group}.get(axis)
        for turn in range(2):
            if turn == 1 and place.rank == HURT:
                failure()
            dist.all_reduce(torch.ones(1), group=group)
            dist.all_reduce(torch.ones(1))
        launch.leave()


def end(axis: str, failure: Callable[[], None], log: Path) -> tuple[list[int | None], str, float]:
    """Exit codes, what was said, seconds."""
    began = time.monotonic()
    codes = ranks.wait(ranks.start(works, WORLD, axis, failure, log.parent / "stacks", log=log))
    return codes, log.read_text(), time.monotonic() - began


AXES = ["tp", *(pytest.param(axis, marks=pytest.mark.slow) for axis in ("world", "ep"))]


@pytest.mark.parametrize("axis", AXES)
def test_a_rank_that_raises_speaks_first_and_ends_all(axis: str, tmp_path: Path) -> None:
    codes, said, took = end(axis, raises, tmp_path / "log")
    assert codes == [1] * WORLD, said
    assert said.startswith(f"[rank {HURT}] Traceback"), said
    assert said.count("Traceback") == 1, said
    why = (
        rf"rank {HURT} failed at tests/e2e/test_failures.py:\d+ in raises: BrokenError: of its own"
    )
    for rank in range(WORLD - 1):
        assert re.search(rf"rank {rank} ended because {why}", said), said
    assert took < TIMEOUT + GRACE


@pytest.mark.parametrize("axis", AXES)
def test_a_killed_rank_is_named_with_its_last_place(axis: str, tmp_path: Path) -> None:
    codes, said, took = end(axis, killed, tmp_path / "log")
    assert codes == [1] * HURT + [-signal.SIGKILL], said
    assert "Traceback" not in said, said
    assert f"rank {HURT} ended or was killed without a word: rank {HURT} was last at " in said
    for rank in range(WORLD - 1):
        assert re.search(rf"rank {rank} ended (at|because)", said), said
    assert took < TIMEOUT + GRACE


@pytest.mark.parametrize("axis", AXES)
def test_a_hanging_rank_is_named_with_its_place_and_ends_too(axis: str, tmp_path: Path) -> None:
    codes, said, took = end(axis, hangs, tmp_path / "log")
    assert codes == [1] * WORLD, said
    where = r"tests/e2e/test_failures.py:\d+ in hangs"
    assert re.search(
        rf"rank {HURT} did not join a collective in time: rank {HURT} at {where}", said
    )
    assert "waiting in all_reduce" in said
    stack = said[said.index(f"rank {HURT} ended because the others waited for it") :]
    assert "in hangs" in stack, said
    written = {path.name: path.read_text() for path in (tmp_path / "stacks").iterdir()}
    assert sorted(written) == [f"rank_{rank:05d}.txt" for rank in range(WORLD)]
    assert "in hangs" in written[f"rank_{HURT:05d}.txt"]
    assert all("in all_reduce" in written[f"rank_{rank:05d}.txt"] for rank in range(WORLD - 1))
    assert f"the stacks of all ranks are in {tmp_path / 'stacks'}" in said
    assert took < TIMEOUT + GRACE


def test_wrong_input_of_one_rank_is_one_message_and_code_2(tmp_path: Path) -> None:
    codes, said, _ = end("world", wrong_input, tmp_path / "log")
    assert codes[:HURT] == [2] * HURT, said
    # the rank itself lets the error through to the command line, which is not part of this test
    assert said.count("ValueError: a bad sample") == 1, said
    assert "ended because" not in said


@pytest.mark.slow
def test_a_rank_that_leaves_early_is_named(tmp_path: Path) -> None:
    codes, said, _ = end("world", finishes, tmp_path / "log")
    assert codes == [1] * HURT + [0], said
    assert f"rank {HURT} ended or was killed without a word" in said


def late_group() -> None:
    """Rank 1 stays away from groups that were made with another timeout, or with none."""
    place = launch.Place.here()
    launch.join(place, threads=1, timeout=timedelta(seconds=60))
    groups = [dist.new_group(timeout=timedelta(minutes=30)), dist.new_group()]
    launch.limit(timedelta(seconds=1))
    groups.append(dist.new_group())
    for group in groups:
        dist.all_reduce(torch.ones(1), group=group)
    if place.rank == 1:
        hangs()
    for group in groups:
        with pytest.raises(RuntimeError, match="1000ms"):
            dist.all_reduce(torch.ones(1), group=group)
    os._exit(0)


def test_every_group_has_the_timeout_of_the_world(tmp_path: Path) -> None:
    log = tmp_path / "log"
    first, second = ranks.start(late_group, 2, log=log)
    codes = ranks.wait([first])
    second.kill()
    assert codes == [0], log.read_text()


def in_a_step_of_slurm(port: int) -> None:
    """One rank a task; rank 0, which keeps the store, is killed. No parent looks after the rest."""
    rank, world = os.environ["RANK"], os.environ["WORLD_SIZE"]
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", launch.STORE):
        del os.environ[name]
    os.environ |= {
        "SLURM_PROCID": rank,
        "SLURM_LOCALID": rank,
        "SLURM_STEP_NUM_TASKS": world,
        "SLURM_STEP_TASKS_PER_NODE": world,
        "SLURM_STEP_NODELIST": "localhost",
        "MASTER_PORT": str(port),
    }
    place = launch.Place.here()
    with launch.guarded():
        launch.join(place, threads=1, timeout=timedelta(seconds=60))
        dist.all_reduce(torch.ones(1))
        if place.rank == 0:
            killed()
        if place.rank == 2:
            hangs()
        dist.all_reduce(torch.ones(1))


def test_under_srun_all_end_when_the_rank_with_the_store_is_killed(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    began, log = time.monotonic(), tmp_path / "log"
    codes = ranks.wait(ranks.start(in_a_step_of_slurm, 3, port, log=log))
    said = log.read_text()
    assert codes == [-signal.SIGKILL, 1, 1], said
    assert time.monotonic() - began < GRACE
    for rank in (1, 2):
        where = rf"rank {rank} ended at tests/e2e/test_failures.py:\d+ in \w+"
        assert re.search(where + r".*: .*rank 0, which keeps the store .* is gone", said), said


FAULTY = """
import os, sys
from pretrain import cli, objectives
honest, seen = objectives.Flow.loss, [0]
def loss(self, *args):
    seen[0] += 1
    if os.environ["RANK"] == "1" and seen[0] == 3:
        {fault}
    return honest(self, *args)
objectives.Flow.loss = loss
cli.main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("starter", ["spawn", "torchrun"])
def test_a_training_run_ends_with_the_traceback_of_the_rank_that_failed(
    starter: str, digits: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = tiny.write(tmp_path, "dit", digits, timeout=20)
    script = tmp_path / "faulty.py"
    script.write_text(FAULTY.format(fault="raise ArithmeticError('in a step')"))
    words = [str(script), "train", str(config)]
    if starter == "spawn":
        code = launch.spawn([sys.executable, *words], 2)
    else:
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        env = os.environ | {"PYTHONPATH": str(Path.cwd()), "WANDB_MODE": "disabled"}
        code = subprocess.run([sys.executable, *torchrun, *words], env=env, check=False).returncode
    said = capfd.readouterr().err
    assert code == 1, said
    first = said[said.index("Traceback") :]
    assert said[: said.index("Traceback")].endswith("[rank 1] "), said
    assert "ArithmeticError: in a step" in first
    assert re.search(r"rank 0 ended because rank 1 failed at pretrain/engine.py:\d+ in \w+", said)
    assert "Connection closed" not in said, said


def test_a_damaged_sample_is_told_by_the_rank_that_met_it(digits: Path, tmp_path: Path) -> None:
    """Found only when it is read; the message must not be lost because rank 0 is well."""
    hurt = tmp_path / "hurt"
    shutil.copytree(digits, hurt)
    config = tiny.write(tmp_path, "dit", hurt)
    manifest = Manifest.load(hurt)
    index = read_index(hurt, manifest.split("train"))
    order = Order(manifest.split("train").count, manifest.lanes, 0, "samples")
    tar = next(hurt.glob("train-*.tar"))
    content = bytearray(tar.read_bytes())
    for sample in order.samples(np.arange(4, 8)):  # the first of rank 1
        content[int(index["offset"][sample, 0])] ^= 1
    tar.write_bytes(content)
    log = tmp_path / "log"
    codes = ranks.wait(ranks.start(ranks.pretrain, 2, "train", str(config), log=log))
    assert 2 in codes
    assert "its CRC-32 differs from the index (damaged)" in log.read_text()
