"""The health check: which node it names, for what; jobs that it ends are in tests/slurm."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from pretrain import config
from pretrain.cluster import health
from pretrain.config import ConfigError
from tests import ranks, tiny


def slow(*met: str) -> dict[tuple[str, ...], bool]:
    """Meetings as `a`, `ab`; those that are slow end in !."""
    return {tuple(name.rstrip("!")): name.endswith("!") for name in met}


@pytest.mark.parametrize(
    ("met", "blamed"),
    [
        (["a", "b", "ab"], ""),
        (["ab!"], "ab"),  # of two nodes nobody can tell
        (["ab!", "bc!", "ca"], "b"),
        (["ab", "bc!", "cd!", "da"], "c"),
        (["ab!", "bc!", "cd!", "da"], "bc"),
        (["ab", "bc!", "cd", "da"], "bc"),  # the link between them
        (["ab!", "bc!", "ca!"], "abc"),
        (["a", "b!", "ab!"], "b"),
        (["a", "b!", "ab!", "bc!", "ca"], "b"),
        (["a", "b!", "c", "ab!", "bc!", "ca!"], "abc"),
    ],
)
def test_a_slow_pair_blames_the_node_that_is_the_cause(met: list[str], blamed: str) -> None:
    assert health.at_fault(slow(*met)) == set(blamed)


@pytest.mark.parametrize(
    ("names", "rounds"),
    [
        ("a", []),
        ("ab", [["ab"]]),
        ("abc", [["ab"], ["bc"], ["ca"]]),
        ("abcd", [["ab", "cd"], ["bc", "da"]]),
        ("abcde", [["ab", "cd"], ["bc", "de"], ["ea"]]),
    ],
)
def test_no_node_is_in_two_pairs_of_a_round(names: str, rounds: list[list[str]]) -> None:
    pairs = [tuple(pair) for together in rounds for pair in together]
    assert health._meetings(list(names)) == [*((name,) for name in names), *pairs]


def test_a_device_that_fails_or_is_slow_in_a_product_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(device: torch.device, rounds: int) -> float:
        raise torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered")

    monkeypatch.setattr(health, "_gathered", lambda rate: [rate, 700.0, 700.0])
    device = torch.device("cuda", 3)
    for rate, why in ((700.0, None), (400.0, "cuda:3: 400 TFLOP/s, the others 700")):
        monkeypatch.setattr("parallel.links.own_tflops", lambda *_, rate=rate: rate)
        found = health._product_is_quick(device)
        assert [(p.check, p.why) for p in found] == ([("matrix product", why)] if why else [])
    monkeypatch.setattr("parallel.links.own_tflops", fails)
    (problem,) = health._product_is_quick(device)
    assert problem.check == "matrix product"
    assert "ECC" in problem.why


def test_ranks_did_not_meet_is_said_of_errors_of_talking_alone() -> None:
    lost = dist.DistNetworkError("Connection closed by peer")
    assert health._broken(lost).check == "meet"
    broken = torch.AcceleratorError("CUDA error: misaligned address")
    assert health._broken(broken).check == "devices"


@pytest.mark.parametrize("text", ["45", "45;12", "fast,slow", "-1,12", "nan,1", "1,2,3"])
def test_floors_that_are_none_are_refused(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEALTH_FLOORS", text)
    cfg = config.load(tiny.write(tmp_path, "dit", tmp_path / "nothing"), [])
    with pytest.raises(ConfigError, match="HEALTH_FLOORS"):
        health.fit(cfg, tmp_path / "report")


def _on_a_node_each(path: Path, report: Path, floors: str) -> None:
    os.environ.update(SLURMD_NODENAME=f"node{os.environ['RANK']}", HEALTH_FLOORS=floors)
    raise SystemExit(not health.fit(config.load(path, []), report))


def test_links_below_the_floors_of_the_site_are_named(tmp_path: Path, digits: Path) -> None:
    path = tiny.write(tmp_path, "dit", digits, data__global_batch=12)
    good, bad = tmp_path / "good", tmp_path / "bad"
    ranks.run(_on_a_node_each, 3, path, good, "1000000,0", log=tmp_path / "log")
    assert (good / health.PASSED).exists()
    codes = ranks.wait(ranks.start(_on_a_node_each, 3, path, bad, "0,1000000"))
    assert codes == [1, 1, 1]
    assert not (bad / health.PASSED).exists()
    for rank, others in enumerate(((1, 2), (0, 2), (0, 1))):
        said = (bad / f"node{rank}.rank{rank}").read_text().splitlines()
        assert all(line.startswith("all-reduce\t") for line in said)
        assert all("at least 1e+06 wanted" in line for line in said)
        named = {name for line in said for name in line.split(":")[0].split("\t")[1].split(" and ")}
        assert named == {f"node{n}" for n in (rank, *others)}
