"""The thresholds that meet a budget."""

from __future__ import annotations

from megatron_mod.config.budget import BudgetRequest
from megatron_mod.config.rules import Percentage
from megatron_mod.evaluation.calibration import Calibration, Point

FAR = 0.1  # from a capacity that was asked for


def find(request: BudgetRequest, calibration: Calibration) -> Point:
    """The point that meets a budget.

    Raises:
        ValueError: none does.
    """
    if request.capacity is not None:
        point = calibration.at_capacity(request.capacity)
        if abs(point.mean_capacity - request.capacity) > max(FAR, calibration.unit):
            raise ValueError(
                f"--capacity {request.capacity:g}: the nearest that thresholds reach on this data "
                f"is {point.mean_capacity:.3f}, because too many of the routers' scores are "
                "equal; train the routers, or give other data or more --samples."
            )
        return point
    if request.speedup is not None:
        return calibration.at_speedup(request.speedup)
    increase = Percentage.share_of(request.max_perplexity_increase)
    return calibration.at_perplexity(calibration.dense.perplexity * (1 + increase))
