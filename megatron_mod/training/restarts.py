"""The starts of one SLURM job, and whether they get on: none is started again for ever.

A checkpoint names the job and the start that saved it, so what a start has reached can be told from
the run's folder alone, however it ended.
"""

from __future__ import annotations

import os
from pathlib import Path

from megatron_mod.checkpoint.manifest import read_manifest, step_folders
from megatron_mod.process import STOPPED

LIMIT = 3  # restarts that get no further, after which there is none


def this_start() -> dict:
    """What a checkpoint says of the start that saves it: nothing where there is no SLURM."""
    job = os.environ.get("SLURM_JOB_ID")
    return {"slurm": {"job": job, "restart": _restart()}} if job else {}


def require_progress(run: Path) -> None:
    """Refuse a start after too many that got no further; also SLURM itself restarts a job.

    Raises:
        ValueError: with the step that was reached.
    """
    if (lost := _restart() - _last_that_saved(run)) > LIMIT:
        raise ValueError(_without_progress(run, lost - 1))


def why_not_again(run: Path, *, status: int) -> str | None:
    """Why a job whose start has ended with an exit status is not to be started again, if so."""
    lost = _restart() - _last_that_saved(run)
    if lost >= LIMIT:
        return _without_progress(run, lost)
    if status != STOPPED and not _has_saved(run):
        return (
            f"checkpoint.save = {run}: the training failed (exit status {status}) before it saved "
            "anything; see what it said above, and submit it again."
        )
    return None


def _restart() -> int:
    return int(os.environ.get("SLURM_RESTART_COUNT", 0))


def _last_that_saved(run: Path) -> int:
    """The number of the job's last start that saved a checkpoint; without any its first one's."""
    return _saved_by(run) or 0


def _has_saved(run: Path) -> bool:
    """Whether this start has."""
    return _saved_by(run) == _restart()


def _saved_by(run: Path) -> int | None:
    """The number of the job's start that saved the newest whole checkpoint, if one of it did."""
    job = os.environ.get("SLURM_JOB_ID")
    for step in step_folders(run):
        try:
            start = read_manifest(step).get("slurm")
        except ValueError:
            continue  # a damaged one says nothing
        if start is None or start["job"] != job:
            return None
        return start["restart"]
    return None


def _without_progress(run: Path, restarts: int) -> str:
    steps = step_folders(run)
    reached = int(steps[0].name.removeprefix("step_")) if steps else 0
    return (
        f"checkpoint.save = {run}: {restarts} restarts of job {os.environ['SLURM_JOB_ID']} have "
        f"not come further than step {reached}; see in its output what ended them, and submit it "
        "again."
    )
