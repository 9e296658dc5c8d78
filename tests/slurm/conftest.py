"""One throw-away Slurm and one tiny data set for all tests of this folder."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_pipeline.encode import encode
from tests.slurm.cluster import INSTALL, Cluster, missing
from tests.slurm.jobs import Jobs


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Skips where Slurm is not installed; fails instead where REQUIRE_SLURM is set, as CI does."""
    absent = missing()
    if absent:
        text = f"Slurm is not installed ({', '.join(absent)} not found): {INSTALL}"
        if os.environ.get("REQUIRE_SLURM"):
            pytest.fail(text)
        pytest.skip(text)
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder:  # pytest's own paths are too long
        throw_away = Cluster(Path(folder))
        throw_away.start()
        try:
            yield throw_away
        finally:
            throw_away.stop()


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "digits"
    encode("digits", path, codec="haar2", limit=200)
    return path


@pytest.fixture
def jobs(cluster: Cluster, digits: Path, tmp_path: Path) -> Iterator[Jobs]:
    """Submits the shipped scripts from the checkout; what still runs at the end is cancelled."""
    mine = Jobs(cluster, tmp_path, digits)
    yield mine
    mine.cancel()
    cluster.until("the cluster is free again", lambda: cluster.idle() == 3, 30)
    cluster.ask_before_preemption(True)


@pytest.fixture(scope="session")
def undisturbed(cluster: Cluster, digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    """The job that nothing happens to, as shipped: health check, training, pictures."""
    jobs = Jobs(cluster, tmp_path_factory.mktemp("undisturbed"), digits)
    number = jobs.train()
    assert jobs.wait(number) == "COMPLETED", jobs.log(number) + jobs.ranks()
    return jobs
