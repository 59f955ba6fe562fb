"""A long run, a rank of which is killed every so often."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Collection
from pathlib import Path

from tests.helpers.jobs import is_alive

SEED = int(os.environ.get("SOAK_SEED", "17"))
STEPS = 2000
SETTINGS = {"train__steps": STEPS, "checkpoint__interval": 50, "logging__interval": 1}
_BETWEEN_KILLS = (100, 400)  # steps


def disturb(
    run: Path,
    generator: random.Random,
    *,
    ranks: Callable[[], Collection[int]],
    goes_on: Callable[[], bool],
) -> int:
    """Kill ranks of a job for as long as it goes on, one at a time; how many were killed.

    Args:
        ranks: the job's processes now, without any between two starts.
    """
    kills = 0
    while goes_on():
        # A run that goes on drops what it recorded after its checkpoint first.
        wanted = _steps_of(run) + generator.randint(*_BETWEEN_KILLS)
        while goes_on() and _steps_of(run) < wanted:
            time.sleep(0.5)
        if goes_on() and (found := list(ranks())):
            os.kill(generator.choice(found), signal.SIGKILL)
            kills += 1
            while any(map(is_alive, found)) and goes_on():
                time.sleep(0.2)
    return kills


def _steps_of(run: Path) -> int:
    """The last step that a run has recorded."""
    path = run / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0
