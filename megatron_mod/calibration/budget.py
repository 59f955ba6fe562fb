"""The thresholds that meet a budget."""

from __future__ import annotations

from typing import NamedTuple

from megatron_mod.calibration.lagrange import by_price
from megatron_mod.calibration.search import Calibration, Point
from megatron_mod.config.budget import BudgetRequest
from megatron_mod.config.rules import Percentage

FAR = 0.1  # from a capacity that was asked for


THRESHOLD, PRICE = "one threshold", "one price"  # for all routers
EQUAL = "equal capacities"


class Found(NamedTuple):
    """The point that meets a budget, and how its thresholds were found: ``THRESHOLD``, ``EQUAL``
    or ``PRICE``; of the last, the best of the others for comparison."""

    point: Point
    method: str
    other: Point | None = None


def find(request: BudgetRequest, calibration: Calibration) -> Found:
    """The point that meets a budget.

    Work is shared out between routers at one price per operation, unless one threshold (with scope
    ``layer``: equal capacities) loses less on this text at no more work.

    Raises:
        ValueError: none does.
    """
    simple = THRESHOLD if calibration.scope == "model" else EQUAL
    if request.work is None and request.speedup is None:
        return Found(_by_capacity(request, calibration), simple)
    if request.work is not None:
        start, share = calibration.at_work(request.work), request.work
    else:
        start, share = calibration.at_speedup(request.speedup), 1 / request.speedup
    point = by_price(calibration, start, share * calibration.dense_flops)
    return Found(point, PRICE, start) if point.nats < start.nats else Found(start, simple)


def _by_capacity(request: BudgetRequest, calibration: Calibration) -> Point:
    if request.capacity is not None:
        point = calibration.at_capacity(request.capacity)
        if abs(point.mean_capacity - request.capacity) > max(FAR, calibration.unit):
            raise ValueError(
                f"--capacity {request.capacity:g}: the nearest that thresholds reach on this data "
                f"is {point.mean_capacity:.3f}, because too many of the routers' scores are "
                "equal; train the routers, or give other data or more --samples."
            )
        return point
    increase = Percentage.share_of(request.max_perplexity_increase)
    return calibration.at_perplexity(calibration.dense.perplexity * (1 + increase))
