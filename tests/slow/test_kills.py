"""``kill -9`` of a rank or of torchrun at twenty random moments, saves included."""

from __future__ import annotations

import random
import time

import pytest

from tests.helpers.jobs import Job, wait_for_step
from tests.helpers.runs import Trainer, metrics

KILLS = 20
RANKS = 2


def wait_for(job: Job, text: str, *, seconds: int = 200) -> None:
    deadline = time.monotonic() + seconds
    while text not in job.log.read_text():
        assert job.process.poll() is None, job.log.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.usefixtures("single_process")
def test_a_run_survives_twenty_kills(tmp_path):
    trainer = Trainer(tmp_path)
    settings = {"train__steps": 4000, "checkpoint__interval": 1}
    run, generator, killed = tmp_path / "run", random.Random(6), []
    arguments = trainer.arguments(run, **settings)
    while len(killed) < KILLS:
        job = Job(arguments, ranks=RANKS, log=tmp_path / f"{len(killed)}.log")
        if generator.random() < 0.2:  # while it starts
            time.sleep(generator.uniform(0, 10))
        else:  # while it trains, which is mostly saving here
            wait_for(job, "  loss ")
            time.sleep(generator.uniform(0, 4))
        assert job.process.poll() is None, job.log.read_text()
        victim = generator.choice([job.process.pid, *job.ranks()])
        job.kill(victim)
        steps = sorted(int(path.name[5:]) for path in run.glob("step_*"))
        killed.append(steps[-1] if steps else 0)
    assert killed == sorted(killed)
    assert killed[-1] > killed[0]
    job = Job(arguments, ranks=RANKS, log=tmp_path / "last.log")
    wait_for_step(run, killed[-1] + 3)
    job.kill(job.process.pid)
    found = metrics(run)
    assert [line["step"] for line in found] == list(range(1, len(found) + 1))
    job = Job(trainer.arguments(tmp_path / "whole", **settings), ranks=RANKS, log=tmp_path / "log")
    wait_for_step(tmp_path / "whole", len(found) + 1, seconds=600)
    job.kill(job.process.pid)
    assert found == metrics(tmp_path / "whole")[: len(found)], "to the last bit, whatever happened"
