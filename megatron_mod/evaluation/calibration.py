"""Thresholds that meet a budget: capacity, counted work or perplexity on a calibration text."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor

from megatron_mod.evaluation.backend import Backend
from megatron_mod.evaluation.rows import Row
from megatron_mod.evaluation.work import Work
from megatron_mod.routing.config import logit_border
from megatron_mod.routing.thresholds import border_at, threshold_at

TOLERANCE = 0.005  # of a capacity that is asked for
ROUNDS = 14  # observations that one capacity may take
HALVINGS = 6  # of the capacities between which a speed-up or a perplexity lies


@dataclass(frozen=True)
class Point:
    """What a model does at some thresholds, on the calibration text.

    ``capacity``: kept share of the units of each routed layer; ``nats``: loss of all labels
    together; ``flops``: counted work of a prefill of every row; ``logits``: each layer's, of all
    units (``[num_units]``).
    """

    thresholds: tuple[float, ...]
    capacity: tuple[float, ...]
    perplexity: float
    nats: float
    flops: int
    logits: dict[int, Tensor]

    @property
    def mean_capacity(self) -> float:
        return fmean(self.capacity)


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
        self.dense = self.at([0.0] * len(backend.layers))
        self.dense_flops = sum(work.prefill(len(row.ids), {}) for row in rows)
        self.points = [self.dense]

    def at(self, thresholds: Sequence[float]) -> Point:
        """The model at these thresholds, one per routed layer; each is run once."""
        thresholds = tuple(thresholds)
        if thresholds not in self._known:
            self._known[thresholds] = self._run(thresholds)
            self.after_pass()
        return self._known[thresholds]

    def _run(self, thresholds: tuple[float, ...]) -> Point:
        found = self.backend.observe(self.rows, thresholds=thresholds)
        borders = dict(zip(self.backend.layers, map(logit_border, thresholds), strict=True))
        flops = 0
        for row, observed in zip(self.rows, found, strict=True):
            kept = {
                layer: (observed.logits[layer] >= border).expand(len(row.ids))
                for layer, border in borders.items()
            }
            flops += self.work.prefill(len(row.ids), kept)
        logits = {
            layer: torch.cat([observed.logits[layer] for observed in found]) for layer in borders
        }
        nats = -math.fsum(observed.score.log_probability for observed in found)
        return Point(
            thresholds=thresholds,
            capacity=tuple(
                float((logits[layer] >= border).double().mean())
                for layer, border in borders.items()
            ),
            perplexity=math.exp(nats / self.labels),
            nats=nats,
            flops=flops,
            logits=logits,
        )

    def speedup(self, point: Point) -> float:
        """Counted work of the dense model over the point's."""
        return self.dense_flops / point.flops

    @property
    def unit(self) -> float:
        """The share of one unit: no capacity is told from another that is nearer."""
        if self.scope == "model":
            return 1 / sum(map(len, self.dense.logits.values()))
        return 1 / min(map(len, self.dense.logits.values()))

    def at_capacity(self, capacity: float, *, tolerance: float = TOLERANCE) -> Point:
        """The point whose mean capacity is nearest; the search ends within ``tolerance``.

        Thresholds move what later layers see, and with it their logits, so they are found by
        repetition: each round places them by the logits of the round before. With one threshold
        for all, a round that leaves what earlier ones have narrowed down is replaced by halving.
        """
        near = min(self.points, key=lambda point: abs(point.mean_capacity - capacity))
        tried = [near]
        while self._miss(tried[-1], capacity) > max(tolerance, self.unit) and len(tried) <= ROUNDS:
            borders = self._propose(tried[-1], capacity)
            if tuple(map(threshold_at, borders)) == tried[-1].thresholds:
                break
            tried.append(self.at([threshold_at(border) for border in borders]))
            self.points.append(tried[-1])
        return min(tried, key=lambda point: self._miss(point, capacity))

    def _miss(self, point: Point, capacity: float) -> float:
        if self.scope == "model":
            return abs(point.mean_capacity - capacity)
        return max(abs(one - capacity) for one in point.capacity)

    def _propose(self, point: Point, capacity: float) -> list[float]:
        if self.scope == "layer":
            return [border_at(logits, capacity) for logits in point.logits.values()]
        found = border_at(torch.cat(list(point.logits.values())), capacity)
        borders = [(logit_border(p.thresholds[0]), p.mean_capacity) for p in self.points]
        low = max((b for b, reached in borders if reached >= capacity), default=-math.inf)
        high = min((b for b, reached in borders if reached < capacity), default=math.inf)
        if not low < found < high and math.isfinite(high - low) and low < high:
            found = (low + high) / 2
        return [found] * len(point.logits)

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
        return self._border_of(lambda point: self.speedup(point) >= speedup)[0]

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
