"""The baseline a router must beat: what it routes removed for good, from the layers that are best
spared together.

A layer whose threshold is 1 is removed and one whose threshold is 0 keeps all, so the baseline runs
on whatever the routed model runs on, with whatever that has for what it skips.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence

import torch

from megatron_mod.evaluation.backend import Backend
from megatron_mod.evaluation.rows import Row, evenly
from megatron_mod.evaluation.work import Work
from megatron_mod.routing.scheme import Place

METHOD = "greedy"
CHOICE_TOKENS = 1000  # that layers are chosen on: k of L layers take about k * L passes over them


def thresholds_without(places: Sequence[Place], removed: Collection[Place]) -> list[float]:
    """Of the routers at ``places``, so that ``removed`` ones are skipped and all else is kept."""
    return [1.0 if place in removed else 0.0 for place in places]


def loss_without(backend: Backend, rows: Sequence[Row], removed: Collection[Place]) -> float:
    """Nats a label of the rows, with what these routers decide about removed; called by all
    ranks."""
    found = backend.observe(rows, thresholds=thresholds_without(backend.places, removed))
    nats = math.fsum(-one.score.log_probability for one in found)
    return nats / sum(row.num_labels for row in rows)


class Greedy:
    """Chooses what to remove, each next one costing least given those already out: least loss, or
    where an attention and an MLP take different work, least loss for the work that it saves.

    Every rank makes the same calls and gets the same. Nothing is run before it is asked for.

    Args:
        rows: some of them, ``CHOICE_TOKENS`` from all over, are what it chooses on.
        work: of the model on the backend.
        after_pass: called after every pass over these.
    """

    def __init__(
        self,
        backend: Backend,
        rows: Sequence[Row],
        *,
        work: Work,
        after_pass: Callable[[], object] = lambda: None,
    ) -> None:
        self.backend, self.work, self.after_pass = backend, work, after_pass
        tokens = sum(len(row.ids) for row in rows)
        self.rows = evenly(rows, max(1, round(len(rows) * CHOICE_TOKENS / tokens)))
        self.order: list[Place] = []  # of removal, as far as it has been asked for
        self.losses: list[dict[Place, float]] = []  # of every candidate in each round, nats a label
        self._alike = len({place.target for place in backend.places}) == 1

    def first(self, count: int) -> list[Place]:
        """The ``count`` places to remove, in the order of their removal."""
        assert count <= len(self.backend.places)
        while len(self.order) < count:
            losses = {
                place: self._loss([*self.order, place])
                for place in self.backend.places
                if place not in self.order
            }
            self.order.append(min(losses, key=self._costs(losses).__getitem__))
            self.losses.append(losses)
        return self.order[:count]

    def nearest(self, rows: Sequence[Row], flops: int) -> list[Place]:
        """Those to remove, in the order of their removal, so that a prefill of every row takes
        about ``flops``."""
        lengths = [len(row.ids) for row in rows]
        left = self._flops(lengths, [])
        savings = {place: left - self._flops(lengths, [place]) for place in self.backend.places}
        count = 0
        while count < len(savings):
            remaining = [place for place in savings if place not in self.order[:count]]
            if left - flops <= min(savings[place] for place in remaining) / 2:
                break
            saved = savings[self.first(count + 1)[-1]]
            if saved - (left - flops) > left - flops:
                break
            left, count = left - saved, count + 1
        return self.first(count)

    def _costs(self, losses: Mapping[Place, float]) -> dict[Place, float]:
        """By what candidates of a round are compared, the least first."""
        if self._alike:
            return dict(losses)
        before = self.losses[-1][self.order[-1]] if self.order else self._loss([])
        lengths = [len(row.ids) for row in self.rows]
        left = self._flops(lengths, self.order)
        return {
            place: (loss - before) / (left - self._flops(lengths, [*self.order, place]))
            for place, loss in losses.items()
        }

    def _loss(self, removed: Collection[Place]) -> float:
        loss = loss_without(self.backend, self.rows, removed)
        self.after_pass()
        return loss

    def _flops(self, lengths: Sequence[int], removed: Collection[Place]) -> int:
        """Of a prefill of every row."""
        places = self.backend.places
        work = self.work.at(thresholds_without(places, removed))
        return sum(
            work.prefill(
                n, {place: torch.full((work.entries(n),), place not in removed) for place in places}
            )
            for n in lengths
        )
