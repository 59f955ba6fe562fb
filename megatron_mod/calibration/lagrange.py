"""Thresholds that meet a budget of work, router by router: all pay one price per operation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_mod.calibration.search import Calibration, Point
from megatron_mod.evaluation.rows import evenly
from megatron_mod.hf.thresholds_mod import border_at, logit_border, settled_border, threshold_at

MEASURED = 2000  # tokens that trades are measured on: two passes over them for every router
REACHES = (0.5, 0.2)  # how far from a router's capacity, in each round
MOST = 80  # passes after which there is no second round
LENGTHS = (1.0, 0.5, 0.25)  # of the way to where a round leads, until the loss is less
GRID = 41  # capacities that a trade is looked up at


@dataclass(frozen=True)
class Trade:
    """Loss (nats a label) and work (of the dense model's) of the model as one router's capacity
    changes and all other borders stay: of each, the coefficients of the parabola (or line) through
    what was measured from capacity ``low`` to ``high``, the largest power first."""

    low: float
    high: float
    loss: np.ndarray
    work: np.ndarray

    def best(self, price: float) -> float:
        """The capacity of least ``loss + price * work``."""
        at = np.linspace(self.low, self.high, GRID)
        cost = np.polyval(self.loss, at) + price * np.polyval(self.work, at)
        return float(at[cost.argmin()])


def by_price(calibration: Calibration, start: Point, flops: float) -> Point:
    """The point of least loss found that takes at most ``flops``, or ``start`` itself, which does.

    To minimise the loss at a work, every router's capacity has to be where one more operation
    lowers the loss as much as anywhere else: where it minimises ``loss + price * work``, with the
    price at which all of them together meet the budget (Lagrange's multiplier). What a router
    trades is measured around the point, with all other borders as they are; its own scores then
    put the border at the capacity. Borders move what later routers see and do, which is measured
    with it, but not what several of them do together: so the way there is halved until the loss
    really is less, and a second round begins from there.
    """
    best, places = start, len(start.capacity)
    rounds = 1 if 4 * places > MOST else 2
    subset = _subset(calibration)
    for reach in REACHES[:rounds]:
        trades = [_trade(subset, best.thresholds, number, reach) for number in range(places)]
        wanted = _capacities(trades, best, flops / calibration.dense_flops, calibration)
        better = next(
            (
                point
                for length in LENGTHS
                if (point := _meet(calibration, best, _between(best, wanted, length), flops))
                and point.nats < best.nats
            ),
            None,
        )
        if better is None:
            break
        best = better
    return best


def _subset(calibration: Calibration) -> Calibration:
    """The same on some of the rows."""
    rows = calibration.rows
    tokens = sum(len(row.ids) for row in rows)
    if tokens <= MEASURED:
        return calibration
    return Calibration(
        calibration.backend,
        evenly(rows, max(1, round(len(rows) * MEASURED / tokens))),
        calibration.work,
        scope=calibration.scope,
        after_pass=calibration.after_pass,
    )


def _trade(subset: Calibration, thresholds: Sequence[float], number: int, reach: float) -> Trade:
    """That of the router of this number, by what it keeps ``reach`` less and more."""
    here = subset.at(thresholds)
    logits = list(here.logits.values())[number]
    found = {here.capacity[number]: here}
    for capacity in (here.capacity[number] - reach, here.capacity[number] + reach):
        moved = list(thresholds)
        moved[number] = threshold_at(border_at(logits, min(max(capacity, 0.0), 1.0)))
        point = subset.at(moved)
        found[point.capacity[number]] = point
    at = np.array(sorted(found))
    losses = np.array([found[capacity].nats / subset.labels for capacity in at])
    works = np.array([found[capacity].flops / subset.dense_flops for capacity in at])
    degree = len(at) - 1
    return Trade(at[0], at[-1], np.polyfit(at, losses, degree), np.polyfit(at, works, degree))


def _capacities(
    trades: Sequence[Trade], point: Point, work: float, calibration: Calibration
) -> list[float]:
    """Every router's at the one price at which all of them together come to a work."""
    now = point.flops / calibration.dense_flops

    def at(price: float) -> list[float]:
        return [trade.best(price) for trade in trades]

    def reached(capacities: Sequence[float]) -> float:
        return now + sum(
            float(np.polyval(trade.work, to) - np.polyval(trade.work, of))
            for trade, of, to in zip(trades, point.capacity, capacities, strict=True)
        )

    low, high = -8.0, 8.0  # of the price's logarithm: nats a label for all of the dense model's
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if reached(at(math.exp(middle))) > work else (low, middle)
    return at(math.exp(high))


def _between(point: Point, wanted: Sequence[float], length: float) -> list[float]:
    return [of + length * (to - of) for of, to in zip(point.capacity, wanted, strict=True)]


def _meet(
    calibration: Calibration, start: Point, capacities: Sequence[float], flops: float
) -> Point | None:
    """The model near these capacities, all moved together so that it takes ``flops``, or a little
    less; ``None`` if no pass comes to less."""

    def borders(point: Point, shift: float) -> list[float]:
        shares = [min(max(capacity + shift, 0.0), 1.0) for capacity in capacities]
        return [border_at(*pair) for pair in zip(point.logits.values(), shares, strict=True)]

    found = calibration.meet(start, borders, flops, least=-1.0)
    return found and _settled(calibration, found)


def _settled(calibration: Calibration, point: Point) -> Point:
    """The same decisions by borders in the middle of their gaps, where these are wide enough."""
    borders = []
    for threshold, logits in zip(point.thresholds, point.logits.values(), strict=True):
        middle = settled_border(logits, logit_border(threshold))
        borders.append(logit_border(threshold) if middle is None else middle)
    return calibration.at(list(map(threshold_at, borders)))
