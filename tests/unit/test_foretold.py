"""What a run says of its plan, and what it says when memory ran out."""

from pathlib import Path

import pytest
import torch

from pretrain import config, foretold
from tests import tiny


def test_the_second_record_is_held_against_the_plan(tmp_path: Path) -> None:
    cfg = config.load(tiny.write(tmp_path, "dit", tmp_path), [])
    said: list[str] = []
    held = foretold.Foretold(cfg, 1, torch.device("cpu"))
    for values in ({}, {"step_time": 1.0}, {}, {"step_time": 2.5}, {"step_time": 9.0}):
        held.compare(values, said.append)
    assert len(said) == 1
    assert said[0].startswith("plan: memory ")
    assert "a step took 2.5 s" in said[0]


def test_what_would_fit_needs_clearly_less_than_what_did_not() -> None:
    words = ["data.global_batch=256", "mesh.dp_shard=null"]
    cfg = config.load("configs/dit_xl2_in256.yaml", words)
    said = foretold.fitting(cfg, 1, "h100")
    assert "GB are needed; less would be, fastest first: " in said
    assert "accum=" in said or "remat.mode=" in said
    huge = config.load("configs/dit_moe_xl_in256.yaml", ["model.size=G/2-16E2A"])
    assert "nothing fits" in foretold.fitting(huge, 1, "h100")


@pytest.mark.skipif(torch.cuda.is_available(), reason="for a device that is not in the table")
def test_of_an_unknown_device_only_the_cures_are_named(tmp_path: Path) -> None:
    cfg = config.load(tiny.write(tmp_path, "dit", tmp_path), [])
    assert foretold.fitting(cfg, 1).startswith("Nothing is known of this device's memory")
