"""What has diverged is neither logged nor saved."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_mod.training.loop import _require_finite
from megatron_mod.training.step import StepResult


@pytest.mark.parametrize(
    ("loss", "grad_norm"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf)]
)
def test_a_step_that_is_not_finite_stops_the_run(loss, grad_norm):
    result = StepResult(task_loss=torch.tensor(loss), capacity=torch.ones(1))
    with pytest.raises(ValueError, match="step 7: .*diverged"):
        _require_finite(7, result, grad_norm)


def test_a_finite_step_passes():
    _require_finite(7, StepResult(task_loss=torch.tensor(3.0), capacity=torch.ones(1)), 0.0)
