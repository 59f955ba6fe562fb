"""Jobs that are stopped, preempted, or lose a rank or a node go on, to the same routers."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from megatron_mod.checkpoint.manifest import read_manifest, resolve_step
from megatron_mod.conversion.routers import read_step
from megatron_mod.process import STOPPED
from megatron_mod.routing.config import RoutingConfig
from tests.helpers.jobs import wait_for_step
from tests.helpers.runs import metrics
from tests.helpers.slurm import Batch, lose_node, node_daemon, played, return_node, sbatch
from tests.slurm.conftest import SETTINGS

TWO_NODES = ("--nodes=2", "--ntasks-per-node=1")


def routers(folder: Path) -> dict[tuple[int, str], bytes]:
    """A run's last routers, to the bit."""
    step = resolve_step(folder)
    added = read_step(step, RoutingConfig.from_dict(read_manifest(step)["routing"]))
    return {
        (layer, name): value.numpy().tobytes()
        for layer, values in added.items()
        for name, value in values.items()
    }


def submit(
    trainer, folder: Path, *, options=TWO_NODES, launcher="srun", python=sys.executable, **settings
) -> Batch:
    arguments = trainer.arguments(folder / "run", **{**SETTINGS, **settings})
    environment = {"LAUNCHER": launcher, "PYTHON": python}
    script = "pretrain_router.sbatch"
    return Batch(script, *arguments, folder=folder, options=options, **environment)


def as_if_nothing_had_been(job: Batch, folder: Path, whole: Path, *, starts: int = 2) -> str:
    """The job ends well after so many starts, with an undisturbed run's numbers; its output."""
    printed = job.ends()
    assert job.status() == 0, printed
    assert printed.count(f"Job {job.number}, start ") == starts
    assert 1 <= printed.count("Going on after step ") < starts
    assert metrics(folder / "run") == metrics(whole)
    assert routers(folder / "run") == routers(whole)
    assert sorted(os.listdir(folder)) == ["log", "run"]
    return printed


@pytest.mark.parametrize("launcher", ["srun", "torchrun"])
def test_a_signal_saves_and_the_job_goes_on(trainer, whole, tmp_path, launcher):
    job = submit(trainer, tmp_path, launcher=launcher, checkpoint__interval=0)
    wait_for_step(tmp_path / "run", 3, seconds=600)
    job.cancel("--signal=USR1")
    printed = as_if_nothing_had_been(job, tmp_path, whole)
    assert printed.count("Stopped by SIGUSR1 after step ") == 1
    assert "Traceback" not in printed
    assert "onnection" not in printed


@pytest.mark.parametrize("launcher", ["srun", "torchrun"])
def test_a_signal_to_the_script_alone_does_too(trainer, whole, tmp_path, launcher):
    """As of --signal=B:USR1, and of SIGTERM, which torchrun passes on for 30 s only."""
    job = submit(trainer, tmp_path, launcher=launcher, checkpoint__interval=0)
    wait_for_step(tmp_path / "run", 3, seconds=600)
    job.cancel("--batch", "--signal=TERM")
    printed = as_if_nothing_had_been(job, tmp_path, whole)
    assert printed.count("Stopped by SIGUSR1 after step ") == 1


def test_preempted_and_requeued(trainer, whole, tmp_path):
    job = submit(trainer, tmp_path, checkpoint__interval=0)
    wait_for_step(tmp_path / "run", 3, seconds=600)
    words = ("--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null")
    urgent = sbatch(*words, "--wrap=sleep 5", folder=tmp_path)
    assert urgent.returncode == 0, urgent.stderr
    printed = as_if_nothing_had_been(job, tmp_path, whole)
    assert printed.count("Stopped by SIGTERM after step ") == 1
    assert "DUE TO PREEMPTION" in printed


def test_the_time_limit_is_no_end_and_cancelling_is(trainer, tmp_path):
    job = submit(
        trainer, tmp_path, options=(*TWO_NODES, "--time=4", "--signal=B:USR1@90"),
        train__steps=100_000, checkpoint__interval=0,
    )  # fmt: skip
    printed = job.says("Going on after step ")
    assert "Stopped by SIGUSR1 after step " in printed
    assert f"Putting job {job.number} back into the queue." in printed
    job.cancel()
    printed = job.ends()
    assert job.field("JobState") == "CANCELLED"
    assert printed.count("back into the queue") == 1


@pytest.mark.parametrize("launcher", ["srun", "torchrun"])
def test_a_killed_rank_after_a_checkpoint(trainer, whole, tmp_path, launcher):
    job = submit(trainer, tmp_path, launcher=launcher)
    wait_for_step(tmp_path / "run", 6, seconds=600)
    os.kill(job.ranks()[1], signal.SIGKILL)
    as_if_nothing_had_been(job, tmp_path, whole)


@pytest.mark.parametrize("node", ["n1", "n2"])
def test_a_lost_node(trainer, whole, tmp_path, node):
    """SLURM itself requeues the job then; n1 is the node of the batch script."""
    job = submit(trainer, tmp_path)
    wait_for_step(tmp_path / "run", 6, seconds=600)
    lose_node(node)
    try:
        job.waits_for(lambda: job.field("Restarts") == "1", "restart by SLURM")
    finally:
        return_node(node)
    job.ends()
    # SLURM may end a step for what it still hears of the lost one of the same name.
    as_if_nothing_had_been(job, tmp_path, whole, starts=1 + int(job.field("Restarts")))


def test_a_lost_slurmd_whose_ranks_go_on(trainer, tmp_path):
    """Until SLURM gives the node up; the rank that it no longer reaches ends by itself."""
    job = submit(trainer, tmp_path, train__steps=100_000)
    wait_for_step(tmp_path / "run", 6, seconds=600)
    os.kill(node_daemon("n2"), signal.SIGKILL)
    try:
        job.waits_for(lambda: job.field("Restarts") == "1", "restart by SLURM")
    finally:
        return_node("n2")
    printed = job.says("Going on after step ")
    job.cancel()
    job.ends()
    saved = int(printed.partition("Going on after step ")[2].split()[0])
    steps = [line["step"] for line in metrics(tmp_path / "run")]
    assert steps == [*range(1, len(steps) + 1)]
    assert len(steps) >= saved >= 4


def test_what_fails_before_it_saves_is_not_started_again(trainer, tmp_path):
    """The failing rank's own message comes first, and no other rank has one."""
    python = played(
        tmp_path / "python",
        f"""[ "${{RANK:-}}" = 1 ] || exec $real "$@"
        exec $real {Path(__file__).with_name("failing.py")} "$@" """,
    )
    job = submit(trainer, tmp_path / "job", python=python, checkpoint__interval=0)
    printed = job.ends()
    assert job.status() == 1, printed
    traceback, _, rest = printed.partition("Traceback (most recent call last):")
    assert rest.count("Traceback") == 0, printed
    assert "RuntimeError: something is wrong in step 3" in rest
    assert "error" not in traceback.lower()
    assert "onnection" not in printed
    assert printed.count("the training failed (exit status 1) before it saved anything") == 1
    assert job.field("Restarts") == "0"


def test_without_progress_three_restarts_are_enough(trainer, tmp_path):
    python = played(
        tmp_path / "python",
        f"""case $1 in *pretrain_router.py) exit {STOPPED} ;; esac
        exec $real "$@" """,
    )
    job = submit(trainer, tmp_path / "job", python=python, options=("--nodes=1",))
    printed = job.ends()
    assert job.status() == STOPPED, printed
    assert job.field("Restarts") == "3"
    assert printed.count("error: checkpoint.save") == 1
    assert f"3 restarts of job {job.number} have not come further than step 0" in printed
    assert not (tmp_path / "job" / "run").exists()
