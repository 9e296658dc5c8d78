"""What several tests stand on: one small set of real digits, encoded once."""

import os
from pathlib import Path

import pytest
import torch

os.environ.setdefault("WANDB_MODE", "disabled")
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 16×8×8 latents of the built-in digits."""
    from data_pipeline.encode import encode

    out = tmp_path_factory.mktemp("data") / "digits"
    encode("digits", out, codec="haar2")
    return out


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Why: models of tests are so small that threads only wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
