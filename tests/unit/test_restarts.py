"""When a batch job is started again: as long as its starts get on."""

from __future__ import annotations

import pytest

from megatron_mod.checkpoint.manifest import step_folder, write_manifest
from megatron_mod.process import LOST, STOPPED
from megatron_mod.training.restarts import require_progress, this_start, why_not_again


@pytest.fixture
def start(monkeypatch):
    """Be a start of a job."""

    def be(restart: int, job: str = "17") -> None:
        monkeypatch.setenv("SLURM_JOB_ID", job)
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))

    return be


def save(run, step: int) -> None:
    folder = step_folder(run, step)
    folder.mkdir(parents=True)
    write_manifest(folder, {"kind": "routers", "step": step, **this_start()})


def test_without_slurm_there_is_nothing_to_say(tmp_path, monkeypatch):
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    assert this_start() == {}
    save(tmp_path, 2)
    require_progress(tmp_path)


@pytest.mark.parametrize("saved", [None, 0, 2])
def test_three_restarts_that_get_no_further_are_enough(start, tmp_path, saved):
    if saved is not None:
        start(saved)
        save(tmp_path, 40)
    last = (saved or 0) + 3
    for restart in range((saved or 0) + 1, last + 1):
        start(restart)
        require_progress(tmp_path)
        reason = why_not_again(tmp_path, status=STOPPED)
        assert bool(reason) == (restart == last)
    step = 0 if saved is None else 40
    wanted = f"3 restarts of job 17 have not come further than step {step}; see in its output"
    assert wanted in reason
    start(last + 1)  # of SLURM's own, after the loss of a node
    with pytest.raises(ValueError, match=wanted):
        require_progress(tmp_path)
    save(tmp_path, 41)
    require_progress(tmp_path)
    assert why_not_again(tmp_path, status=STOPPED) is None


def test_a_failure_is_followed_by_a_start_only_if_this_one_saved(start, tmp_path):
    start(0, job="16")
    save(tmp_path, 10)
    start(0)
    assert "failed (exit status 1) before it saved anything" in why_not_again(tmp_path, status=LOST)
    assert why_not_again(tmp_path, status=STOPPED) is None
    save(tmp_path, 20)
    assert why_not_again(tmp_path, status=LOST) is None
    start(1)
    assert why_not_again(tmp_path, status=137)
