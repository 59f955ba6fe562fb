"""Ranks that fail, under torchrun and without it: what is said, how soon, and how often."""

from __future__ import annotations

import re
import time

import pytest

from megatron_mod.process import LOST
from tests.helpers.jobs import Job, run_alone
from tests.helpers.runs import Trainer, metrics, saved

pytestmark = pytest.mark.usefixtures("single_process")
PIPELINE = {"parallel__pipeline_model_parallel_size": 2}
THREE = {"train__global_batch_size": 6, "train__micro_batch_size": 1}
NOISE = "Connection closed|Connection reset|Broken pipe|frame #"


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    return Trainer(tmp_path_factory.mktemp("failing"))


def fault(what: str, *ranks: int, call: int = 4) -> dict[str, str]:
    return {"FAULT": what, "FAULT_RANK": " ".join(map(str, ranks)), "FAULT_CALL": str(call)}


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_rank_is_named_and_ends_too(trainer, tmp_path, stopped):
    """Without torchrun the first one holds the job's store. Another waits in the next stage."""
    arguments = trainer.arguments(tmp_path / "run", train__timeout=0.3, **PIPELINE)
    broken = fault("stop", stopped)
    ranks = run_alone(arguments, ranks=2, folder=tmp_path, fault=broken, seconds=200)
    assert [status for status, _ in ranks] == [LOST, LOST]
    said, text = ranks[1 - stopped][1], "".join(output for _, output in ranks)
    assert re.search(rf"^error: rank {stopped} \(process \d+ on ", said, re.MULTILINE), text
    assert "as long as train.timeout = 0.3 minutes allows" in said
    assert re.search(
        rf"rank {1 - stopped} at step \d \(pipeline stage {1 - stopped}\) waited", said
    )
    assert text.count("error: rank") == 1
    assert not re.search(NOISE, text)


def test_under_torchrun_all_but_one_are_stopped(trainer, tmp_path):
    arguments = trainer.arguments(tmp_path / "run", train__timeout=0.4, **THREE)
    job = Job(arguments, ranks=3, log=tmp_path / "log", fault=fault("stop", 0, 2))
    output = job.ends(seconds=250)
    told = [line for line in output.splitlines() if line.startswith("error: rank ")]
    assert len(told) == 1, output
    names = r"rank 2 \(process \d+ on \S+\) and rank 0 \(process \d+ on \S+\) have not answered"
    assert re.search(names, told[0])
    assert "rank 1 at step 4 (pipeline stage 0) waited" in told[0]
    assert not re.search(NOISE, output)


def test_a_killed_rank_is_named_once(trainer, tmp_path):
    for number, killed in enumerate((0, 1)):
        folder = tmp_path / str(number)
        folder.mkdir()
        arguments = trainer.arguments(folder / "run", **THREE)
        ranks = run_alone(arguments, ranks=3, folder=folder, fault=fault("kill", killed))
        assert [status for status, _ in ranks] == [-9 if n == killed else LOST for n in range(3)]
        text = "".join(output for _, output in ranks)
        assert text.count(f"error: rank {killed} (process ") == 1, text
        assert text.count("error") == 2  # "by an error above"
        assert not re.search(NOISE, text)


def test_torchrun_restarts_a_killed_rank_and_no_data_is_repeated(trainer, tmp_path):
    settings = {"train__steps": 9, "checkpoint__keep": 0}
    whole, run = tmp_path / "whole", tmp_path / "run"
    Job(trainer.arguments(whole, **settings), ranks=2, log=tmp_path / "whole.log").finish()
    job = Job(
        trainer.arguments(run, **settings), ranks=2, log=tmp_path / "log",
        options=["--max-restarts=2"], fault=fault("kill", 1, call=6),
    )  # fmt: skip
    assert "Going on after step 4 of 9" in job.finish()
    assert metrics(run) == metrics(whole)
    assert saved(run) == saved(whole)


@pytest.mark.parametrize(
    ("changes", "message", "status"),
    [
        ({"optimizer__lr": 0}, "error: optimizer.lr = 0.0: must be above 0.", 2),
        ({"train__exit_interval": 2}, "Stopped by train.exit_interval = 2 after step 2 of 6", 75),
    ],
)
def test_what_a_restart_does_not_mend_is_said_once(trainer, tmp_path, changes, message, status):
    began = time.monotonic()
    arguments = trainer.arguments(tmp_path / "run", **changes)
    job = Job(arguments, ranks=2, log=tmp_path / "log", options=["--max-restarts=3"])
    output = job.ends(seconds=300)
    said = [line for line in output.splitlines() if line.startswith(message)]
    assert len(said) == 1, f"{time.monotonic() - began:.0f} s: {output}"
    assert f"exitcode  : {status} " in output
    assert output.rstrip().splitlines()[-2].endswith(said[0].removeprefix("error: "))
