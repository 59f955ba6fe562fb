"""Every way of the training benchmark, on one rank and on two."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.runs import Trainer

ROOT = Path(__file__).resolve().parents[2]
WITHOUT_GRADIENT = {"full", "sparse"}


@pytest.fixture(scope="module")
def trainer(tmp_path_factory, single_process):
    return Trainer(tmp_path_factory.mktemp("benchmark"))


@pytest.mark.parametrize("ranks", [(), ("--nproc", "2"), ("--nproc", "2", "--pipeline", "2")])
def test_ways_agree(trainer, tmp_path, ranks):
    report = tmp_path / "report.json"
    command = [
        sys.executable, "tools/benchmark/training.py", "--hf-path", trainer.hf,
        "--data", trainer.text, "--batch", "4", "--micro-batch", "2", "--max-length", "64",
        "--steps", "1", "--rounds", "1", "--threads", "1", "--json", report, *ranks,
    ]  # fmt: skip
    subprocess.run([str(word) for word in command], cwd=ROOT, check=True)
    found = json.loads(report.read_text())
    for way, figures in found["ways"].items():
        difference = figures["router_gradient_max_rel"]
        assert difference is None if way in WITHOUT_GRADIENT else difference < 1e-5
    counted = {way: figures["mflop_per_token"] for way, figures in found["ways"].items()}
    assert counted["published"] > counted["published_stop"] >= counted["recompute"]
    assert counted["recompute"] > max(counted["cached"], counted["sparse"])
    capacity = found["conditions"]["capacity"]["sparse"]
    assert capacity == pytest.approx(0.5, abs=0.2)
    assert found["conditions"]["prefix_filling"]["tokens"] > 0
