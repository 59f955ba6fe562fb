"""Everything in this folder is slow, and needs the cluster of run.sh."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests.helpers.jobs import Job
from tests.helpers.runs import Trainer
from tests.helpers.slurm import clear_queue

NO_CLUSTER = pytest.mark.skipif(
    "SLURM_CONF" not in os.environ, reason="needs the cluster of tests/slurm/run.sh"
)
STEPS = 40
SETTINGS = {"train__steps": STEPS, "checkpoint__interval": 4}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slow)
            item.add_marker(NO_CLUSTER)


@pytest.fixture(scope="session", autouse=True)
def environment():
    """Jobs take it along: this interpreter, and a thread a rank."""
    os.environ.update(PYTHON=sys.executable, OMP_NUM_THREADS="1", TRANSFORMERS_VERBOSITY="error")


@pytest.fixture(autouse=True)
def own_queue():
    yield
    clear_queue()


@pytest.fixture(scope="session")
def trainer(tmp_path_factory, single_process):
    return Trainer(tmp_path_factory.mktemp("slurm"))


@pytest.fixture(scope="session")
def whole(trainer):
    """A run on two data-parallel ranks of plain torchrun that nothing disturbed."""
    run = trainer.folder / "whole"
    Job(trainer.arguments(run, **SETTINGS), ranks=2, log=trainer.folder / "whole.log").finish()
    return run
