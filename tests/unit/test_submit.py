"""`pretrain submit`: what the script it writes says; Slurm itself is in tests/slurm."""

import json
from pathlib import Path

import pytest

from pretrain.cluster import submit
from pretrain.config import ConfigError
from tests import tiny

TEXT = """#!/bin/bash
# what it does
#SBATCH --job-name=old
#SBATCH --nodes=2
#SBATCH --exclusive

# shellcheck source=slurm/lib.sh
source "${PRETRAIN_ROOT:-$SLURM_SUBMIT_DIR}/slurm/lib.sh"

settings configs/udit_xl_moe.yaml "$@"
"""


def test_options_replace_lines_and_new_ones_follow_the_last() -> None:
    known = {"nodes": "4", "job-name": "mine"}
    script = submit.resolve(TEXT, Path("/r/code/1"), ["steps=5"], known, ["--qos=high", "--hold"])
    lines = [line for line in script.splitlines() if line.startswith("#SBATCH")]
    assert lines == [
        "#SBATCH --job-name=mine",
        "#SBATCH --nodes=4",
        "#SBATCH --exclusive",
        "#SBATCH --qos=high",
        "#SBATCH --hold",
    ]
    assert "set -- steps=5\n" in script
    assert 'source "$PRETRAIN_CODE/slurm/lib.sh"' in script


def test_an_argument_with_blanks_stays_one() -> None:
    script = submit.resolve(TEXT, Path("/r"), ["run_dir=/a b", "ema.power=[0.1, 0.2]"], {}, [])
    assert "set -- 'run_dir=/a b' 'ema.power=[0.1, 0.2]'\n" in script


@pytest.mark.parametrize("option", ["qos=high", "-p main", "--time=", "--a;b=1"])
def test_an_option_that_is_none_is_refused(option: str) -> None:
    with pytest.raises(submit.SubmitError, match="expected --name=value"):
        submit.resolve(TEXT, Path("/r"), [], {}, [option])


def test_a_job_is_planned_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PRETRAIN_SITE", str(tmp_path / "site"))
    path = tiny.write(tmp_path, "udit-moe", tmp_path / "nothing", mesh__ep=2)
    before = sorted(tmp_path.rglob("*"))
    job = submit.prepare(path, ["steps=7"], nodes=2, gpus_per_node=2)
    assert job.plan["ranks"] == 4
    assert job.plan["hours"] > 0
    assert job.plan["gpu_hours"] == pytest.approx(4 * job.plan["hours"])
    assert any("does not exist" in remark for remark in job.remarks)  # the data
    assert "steps=7" in job.script
    assert f"run_dir={tmp_path}/run" in job.script
    assert sorted(tmp_path.rglob("*")) == before


def test_a_wrong_run_is_refused_before_it_waits_in_a_queue(tmp_path: Path) -> None:
    path = tiny.write(tmp_path, "dit", tmp_path / "nothing")
    with pytest.raises(ConfigError, match="global_batch"):
        submit.prepare(path, ["data.global_batch=7"], nodes=2, gpus_per_node=2)


def test_bad_nodes_are_named_and_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRETRAIN_SITE", str(tmp_path))
    record = {"time": 1.7e9, "node": "node7", "check": "disk space", "why": "full", "job": "3"}
    (tmp_path / "bad_nodes.jsonl").write_text(json.dumps(record) + "\n")
    path = tiny.write(tmp_path, "dit", tmp_path / "nothing")
    named = submit.prepare(path, [], nodes=1, gpus_per_node=1)
    left_out = submit.prepare(path, [], nodes=1, gpus_per_node=1, exclude_bad=True)
    assert "--exclude" not in named.script
    assert any("node7" in remark and "disk space" in remark for remark in named.remarks)
    assert "#SBATCH --exclude=node7\n" in left_out.script


def test_a_broken_record_of_bad_nodes_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PRETRAIN_SITE", str(tmp_path))
    (tmp_path / "bad_nodes.jsonl").write_text('{"node": "node7"}\n')
    with pytest.raises(submit.SubmitError, match="broken"):
        submit.bad_nodes()
