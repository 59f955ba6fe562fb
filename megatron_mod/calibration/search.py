"""Thresholds that meet a budget: capacity, counted work or perplexity on a calibration text."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import torch
from torch import Tensor

from megatron_mod.evaluation.backend import Backend
from megatron_mod.evaluation.rows import Row
from megatron_mod.evaluation.work import Work
from megatron_mod.hf.thresholds_mod import border_at, common_border, settled_border, threshold_at
from megatron_mod.routing.config import logit_border
from megatron_mod.routing.scheme import Place

TOLERANCE = 0.005  # between capacities that are told apart
HALVINGS = 6  # of the capacities between which a speed-up or a perplexity lies
PASSES = 5  # over the rows, to meet a budget of work
NEAR = 0.003  # of the dense model's work, below the budget


@dataclass(frozen=True, eq=False)
class Point:
    """What a model does at some thresholds, on the calibration text.

    ``capacity``: kept share of the units of each router; ``nats``: loss of all labels
    together; ``flops``: counted work of a prefill of every row; ``logits``: each router's, of all
    units (``[num_units]``); ``experts``: see ``Backend.experts``.
    """

    thresholds: tuple[float, ...]
    capacity: tuple[float, ...]
    perplexity: float
    nats: float
    flops: int
    logits: dict[Place, Tensor]
    experts: dict[Place, Tensor]

    @property
    def mean_capacity(self) -> float:
        return fmean(self.capacity)

    @property
    def all_logits(self) -> Tensor:
        """Of all units of all routers."""
        return torch.cat(list(self.logits.values()))

    def decides_as(self, thresholds: Sequence[float]) -> bool:
        """Whether every unit is decided at other thresholds as it is here."""
        return all(
            torch.equal(logits >= logit_border(now), logits >= logit_border(then))
            for now, then, logits in zip(
                self.thresholds, thresholds, self.logits.values(), strict=True
            )
        )


class Calibration:
    """Observes a routed model on some rows, at the thresholds that are asked for.

    Args:
        scope: ``layer`` gives every layer the capacity that is asked for; ``model`` gives all
            layers one threshold, as in training, at which their mean has it.
        after_pass: called after every pass over the rows.
    """

    def __init__(
        self,
        backend: Backend,
        rows: Sequence[Row],
        work: Work,
        *,
        scope: str,
        after_pass: Callable[[], object] = lambda: None,
    ) -> None:
        self.backend, self.rows, self.work, self.scope = backend, rows, work, scope
        self.after_pass = after_pass
        self._known: dict[tuple[float, ...], Point] = {}
        self.labels = sum(row.num_labels for row in rows)
        self.dense = self.at([0.0] * len(backend.places))
        self.dense_flops = sum(work.prefill(len(row.ids), {}) for row in rows)
        self.points = [self.dense]

    def at(self, thresholds: Sequence[float]) -> Point:
        """The model at these thresholds, one per router; equal decisions are run once."""
        thresholds = tuple(thresholds)
        if thresholds not in self._known:
            alike = (point for point in self._known.values() if point.decides_as(thresholds))
            if point := next(alike, None):
                # A layer that keeps nobody takes less work once it is known that it never will.
                flops = self.flops(thresholds, point.logits)
                point = replace(point, thresholds=thresholds, flops=flops)
            else:
                point = self._run(thresholds)
                self.after_pass()
            self._known[thresholds] = point
        return self._known[thresholds]

    def _run(self, thresholds: tuple[float, ...]) -> Point:
        found = self.backend.observe(self.rows, thresholds=thresholds)
        borders = dict(zip(self.backend.places, map(logit_border, thresholds), strict=True))
        logits = {
            place: torch.cat([observed.logits[place] for observed in found]) for place in borders
        }
        nats = -math.fsum(observed.score.log_probability for observed in found)
        return Point(
            thresholds=thresholds,
            capacity=tuple(
                float((logits[place] >= border).double().mean())
                for place, border in borders.items()
            ),
            perplexity=math.exp(nats / self.labels),
            nats=nats,
            flops=self.flops(thresholds, logits),
            logits=logits,
            experts=self.backend.experts(),
        )

    def flops(self, thresholds: tuple[float, ...], logits: dict[Place, Tensor]) -> int:
        """Counted work of a prefill of every row, of units with these logits at thresholds."""
        work, lengths = self.work.at(thresholds), [len(row.ids) for row in self.rows]
        entries = list(map(self.work.entries, lengths))
        units = [1] * len(lengths) if self.backend.by_sequence else entries
        kept = {
            place: (logits[place] >= logit_border(threshold)).split(units)
            for place, threshold in zip(self.backend.places, thresholds, strict=True)
        }
        flops = 0
        for row, length in enumerate(lengths):
            made = {place: parts[row].expand(entries[row]) for place, parts in kept.items()}
            flops += work.prefill(length, made)
        return flops

    def speedup(self, point: Point) -> float:
        """Counted work of the dense model over the point's."""
        return self.dense_flops / point.flops

    @property
    def unit(self) -> float:
        """The share of one unit: no capacity is told from another that is nearer."""
        if self.scope == "model":
            return 1 / sum(map(len, self.dense.logits.values()))
        return 1 / min(map(len, self.dense.logits.values()))

    def at_capacity(self, capacity: float, *, tolerance: float | None = None) -> Point:
        """The point at which every layer, or with scope ``model`` their mean, has a capacity.

        Thresholds move what later layers see, and with it their logits, so they are found by
        repetition: each round places them by the logits of the round before, until they stay.
        Then the export's ``set_capacity`` finds the same ones on the same text. With a
        ``tolerance`` a round that comes that near is the last, unless a logit is at its borders.
        """
        tolerance = tolerance and max(tolerance, self.unit)
        if self.scope == "model":
            known = {logit_border(p.thresholds[0]): p.all_logits for p in self.points}
            border = common_border(
                lambda border: self._try([border] * len(self.backend.places)).all_logits,
                capacity,
                known=known,
                tolerance=tolerance,
            )
            return self._try([border] * len(self.backend.places))
        point = min(self.points, key=lambda point: abs(point.mean_capacity - capacity))
        for _ in self.backend.places:  # a round settles at least one more of them, from the top
            near = tolerance is not None and self._miss(point, capacity) <= tolerance
            if near and point in self.points:
                break
            point = self._try([border_at(logits, capacity) for logits in point.logits.values()])
        return point

    def _try(self, borders: Sequence[float]) -> Point:
        """The model at these borders, each in the middle of its gap; among the points that are
        chosen from and that later searches begin with, unless a logit is too near one of them."""
        point = self.at(list(map(threshold_at, borders)))
        settled = self._settled(point)
        if None in settled:
            return point
        point = self.at(list(map(threshold_at, settled)))
        if point not in self.points:
            self.points.append(point)
        return point

    def _settled(self, point: Point) -> list[float | None]:
        borders = map(logit_border, point.thresholds)
        if self.scope == "model":
            return [settled_border(point.all_logits, next(borders))] * len(point.logits)
        return [
            settled_border(logits, border)
            for logits, border in zip(point.logits.values(), borders, strict=True)
        ]

    def _miss(self, point: Point, capacity: float) -> float:
        return max(abs(one - capacity) for one in point.capacity)

    def at_speedup(self, speedup: float) -> Point:
        """The point of largest capacity whose counted work is that many times less than dense.

        Raises:
            ValueError: skipping everything that is routed saves less.
        """
        most = self.at_capacity(0.0)
        if self.speedup(most) < speedup:
            raise ValueError(
                f"--speedup {speedup:g}: skipping everything in the {len(most.capacity)} routed "
                f"layers gives {self.speedup(most):.3f} at most; ask for less, or route more."
            )
        return self._at_flops(self.dense_flops / speedup)

    def at_work(self, work: float) -> Point:
        """The point of largest capacity whose counted work is at most that share of the dense
        model's.

        Raises:
            ValueError: skipping everything that is routed leaves more.
        """
        least = self.at_capacity(0.0).flops / self.dense_flops
        if least > work:
            raise ValueError(
                f"--work {work:g}: skipping everything that the {len(self.backend.places)} routers "
                f"decide on leaves {least:.3f} of the dense model's work at least; ask for no "
                "less, or route more."
            )
        return self._at_flops(work * self.dense_flops)

    def _at_flops(self, flops: float) -> Point:
        def borders(point: Point, capacity: float) -> list[float]:
            if self.scope == "model":
                return [border_at(point.all_logits, capacity)] * len(point.logits)
            return [border_at(logits, capacity) for logits in point.logits.values()]

        start = min(self.points, key=lambda point: abs(point.flops - flops))
        near = self.meet(start, borders, flops, least=0.0)
        if near and flops - near.flops <= NEAR * self.dense_flops:
            return self._try(list(map(logit_border, near.thresholds)))
        found = self._border_of(lambda point: point.flops <= flops)[0]
        assert found is not None, "more work than skipping everything"
        return found

    def meet(
        self,
        start: Point,
        borders: Callable[[Point, float], Sequence[float]],
        flops: float,
        *,
        least: float,
    ) -> Point | None:
        """The model where it takes ``flops``, or a little less; ``None`` if no pass comes to less.

        A border moves what later routers see, and with it their scores, so it is found by
        repetition, each time by the scores of the time before.

        Args:
            start: whose scores it begins with.
            borders: one per router by the scores of a point and a share, from ``least`` to 1; more
                is kept of a larger one.
        """
        point, aim, met = start, flops, []

        def at(share: float) -> tuple[float, ...]:
            return tuple(map(threshold_at, borders(point, share)))

        def is_more(share: float) -> bool:
            return self.flops(at(share), point.logits) > aim

        for _ in range(PASSES):
            point = self.at(at(_last_without(is_more, least, 1.0)))
            if point.flops <= flops:
                met.append(point)
                if flops - point.flops <= NEAR * self.dense_flops:
                    break
            aim += flops - point.flops - NEAR / 2 * self.dense_flops
        return max(met, key=lambda point: point.flops, default=None)

    def at_perplexity(self, largest: float) -> Point:
        """The point of least capacity whose perplexity is at most ``largest`` (no less than the
        dense one's)."""
        self.at_capacity(0.0)
        return self._border_of(lambda point: point.perplexity > largest)[1]

    def _border_of(self, holds: Callable[[Point], bool]) -> tuple[Point | None, Point]:
        """Neighbours in capacity: the first ``holds``, the second, the least of its kind, does not.

        It holds below some capacity, and not for the dense model.
        """
        for _ in range(HALVINGS):
            below, above = self._neighbours(holds)
            gap = above.mean_capacity - below.mean_capacity if below else 0.0
            if gap <= TOLERANCE:
                break
            self.at_capacity(above.mean_capacity - gap / 2, tolerance=gap / 4)
        return self._neighbours(holds)

    def _neighbours(self, holds: Callable[[Point], bool]) -> tuple[Point | None, Point]:
        def capacity(point: Point) -> float:
            return point.mean_capacity

        above = min((p for p in self.points if not holds(p)), key=capacity)
        below = [p for p in self.points if holds(p) and capacity(p) < capacity(above)]
        return max(below, key=capacity, default=None), above


def _last_without(holds: Callable[[float], bool], low: float, high: float) -> float:
    """The largest number that does not hold, of a rule that holds from some number on."""
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return low
