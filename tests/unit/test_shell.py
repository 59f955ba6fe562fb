"""The shell scripts, as far as ShellCheck can tell."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = [
    *sorted(
        path.relative_to(ROOT).as_posix()
        for folder in ("launch", "tests", "tools")
        for pattern in ("*.sh", "*.sbatch")
        for path in (ROOT / folder).rglob(pattern)
    ),
    ".ci/run",
]


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="needs shellcheck")
def test_shellcheck_finds_nothing():
    done = subprocess.run(["shellcheck", *SCRIPTS], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
