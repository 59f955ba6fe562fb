"""A job killed in the middle of its run; tests/slow kills one twenty times."""

from __future__ import annotations

import pytest

from tests.helpers.jobs import Job, wait_for_step
from tests.helpers.runs import Trainer, metrics


@pytest.mark.slow
@pytest.mark.usefixtures("single_process")
def test_after_kill_9_of_torchrun_the_same_command_goes_on(tmp_path):
    trainer = Trainer(tmp_path)
    settings = {"train__steps": 30, "checkpoint__interval": 1, "checkpoint__keep": 2}
    trainer.train(tmp_path / "whole", **settings)
    run = tmp_path / "run"
    arguments = trainer.arguments(run, **settings)
    job = Job(arguments, ranks=2, log=tmp_path / "first.log")
    wait_for_step(run, 5)
    job.kill(job.process.pid)
    assert not (run / "summary.json").exists(), "killed too late to show anything"
    output = Job(arguments, ranks=2, log=tmp_path / "second.log").finish()
    assert "Going on after step" in output
    whole, found = metrics(tmp_path / "whole"), metrics(run)
    assert [line["step"] for line in found] == list(range(1, 31))
    for line, expected in zip(found, whole, strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-4)
    assert sorted(p.name for p in run.iterdir() if p.name.startswith((".", "step"))) == [
        "step_00000029", "step_00000030"
    ]  # fmt: skip
