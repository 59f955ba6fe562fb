"""2,000 steps, a rank of which is killed every so often; they come to what nothing disturbed.

Eight minutes of processor time; 17 minutes on two cores that had other work. In batch jobs:
tests/slurm/test_soak.py.

SOAK_SEED  when, and which rank, in seconds and at random (default: 17); a failure tells it.
"""

from __future__ import annotations

import random

import pytest

from tests.helpers.jobs import Job
from tests.helpers.runs import Trainer, metrics, saved
from tests.helpers.soak import SEED, SETTINGS, disturb

pytestmark = pytest.mark.usefixtures("single_process")
RESTARTS = 2  # torchrun's own; after more kills the command is given again


def test_a_long_run_comes_to_the_same_whoever_is_killed(tmp_path):
    trainer, generator = Trainer(tmp_path), random.Random(SEED)
    whole, run = tmp_path / "whole", tmp_path / "run"

    def start(folder, name: str) -> Job:
        options = [f"--max-restarts={RESTARTS}"]
        arguments = trainer.arguments(folder, **SETTINGS)
        return Job(arguments, ranks=2, log=tmp_path / f"{name}.log", options=options)

    start(whole, "whole").finish(seconds=3600)
    kills, jobs, job = 0, 0, None
    while job is None or job.process.wait() != 0:
        jobs += 1
        assert jobs < 20, f"SOAK_SEED={SEED}: {job and job.log.read_text()}"
        job = start(run, str(jobs))
        kills += disturb(
            run, generator, ranks=job.ranks, goes_on=lambda job=job: job.process.poll() is None
        )
    assert kills > 3, f"SOAK_SEED={SEED}: too few kills to show anything"
    assert metrics(run) == metrics(whole), f"SOAK_SEED={SEED}"
    assert saved(run) == saved(whole), f"SOAK_SEED={SEED}"
