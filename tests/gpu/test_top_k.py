"""Top-k routing on the device equals the formula."""

from __future__ import annotations

import pytest

from tests.distributed.test_granularities import make_case
from tests.distributed.test_top_k import ENDS, EVERY, check, with_predictors
from tests.gpu.where import long_on_cpu
from tests.helpers import tiny

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("single_process"), long_on_cpu]


def test_loss_and_gradients_equal_the_formula(tmp_path):
    case = with_predictors(make_case(tmp_path, "llama", tiny.LLAMAS["odd_vocabulary"]))
    check(case, [*EVERY, *ENDS], 1, [{}, {"packed": True}], tmp_path / "ranks")
