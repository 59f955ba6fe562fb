"""A batch job of 2,000 steps, a rank of which is killed every so often, comes to what nothing
disturbed. Seven minutes. SOAK_SEED: as in tests/slow/test_soak.py."""

from __future__ import annotations

import random

from tests.helpers.jobs import Job
from tests.helpers.runs import metrics, saved
from tests.helpers.slurm import ENDED, Batch
from tests.helpers.soak import SEED, SETTINGS, disturb


def test_a_long_run_comes_to_the_same_whoever_is_killed(trainer, tmp_path):
    whole, run = tmp_path / "whole", tmp_path / "run"
    Job(trainer.arguments(whole, **SETTINGS), ranks=2, log=tmp_path / "whole.log").finish(
        seconds=3600
    )
    job = Batch(
        "pretrain_router.sbatch",
        *trainer.arguments(run, **SETTINGS),
        folder=tmp_path / "job",
        options=("--nodes=2", "--ntasks-per-node=1"),
    )
    kills = disturb(
        run,
        random.Random(SEED),
        ranks=lambda: job.ranks().values(),
        goes_on=lambda: job.field("JobState") not in ENDED,
    )
    assert job.status() == 0, f"SOAK_SEED={SEED}: {job.text()}"
    assert kills > 3, f"SOAK_SEED={SEED}: too few kills to show anything"
    assert job.text().count(f"Job {job.number}, start ") == kills + 1
    assert metrics(run) == metrics(whole), f"SOAK_SEED={SEED}"
    assert saved(run) == saved(whole), f"SOAK_SEED={SEED}"
