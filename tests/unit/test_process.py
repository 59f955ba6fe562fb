"""How a script ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_mod.process import STOPPED

ROOT = Path(__file__).resolve().parents[2]
START = f"""
import os, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
from megatron_mod.process import Stopped, catch_signals, one_message, run_command
"""


def script(folder: Path, text: str) -> Path:
    path = folder / "script.py"
    path.write_text(START + text)
    return path


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ("raise ValueError('no')", 2, "error: no\n"),
        ("raise Stopped('saved')", STOPPED, "saved\n"),
        ("os.kill(os.getpid(), signal.SIGINT); time.sleep(9)", 130, "Interrupted.\n"),
    ],
)
def test_one_line_and_a_status(tmp_path, body, status, said):
    path = script(tmp_path, f"with one_message():\n    {body}\n")
    done = subprocess.run([sys.executable, path], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (status, said)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_what_a_script_runs_ends_first(tmp_path, number):
    child = (
        "import signal, sys, time\n"
        "def end(*_):\n    time.sleep(0.6); print('saved', flush=True); sys.exit(3)\n"
        "signal.signal(signal.SIGTERM, end); signal.signal(signal.SIGINT, end)\n"
        "print('up', flush=True); time.sleep(30)\n"
    )
    path = script(
        tmp_path, f"with one_message():\n    run_command([sys.executable, '-c', {child!r}])\n"
    )
    job = subprocess.Popen(
        [sys.executable, path], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip
    assert job.stdout.readline() == "up\n"
    # A terminal's Ctrl-C goes to all.
    (os.killpg if number == signal.SIGINT else os.kill)(job.pid, number)
    assert job.stdout.read() == "saved\nInterrupted.\n"
    assert job.wait() == 130


# They meet first: torchrun ends, and reports, those that have not begun when the first one leaves.
RANKS = """
with one_message():
    catch_signals()
    rank = int(os.environ["RANK"])
    open(f"rank{{rank}}", "w").close()
    while not all(os.path.exists(f"rank{{other}}") for other in range(3)):
        time.sleep(0.01)
    {body}
"""


def torchrun(path: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=3", path],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=200, cwd=path.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 1
    return done.stdout


@pytest.mark.parametrize(
    ("body", "message", "times"),
    [
        pytest.param("raise ValueError('all of us')", "all of us", 2, id="all ranks"),
        pytest.param(
            "if rank == 1: 1 / 0\n    time.sleep(60)",
            "ZeroDivisionError: division by zero",
            2,
            id="a bug in one rank",
        ),
        pytest.param(
            "if rank == 2: os.kill(os.getpid(), signal.SIGUSR1)\n    time.sleep(60)",
            "Stopped by SIGUSR1 before its first step; run the same command again.",
            2,
            id="a signal for one rank",
        ),
    ],
)
def test_torchruns_report_ends_with_the_message_and_names_nobody_else(
    tmp_path, body, message, times
):
    printed = torchrun(script(tmp_path, RANKS.format(body=body)))
    assert printed.rstrip().splitlines()[-2].endswith(message), printed
    assert printed.count(message) == times, printed  # the rank's own, and the report's
    assert "<NO_OTHER_FAILURES>" in printed
