"""Conversion holds a few of the largest tensors, not the model."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LARGEST = 32000 * 4096 * 2  # bytes: the embedding of the benchmark's model


def test_anonymous_memory_is_bounded_by_a_few_tensors(tmp_path):
    command = [sys.executable, "tools/benchmark/conversion.py", "--gigabytes", "2.5"]
    done = subprocess.run(
        [*command, "--folder", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    found = dict(re.findall(r"^(to \S+(?: \S+)?) .* (\d+) MB anonymous", done.stdout, re.MULTILINE))
    assert len(found) == 2, done.stdout
    assert all(int(size) * 1e6 < 3 * LARGEST for size in found.values()), found
