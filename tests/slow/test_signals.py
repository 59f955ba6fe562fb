"""Signals at random moments, and stopped ranks, of real jobs."""

from __future__ import annotations

import os
import random
import signal
import time

import pytest

from tests.helpers.jobs import Job, wait_for_step
from tests.helpers.runs import Trainer, metrics

pytestmark = pytest.mark.usefixtures("single_process")
STEPS = 4000


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    return Trainer(tmp_path_factory.mktemp("signals"))


@pytest.mark.parametrize("topology", [{}, {"parallel__pipeline_model_parallel_size": 2}])
def test_no_signal_loses_a_step(trainer, tmp_path, topology):
    """To torchrun and to ranks, in steps, validations and saves; then as if nothing had been."""
    settings = {
        "train__steps": STEPS, "checkpoint__interval": 2, "train__validation_interval": 3,
        "data__validation": trainer.text, **topology,
    }  # fmt: skip
    run, generator, done = tmp_path / "run", random.Random(11), 0
    orders = [
        (number, target)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
        for target in ("torchrun", 0, 1)
        if (number, target) != (signal.SIGUSR1, "torchrun")  # it does not handle that one
    ]
    for turn, (number, target) in enumerate(orders):
        job = Job(trainer.arguments(run, **settings), ranks=2, log=tmp_path / f"{turn}.log")
        lines = len(metrics(run)) if run.exists() else 0
        wait_for_step(run, lines + 1)
        time.sleep(generator.uniform(0, 2))
        os.kill(job.process.pid if target == "torchrun" else job.rank(target), number)
        output = job.ends(seconds=100)
        assert f"Stopped by {number.name} after step " in output, output
        assert "Unable to shutdown process" not in output, output
        saved, found = int((run / "latest").read_text()[5:]), metrics(run)
        assert found[-1]["step"] == saved > done, "nothing after the last step was lost"
        done = saved
    whole = tmp_path / "whole"
    job = Job(trainer.arguments(whole, **settings), ranks=2, log=tmp_path / "whole.log")
    wait_for_step(whole, len(found) + 5, seconds=600)
    job.kill(job.process.pid)
    job = Job(trainer.arguments(run, **settings), ranks=2, log=tmp_path / "last.log")
    wait_for_step(run, len(found) + 3, seconds=600)
    job.kill(job.process.pid)
    assert metrics(run)[: len(found) + 3] == metrics(whole)[: len(found) + 3]


@pytest.mark.parametrize("stopped", [0, 1])
@pytest.mark.parametrize("topology", [{}, {"parallel__pipeline_model_parallel_size": 2}])
def test_a_stopped_rank_is_named_and_ends_the_job(trainer, tmp_path, topology, stopped):
    settings = {"train__steps": STEPS, "train__timeout": 0.3, **topology}
    run = tmp_path / "run"
    job = Job(trainer.arguments(run, **settings), ranks=2, log=tmp_path / "log")
    wait_for_step(run, 3)
    victim = job.rank(stopped)
    os.kill(victim, signal.SIGSTOP)
    output = job.ends(seconds=150)  # torchrun takes 30 of them to end the stopped one
    assert output.count(f"error: rank {stopped} (process {victim} on ") == 1, output
    assert f" : rank {stopped} (process {victim} on " in output, "the end of torchrun's report"
    assert f"error: rank {1 - stopped}" not in output
    assert "train.timeout = 0.3 minutes" in output


def test_a_second_ctrl_c_ends_at_once(trainer, tmp_path):
    """One rank stands still, so that there is nothing to agree on."""
    run = tmp_path / "run"
    job = Job(trainer.arguments(run, train__steps=STEPS), ranks=2, log=tmp_path / "log")
    wait_for_step(run, 3)
    stopped, other = job.rank(1), job.rank(0)
    os.kill(stopped, signal.SIGSTOP)
    os.kill(job.process.pid, signal.SIGINT)
    time.sleep(4)
    assert job.process.poll() is None
    assert "SIGINT: ending after this step, which is saved first; Ctrl-C again" in (
        job.log.read_text()
    )
    os.kill(job.process.pid, signal.SIGINT)
    deadline = time.monotonic() + 20
    while other in job.ranks() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert other not in job.ranks()
    os.kill(stopped, signal.SIGKILL)
    job.ends(seconds=60)
