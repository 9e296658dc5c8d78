"""README's page on Slurm, followed word for word, in a copy of the checkout."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.jobs import ROOT, Jobs

pytestmark = pytest.mark.slow
COPIED = ("pretrain", "parallel", "data_pipeline", "configs", "slurm", "pyproject.toml")


def block(heading: str, number: int) -> list[str]:
    """The commands of the n-th block below a heading of README.md, comments left out."""
    page = (ROOT / "README.md").read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = re.findall(r"```\n(.*?)```", page, re.DOTALL)[number].splitlines()
    return [re.split(r"\s{3,}", line)[0] for line in lines]


def test_a_first_job_word_for_word(cluster: Cluster, jobs: Jobs, tmp_path: Path) -> None:
    copy = tmp_path / "checkout"
    for name in COPIED:
        where = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy.mkdir(exist_ok=True)
        where(ROOT / name, copy / name)
    (copy / ".venv").symlink_to(ROOT / ".venv")
    env = cluster.env | {
        "PATH": f"{ROOT}/.venv/bin:{cluster.env['PATH']}",
        "WANDB_MODE": "disabled",
    }
    env |= {"PYTHONPATH": str(copy), "PYTHONSAFEPATH": "1"}
    if not cluster.isolated:
        env["HEAD_ADDRESS"] = "127.0.0.1"
    said = []
    for command in block("On a Slurm cluster", 0):
        if command.startswith("pretrain status"):
            assert jobs.wait(said[-1], limit=400) == "COMPLETED", jobs.ranks()
        done = subprocess.run(
            command, shell=True, cwd=copy, env=env, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        said.append(done.stdout.strip())
    assert (copy / "runs/first/done").read_text() == "40\n"
    assert re.search(r"state +done", said[-1])
    assert re.search(r"goodput\.goodput +0\.\d+", said[-1])


def test_submit_writes_plans_and_submits(jobs: Jobs) -> None:
    """Without the node that has failed a health check."""
    site = jobs.folder / "site"
    site.mkdir()
    bad = {"time": 1.0, "node": "node1", "check": "disk space", "why": "full", "job": "1"}
    (site / "bad_nodes.jsonl").write_text(json.dumps(bad) + "\n")
    words = ("submit", str(jobs.config), f"run_dir={jobs.run_dir}", "--nodes", "2")
    words += ("--gpus-per-node", "1", "--time", "1:00:00", "--device", "cpu")
    words += ("--exclude-bad",)
    said = jobs.pretrain(*words)
    assert "params_total" in said
    number = re.search(r"^job (\d+):", said, re.MULTILINE)
    assert number is not None, said
    assert jobs.wait(number[1]) == "COMPLETED", jobs.ranks()
    assert (jobs.run_dir / "done").exists()
    assert jobs.nodes() == {"node2", "node3"}
    status = jobs.pretrain("status", str(jobs.run_dir))
    assert re.search(r"state +done", status)
