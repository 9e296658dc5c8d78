"""`pretrain tune --slurm`: an array of its trials, and what the same command then collects."""

import json
import re
import sys

import pytest

from tests.slurm.jobs import ROOT, Jobs

pytestmark = pytest.mark.slow


def test_a_search_is_handed_over_and_collected(jobs: Jobs) -> None:
    out = jobs.folder / "search"
    words = ("tune", str(jobs.config), "--param", "optim.lr=1e-3,1e9", "--out", str(out))
    words += ("steps=6", "mesh.ep=1")
    env = {"GPUS_PER_NODE": "1", "WANDB_MODE": "disabled"}
    env["PRETRAIN_SITE"] = str(jobs.folder / "site")
    if not jobs.cluster.isolated:
        env["HEAD_ADDRESS"] = "127.0.0.1"
    command = (sys.executable, "-m", "pretrain", *words, "--slurm")
    said = jobs.cluster.run(*command, env=env, cwd=ROOT)
    asked = re.fullmatch(r"job (\d+), 2 trials: sbatch --array=1-2 .*\n", said)
    assert asked is not None, said
    assert jobs.wait(asked[1]) == "COMPLETED"
    assert len(list(out.glob("mup_sweep-*.out"))) == 2
    found = json.loads(jobs.pretrain(*words, "--json"))
    assert found["counts"] == {"done": 1, "diverged": 1}
    assert found["verdict"]["best"][0]["values"] == {"optim.lr": 1e-3}
    assert [row["steps"] for row in found["trials"]] == [6, 6]
