"""2,000 steps, a rank of which is killed every so often; they come to what nothing disturbed.

Eight minutes of processor time; 17 minutes on two cores that had other work.

SOAK_SEED  when, and which rank, in seconds and at random (default: 17); a failure tells it.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.jobs import Job, is_alive
from tests.helpers.runs import Trainer, metrics, saved

pytestmark = pytest.mark.usefixtures("single_process")
SEED = int(os.environ.get("SOAK_SEED", "17"))
STEPS, RANKS, RESTARTS = 2000, 2, 2  # torchrun's own; after more kills the command is given again
STEPS_BETWEEN_KILLS = (100, 400)
Start = Callable[[list[str], Path], Job]


def with_torchrun(arguments: list[str], log: Path) -> Job:
    return Job(arguments, ranks=RANKS, log=log, options=[f"--max-restarts={RESTARTS}"])


def steps_of(run: Path) -> int:
    """The last step that the run has recorded."""
    path = run / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def wait_for_steps(job: Job, run: Path, step: int) -> bool:
    """Wait until a step is recorded, or the job has ended; whether it was recorded first."""
    while steps_of(run) < step:
        if job.process.poll() is not None:
            return False
        time.sleep(0.5)
    return True


def kill_one(job: Job, generator: random.Random) -> None:
    """Kill a rank, and wait until the others are gone too."""
    ranks = job.ranks()
    if not ranks:  # between two starts
        return
    os.kill(generator.choice(ranks), signal.SIGKILL)
    while any(map(is_alive, ranks)):
        job.process.poll()
        time.sleep(0.2)


@pytest.mark.parametrize("start", [with_torchrun])
def test_a_long_run_comes_to_the_same_whoever_is_killed(tmp_path, start: Start):
    trainer, generator = Trainer(tmp_path), random.Random(SEED)
    settings = {"train__steps": STEPS, "checkpoint__interval": 50, "logging__interval": 1}
    whole, run = tmp_path / "whole", tmp_path / "run"
    start(trainer.arguments(whole, **settings), tmp_path / "whole.log").finish(seconds=3600)
    kills, jobs, job = 0, 0, None
    while job is None or job.process.wait() != 0:
        jobs += 1
        assert jobs < 20, f"SOAK_SEED={SEED}: {job and job.log.read_text()}"
        job = start(trainer.arguments(run, **settings), tmp_path / f"{jobs}.log")
        # A run that goes on drops what it recorded after its checkpoint first.
        while wait_for_steps(job, run, steps_of(run) + generator.randint(*STEPS_BETWEEN_KILLS)):
            kill_one(job, generator)
            kills += 1
    assert kills > 3, f"SOAK_SEED={SEED}: too few kills to show anything"
    assert metrics(run) == metrics(whole), f"SOAK_SEED={SEED}"
    assert saved(run) == saved(whole), f"SOAK_SEED={SEED}"
