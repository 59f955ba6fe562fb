"""The shipped recipe on the real model lands where the README says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_capacity_lands_on_target_on_held_out_text(tmp_path):
    out = tmp_path / "quickstart"
    subprocess.run(
        [sys.executable, str(ROOT / "launch/quickstart.py"), "--out", str(out)], check=True
    )
    report = json.loads((out / "report.json").read_text())
    assert abs(report["capacity"]["mean"] - report["capacity"]["target"]) <= 0.05
    assert report["train"]["frozen_parameters_changed"] == 0
    assert max(report["parity"].values()) <= 2e-5
