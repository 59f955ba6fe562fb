"""What one sees when a rank fails; without torchrun, whose ranks tests/slow has too."""

from __future__ import annotations

import pytest

from tests.helpers.jobs import run_alone
from tests.helpers.runs import Trainer

pytestmark = pytest.mark.usefixtures("single_process")
NONE = {"FAULT_RANK": ""}


def test_a_bug_in_one_rank_ends_all_with_one_traceback(tmp_path):
    """In the first, which holds the job's store without torchrun: nobody can ask for it then."""
    trainer = Trainer(tmp_path)
    fault = {"FAULT": "bug", "FAULT_RANK": "0", "FAULT_CALL": "3"}
    arguments = trainer.arguments(tmp_path / "run", train__steps=4000)
    (first, said), (second, heard) = run_alone(arguments, ranks=2, folder=tmp_path, fault=fault)
    assert (first, second) == (1, 1)
    assert said.count("Traceback") == 1
    assert said.rstrip().endswith("ZeroDivisionError: a bug")
    assert heard.strip() == ""


@pytest.mark.slow
def test_nobody_fails_where_all_leave_in_peace(tmp_path):
    """The store goes with the first rank, while the others' threads may still ask it."""
    trainer = Trainer(tmp_path)
    arguments = trainer.arguments(tmp_path / "run", train__steps=2)
    for status, said in run_alone(arguments, ranks=2, folder=tmp_path, fault=NONE):
        assert status == 0, said
        assert "terminate" not in said
