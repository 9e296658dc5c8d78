"""Job arrays: shards encoded in parts and joined, a sweep and the job that collects it."""

import json
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.shards import Manifest, read_index
from data_pipeline.verify import verify
from tests.slurm.jobs import Jobs

pytestmark = pytest.mark.slow
ALONE = ("--nodes=1", "--cpus-per-task=1", "--gpus-per-node=1")


def after(jobs: Jobs, name: str) -> str:
    """The number of the job that the array has submitted."""
    lines = jobs.cluster.run("squeue", "-h", "-t", "all", "-o", "%i %j").splitlines()
    (number,) = [line.split()[0] for line in lines if line.split()[1].startswith(name)]
    return number


def test_two_parts_become_one_set(jobs: Jobs, digits: Path) -> None:
    out = jobs.folder / "set"
    words = ("src=digits", f"out={out}", "codec=haar2", "limit=200", f"run_dir={jobs.folder}/logs")
    number = jobs.submit("encode_shards", *words, options=("--array=1-2", *ALONE))
    assert jobs.wait(number) == "COMPLETED", jobs.log(f"{number}_1") + jobs.log(f"{number}_2")
    merge = after(jobs, f"encode_shards-merge-{number}")
    assert jobs.wait(merge) == "COMPLETED"
    assert verify(out).ok
    joined, whole = Manifest.load(out), Manifest.load(digits)
    assert (joined.mean, joined.std, joined.scale) == (whole.mean, whole.std, whole.scale)
    for split in whole.splits:
        ours, theirs = (read_index(p, Manifest.load(p).split(split)) for p in (out, digits))
        assert np.array_equal(ours["crc"], theirs["crc"])
        assert np.array_equal(ours["label"], theirs["label"])
    assert not (out / "parts").exists()


def test_a_sweep_of_three_and_its_collecting_job(jobs: Jobs) -> None:
    """One of them is asked to stop in the middle: it alone comes back."""
    points = jobs.folder / "points.txt"
    points.write_text(
        "# one trial a line\nlow  optim.lr=1e-4\nmiddle  optim.lr=1e-3\nwild  optim.lr=1e9\n"
    )
    sweep = jobs.folder / "sweep"
    words = (f"config={jobs.config}", f"points={points}", f"run_dir={sweep}", "mesh.ep=1")
    words += ("steps=6", "sample.every=0")
    options = ("--array=1-3%2", "--nodes=1")
    number = jobs.submit("mup_sweep", *words, options=options, GPUS_PER_NODE="1")
    jobs.run_dir = sweep / "middle"
    jobs.until_step(2)
    jobs.cluster.run("scancel", "--batch", "--signal=USR1", f"{number}_2")
    assert jobs.wait(number) == "COMPLETED"
    assert jobs.wait(after(jobs, f"mup_sweep-collect-{number}")) == "COMPLETED"
    rows = json.loads((sweep / "results.json").read_text())
    assert {row["name"] for row in rows} == {"low", "middle", "wild"}
    assert rows[0]["name"] == "middle"  # best first
    assert all(row["state"] == "done" and row["step"] == 6 for row in rows)
    assert rows[-1]["name"] == "wild"
    assert [a["outcome"] for a in jobs.attempts()] == ["stopped", "done"]
    assert len((sweep / "low" / "attempts.jsonl").read_text().splitlines()) == 2
    done = [(sweep / name / "done").stat().st_mtime for name in ("low", "middle", "wild")]

    again = jobs.submit("mup_sweep", *words, options=options, GPUS_PER_NODE="1")
    assert jobs.wait(again) == "COMPLETED"
    jobs.wait(after(jobs, f"mup_sweep-collect-{again}"))
    assert done == [(sweep / n / "done").stat().st_mtime for n in ("low", "middle", "wild")]


def test_a_cluster_is_measured_and_planned_with(jobs: Jobs) -> None:
    """20 minutes of a real cluster, with sizes of a toy."""
    settings = {
        "IMAGES": "2",
        "STEPS": "6",
        "DIGITS": "--codec haar2 --limit 200",
        "LINKS": "--sizes 0.01,0.1 --rounds 2",
        "DISPATCH": "--tokens 64 --width 64 --experts 8 --top-k 2 --rounds 2",
        "CHECKPOINT": "--params 1e5 --rounds 1",
    }
    words = (f"config={jobs.config}", f"run_dir={jobs.run_dir}", "mesh.ep=1")
    number = jobs.submit("acceptance", *words, GPUS_PER_NODE="1", **settings)
    assert jobs.wait(number, limit=500) == "COMPLETED", jobs.log(number) + jobs.ranks()
    links = json.loads((jobs.folder / "site" / "links.json").read_text())
    assert (links["nodes"], links["gpus_per_node"], links["device"]) == (2, 1, "cpu")
    assert links["across"]["all_reduce"] > 0
    report = json.loads((jobs.run_dir / number / "report.json").read_text())
    assert report
    plan = jobs.pretrain(
        "plan", str(jobs.config), "mesh.ep=1", "--gpus", "2", "--device", "cpu", "--json"
    )
    assert json.loads(plan)["hours"] > 0
    assert "measured on" in json.loads(plan)["hours_basis"]
