"""Some of the torture table in `make test`, more in `make slow`; and that its judges see faults."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.order import Order
from data_pipeline.shards import Manifest
from tests.torture.cases import DP2, STEPS, Case, drawn
from tests.torture.harness import BATCH, Bench, may_mount, samples
from tests.torture.hurts import Hurt

QUICK = (
    "killed in the flush dp2 dp2",
    "SIGTERM twice at once dp2 1",
    "manifest bit-flipped dp2 dp2",
)
SLOW = (
    "one rank killed dp2 dp3",
    "all killed ZeRO-2×ep2 ZeRO-2×ep2",
    "killed in a save: copy ep2 ZeRO-2",
    "killed in a save: at a byte dp2 dp2",
    "killed in a save: before rename dp2 dp2",
    "killed in a save: after rename ep2 ep2",
    "SIGTERM in the flush dp2 dp2",
    "stop file ep2 ep2×tp2",
    "disk full: no room dp2 dp2",
    "disk full: write fails (EFBIG) ZeRO-2×ep2 ZeRO-2×ep2",
    "loader worker killed dp2 dp2",
    "file bit-flipped dp2 ZeRO-2",
    "newest half-written dp2 dp2",
    "shard deleted ep2 dp2",
    "NaN batch dp2 dp2",
)


def _name(case: Case) -> str:
    return f"{case.name} {case.start.name} {case.then.name}"


BY_NAME = {_name(case): case for case in reversed(drawn(0))}
CASES = [
    *(("dit-moe", name) for name in QUICK),
    *(pytest.param("udit-moe", name, marks=pytest.mark.slow) for name in (*QUICK, *SLOW)),
]


@pytest.fixture(scope="module")
def bench(
    request: pytest.FixtureRequest, digits: Path, tmp_path_factory: pytest.TempPathFactory
) -> Bench:
    return Bench(digits, tmp_path_factory.mktemp("torture"), model=request.param)


@pytest.mark.parametrize(("bench", "name"), CASES, indirect=["bench"])
def test_a_hurt_run_ends_as_the_calm_one(name: str, bench: Bench) -> None:
    case = BY_NAME[name]
    if case.disk and not may_mount(bench.folder):
        pytest.skip("this user may not mount a file system")
    outcome = bench.torture(case)
    assert not outcome.wrong, "\n".join(outcome.wrong)


def test_at_least_thirty_runs_are_hurt_and_each_seed_hurts_others() -> None:
    assert len(drawn(0)) >= 30
    assert drawn(0) == drawn(0)
    assert drawn(0) != drawn(1)
    assert sum(not case.same for case in drawn(0)) >= 10


@pytest.mark.slow
@pytest.mark.parametrize("bench", ["udit-moe"], indirect=True)
def test_a_run_that_was_not_hurt_and_one_that_ends_differently_are_red(bench: Bench) -> None:
    never = Hurt("kill all", "forward", STEPS + 5)
    outcome = bench.torture(Case("none", DP2, DP2, "all killed", (never,)))
    assert "the run was never hurt" in outcome.wrong
    bad, kill = Hurt("nan", "loss", 3), Hurt("kill all", "forward", 6)
    outcome = bench.torture(Case("bad", DP2, DP2, "all killed", (bad, kill)))
    assert "other losses" in outcome.wrong
    assert any(problem.startswith("other digests") for problem in outcome.wrong)


def test_a_lost_a_repeated_and_a_wrong_sample_are_seen(digits: Path, tmp_path: Path) -> None:
    info = Manifest.load(digits)
    order = Order(info.split("train").count, info.lanes, 0, "samples")
    steps, half = range(1, STEPS + 1), BATCH // 2
    lines: list[dict[str, Any]] = [
        {"step": s, "position": (s - 1) * BATCH, "slots": list(range(a, a + half))}
        for a in (0, half)
        for s in steps
    ]
    for line in lines:
        line["samples"] = order.samples(line["position"] + np.array(line["slots"])).tolist()

    def judged(logged: list[dict[str, Any]]) -> str:
        (tmp_path / "seen").mkdir(exist_ok=True)
        file = tmp_path / "seen" / "rank_00000.jsonl"
        file.write_text("".join(json.dumps(line) + "\n" for line in logged))
        return samples(tmp_path, digits)[1]

    assert judged(lines) == ""
    assert judged(lines[1:]) == f"{half} samples lost, 0 seen twice"
    assert judged([*lines, lines[3]]) == f"0 samples lost, {half} seen twice"
    assert "other samples" in judged([*lines[1:], lines[0] | {"samples": lines[1]["samples"]}])
    assert "position" in judged([*lines[1:], lines[0] | {"position": 5}])
