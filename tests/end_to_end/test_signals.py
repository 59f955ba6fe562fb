"""A training that a signal stops: saved at the end of the step, and gone on with as if never."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_mod import process
from megatron_mod.process import STOPPED, Stopped
from megatron_mod.training import loop, run_folder
from megatron_mod.training.signals import StopRequest
from tests.helpers.jobs import ROOT, Job, is_alive, wait_for_step
from tests.helpers.runs import Trainer, metrics

pytestmark = pytest.mark.usefixtures("single_process")
SETTINGS = {"train__steps": 6, "checkpoint__interval": 4, "train__validation_interval": 3}


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    return Trainer(tmp_path_factory.mktemp("signals"))


@pytest.fixture(scope="module")
def whole(trainer):
    """A run that nothing stopped."""
    run = trainer.folder / "whole"
    trainer.train(run, data__validation=trainer.text, **SETTINGS)
    return run


def signal_in(monkeypatch, owner, name: str, *, call: int, number=signal.SIGTERM) -> None:
    """Have this rank get a signal in the middle of a function's ``call``-th call."""
    function, calls = getattr(owner, name), []

    def signalled(*args, **kwargs):
        calls.append(0)
        if len(calls) == call:
            process._act(number)
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, signalled)


VALIDATION = 5  # passes of the 20 documents: what run_schedule is called for between two steps


@pytest.mark.parametrize(
    ("where", "call", "saved"),
    [
        pytest.param((loop, "run_schedule"), 2, 2, id="in a step"),
        pytest.param((loop, "run_schedule"), 3, 3, id="in a step before a validation"),
        pytest.param((loop, "run_schedule"), 3 + 2, 3, id="in a validation"),
        pytest.param((run_folder.RunFolder, "save"), 1, 4, id="while step 4 is saved"),
        pytest.param((loop, "run_schedule"), 6 + VALIDATION, 6, id="in the last step"),
        pytest.param((loop, "run_schedule"), 8 + VALIDATION, 6, id="in the last validation"),
    ],
)
def test_a_signal_saves_and_the_run_goes_on_to_the_last_bit(
    trainer, whole, tmp_path, monkeypatch, where, call, saved
):
    run = tmp_path / "run"
    settings = {"data__validation": trainer.text, **SETTINGS}
    with monkeypatch.context() as patch:
        signal_in(patch, *where, call=call)
        with pytest.raises(Stopped, match=f"SIGTERM after step {saved} of 6, which is saved in"):
            trainer.train(run, **settings)
    assert (run / "latest").read_text().strip() == f"step_{saved:08d}"
    assert not (run / "summary.json").exists()
    trainer.train(run, **settings)
    assert metrics(run) == metrics(whole)
    assert (run / "summary.json").exists()


def test_limits_stop_and_the_run_goes_on_to_the_last_bit(trainer, whole, tmp_path, monkeypatch):
    """The interval every second step; then the time, which is over before the job has begun: a
    step is taken all the same, after the validation that the last job left out."""
    run, settings = tmp_path / "run", {"data__validation": trainer.text, **SETTINGS}
    how = r"train.exit_interval = 2 after step {} of 6, which is saved in .*; run the same command"
    for step in (2, 4):
        with pytest.raises(Stopped, match=how.format(step)):
            trainer.train(run, **settings, train__exit_interval=2)
    assert not (run / "summary.json").exists()
    took = [2.5 * 60]  # minutes
    monkeypatch.setattr(process, "seconds_of_job", lambda: took[0])
    with pytest.raises(Stopped, match="train.exit_duration = 2 minutes after step 5 of 6"):
        trainer.train(run, **settings, train__exit_duration=2)
    took[0] = 1.5 * 60
    trainer.train(run, **settings, train__exit_duration=2, train__exit_interval=6)
    assert metrics(run) == metrics(whole)
    assert (run / "summary.json").exists()


def test_the_job_began_with_torchrun(monkeypatch):
    own = process.seconds_of_job()
    assert 0 <= own < 3600 * 24
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert process.seconds_of_job() > own, "what started this process is older"


def test_leaving_needs_its_checkpoint_even_where_others_may_fail(trainer, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    signal_in(monkeypatch, loop, "run_schedule", call=2)
    monkeypatch.setattr(run_folder, "_publish", full)
    with pytest.raises(ValueError, match="step 2 could not be saved: the disk is full"):
        trainer.train(tmp_path / "run", checkpoint__on_save_error="continue")


def test_a_second_ctrl_c_ends_at_once_and_a_repeated_order_does_not(monkeypatch):
    now, ended = [0.0], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(os, "_exit", ended.append)
    for first, second, seconds, status in (
        (signal.SIGINT, signal.SIGINT, 3, [130]),
        (signal.SIGINT, signal.SIGTERM, 3, [143]),  # what torchrun makes of the second one
        (signal.SIGINT, signal.SIGINT, 0.1, []),
        (signal.SIGTERM, signal.SIGTERM, 3, []),
        (signal.SIGUSR1, signal.SIGTERM, 3, []),  # SLURM's warning, then its order
    ):
        now[0] = 0.0
        stop = StopRequest()
        process._act(first)
        now[0] = seconds
        process._act(second)
        assert (stop.asked, ended) == (first, status)
        ended.clear()


def test_before_the_first_step_a_signal_ends_at_once(trainer, tmp_path):
    job = subprocess.Popen(
        [sys.executable, "launch/pretrain_router.py", *trainer.arguments(tmp_path / "run")],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    while not catches(job.pid, signal.SIGUSR1):
        assert job.poll() is None
        time.sleep(0.02)
    job.send_signal(signal.SIGUSR1)
    printed, _ = job.communicate(timeout=60)
    assert job.returncode == STOPPED
    assert printed == "Stopped by SIGUSR1 before its first step; run the same command again.\n"


def test_ctrl_c_saves_though_it_ends_the_reader_of_the_output_too(trainer, tmp_path):
    run = tmp_path / "run"
    job = subprocess.Popen(
        [sys.executable, "launch/pretrain_router.py"]
        + trainer.arguments(run, train__steps=4000, checkpoint__interval=0),
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    wait_for_step(run, 2)
    job.stdout.close()
    job.send_signal(signal.SIGINT)
    assert job.wait(timeout=60) == STOPPED
    assert metrics(run)[-1]["step"] == int((run / "latest").read_text()[5:])


@pytest.mark.slow
def test_the_end_of_torchrun_loses_no_step_either(trainer, tmp_path):
    """SIGUSR1, which SLURM sends to every process of a job, ends torchrun at once."""
    run = tmp_path / "run"
    settings = {"train__steps": 4000, "checkpoint__interval": 0}
    job = Job(trainer.arguments(run, **settings), ranks=2, log=tmp_path / "log")
    wait_for_step(run, 2)
    everyone = job.ranks()
    os.kill(job.process.pid, signal.SIGUSR1)
    deadline = time.monotonic() + 60
    while any(is_alive(pid) for pid in everyone) and time.monotonic() < deadline:
        job.process.poll()
        time.sleep(0.05)
    assert not [pid for pid in everyone if is_alive(pid)]
    assert metrics(run)[-1]["step"] == int((run / "latest").read_text()[5:])


def catches(pid: int, number: int) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    (mask,) = (line.split()[1] for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(mask, 16) >> (number - 1) & 1)


@pytest.mark.slow
def test_one_rank_with_nothing_to_train_is_signalled_and_all_save(trainer, tmp_path):
    run = tmp_path / "run"
    settings = {
        "train__steps": 400, "checkpoint__interval": 0, "router__layers__deepest": 1,
        "parallel__pipeline_model_parallel_size": 2,
    }  # fmt: skip
    job = Job(trainer.arguments(run, **settings), ranks=2, log=tmp_path / "log")
    wait_for_step(run, 3)
    os.kill(job.rank(0), signal.SIGUSR1)
    output = job.ends(seconds=100)
    stopped = [line for line in output.splitlines() if line.startswith("Stopped by SIGUSR1")]
    assert len(stopped) == 1, output
    assert "RuntimeError" not in output
    assert "KeyboardInterrupt" not in output
    assert output.rstrip().splitlines()[-2].endswith(stopped[0])  # torchrun's report
    assert f"exitcode  : {STOPPED} " in output
    assert "<NO_OTHER_FAILURES>" in output
    last = (run / "latest").read_text().strip()
    assert len(metrics(run)) == int(last[5:]) < 400
    assert f"after step {int(last[5:])} of 400" in stopped[0]
