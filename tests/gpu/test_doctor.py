"""What the doctor says on a machine with GPUs."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def test_gpus_kernels_and_nccl():
    done = subprocess.run(
        [sys.executable, "-m", "megatron_mod.doctor", "--json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    found = json.loads(done.stdout)
    assert len(found["torch"]["gpus"]) == torch.cuda.device_count()
    assert found["torch"]["gpus"][0]["name"] == torch.cuda.get_device_name(0)
    assert found["collective"]["backend"] == "nccl"
    assert found["uses"]["communication"] == {"what": "nccl", "better": None, "why_not": None}
    engine = find_spec("transformer_engine") is not None
    for part in ("attention", "norms", "optimizer"):
        used = found["uses"][part]
        assert ("(Transformer Engine)" in used["what"]) == engine, used
        assert (used["why_not"] is None) == engine, used
