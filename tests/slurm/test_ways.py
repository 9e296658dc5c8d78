"""Other ways to start the same training: torchrun, a container, other scripts; and its scores."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from tests.slurm.jobs import Jobs, assert_same_end

pytestmark = pytest.mark.slow

# An srun without enroot and pyxis: it notes the words it got and leaves out the container's.
SRUN = """#!/bin/bash
printf '%s\\n' "$@" >>"{noted}"
words=()
for word in "$@"; do
  [[ $word == *-container-* ]] || words+=("$word")
done
exec {srun} "${{words[@]}}"
"""


def test_torchrun_in_a_container_ends_the_same(jobs: Jobs, undisturbed: Jobs) -> None:
    srun = shutil.which("srun", path=jobs.cluster.env["PATH"])
    noted, stand_in = jobs.folder / "noted", jobs.folder / "bin" / "srun"
    stand_in.parent.mkdir()
    stand_in.write_text(SRUN.format(noted=noted, srun=srun))
    stand_in.chmod(0o755)
    number = jobs.submit(
        "dit_moe_xl",
        f"config={jobs.config}",
        f"run_dir={jobs.run_dir}",
        options=("--nodes=2",),
        LAUNCHER="torchrun",
        CONTAINER_IMAGE="some.sqsh",
        CONTAINER_MOUNTS="/data:/data",
        PRETRAIN_PYTHON=sys.executable,
        PATH=f"{stand_in.parent}:{jobs.cluster.env['PATH']}",
    )
    assert_same_end(jobs, number, undisturbed)
    words = noted.read_text().splitlines()
    assert "--container-image=some.sqsh" in words
    (mounts,) = {word for word in words if word.startswith("--container-mounts=")}
    assert mounts.endswith(",/data:/data")
    assert f"{jobs.run_dir}:{jobs.run_dir}" in mounts
    logs = sorted(p.parent.name for p in (jobs.run_dir / "logs").rglob("stderr.log"))
    assert logs == ["0", "0", "1", "1"]  # two nodes, two ranks each


def test_pictures_and_scores_of_a_run(jobs: Jobs, undisturbed: Jobs, tmp_path: Path) -> None:
    run = tmp_path / "copy"
    shutil.copytree(undisturbed.run_dir, run)
    words = (f"from={run}", "count=20", "steps=2", "weights=model")
    number = jobs.submit("sample_eval", *words, options=("--cpus-per-task=1",))
    assert jobs.wait(number) == "COMPLETED", jobs.log(number)
    assert (run / "samples" / "sample.png").stat().st_size > 1000
    assert json.loads((run / "scores.json").read_text())["n"] == 20


def test_a_small_model_by_its_own_script(jobs: Jobs) -> None:
    words = (f"config={jobs.config}", f"run_dir={jobs.run_dir}", "mesh.ep=1", "steps=2")
    words += ("sample.every=0",)
    number = jobs.submit("udit_l", *words, options=("--nodes=1",), GPUS_PER_NODE="1")
    assert jobs.wait(number) == "COMPLETED", jobs.log(number) + jobs.ranks()
    assert (jobs.run_dir / "done").read_text() == "2\n"
