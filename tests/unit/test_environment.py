"""Which torch launch/environment.sh installs; pip, python and the machine are played."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PLAYED = """#!/bin/bash
case "$*" in
  "-c import torch") exit 1 ;;
  *+cpu*) echo "$@" >> {log}; exit {cpu} ;;
  *) echo "$@" >> {log} ;;
esac
"""


def installs(tmp_path: Path, *, gpu: bool, has_cpu_build: bool = True, **environment: str):
    """What pip is asked for before the package itself, and what is said."""
    log, binaries = tmp_path / "log", tmp_path / "bin"
    binaries.mkdir()
    for name, text in (
        ("python", PLAYED.format(log=log, cpu=0 if has_cpu_build else 1)),
        ("nvidia-smi", f"#!/bin/bash\nexit {0 if gpu else 9}\n"),
        ("uname", "#!/bin/bash\necho Linux x86_64\n"),
    ):
        (binaries / name).write_text(text)
        (binaries / name).chmod(0o755)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", ". launch/environment.sh test"],
        cwd=ROOT, text=True, capture_output=True, check=True,
        env={"PATH": f"{binaries}:{os.environ['PATH']}", "VIRTUAL_ENV": "/v", **environment},
    )  # fmt: skip
    start = "-m pip install --quiet --disable-pip-version-check "
    asked = [line.removeprefix(start) for line in log.read_text().splitlines()]
    assert asked[-1].startswith("--use-pep517 --editable")
    return asked[:-1], done.stderr


no_gpu = pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="a machine with a GPU")


def test_with_a_gpu_the_default_build(tmp_path):
    assert installs(tmp_path, gpu=True) == (["torch==2.13.0"], "")


@no_gpu
def test_without_a_gpu_the_cpu_build(tmp_path):
    assert installs(tmp_path, gpu=False) == (["torch==2.13.0+cpu"], "")


@no_gpu
def test_where_there_is_no_cpu_build_it_is_said_what_comes(tmp_path):
    asked, said = installs(tmp_path, gpu=False, has_cpu_build=False)
    assert asked == ["torch==2.13.0+cpu", "torch==2.13.0"]
    assert "several GB of CUDA libraries" in said
    assert 'MEGATRON_MOD_TORCH="torch==2.13.0 --index-url URL"' in said


def test_options_of_pip_may_come_along(tmp_path):
    asked, said = installs(
        tmp_path, gpu=False, MEGATRON_MOD_TORCH="torch==2.11.0 --index-url file:///here/*"
    )
    assert (asked, said) == (["torch==2.11.0 --index-url file:///here/*"], "")
