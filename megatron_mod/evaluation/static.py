"""The baseline a router must beat: what it routes removed for good, from the layers that are best
spared together.

A layer whose threshold is 1 is removed and one whose threshold is 0 keeps all, so the baseline runs
on whatever the routed model runs on, with whatever that has for what it skips.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence

import torch

from megatron_mod.evaluation.backend import Backend
from megatron_mod.evaluation.rows import Row, evenly
from megatron_mod.evaluation.work import Work

METHOD = "greedy"
CHOICE_TOKENS = 1000  # that layers are chosen on: k of L layers take about k * L passes over them


def thresholds_without(layers: Sequence[int], removed: Collection[int]) -> list[float]:
    """Of the routed ``layers``, so that ``removed`` ones are skipped and all else is kept."""
    return [1.0 if layer in removed else 0.0 for layer in layers]


def loss_without(backend: Backend, rows: Sequence[Row], removed: Collection[int]) -> float:
    """Nats a label of the rows, with these of the routed layers removed; called by all ranks."""
    found = backend.observe(rows, thresholds=thresholds_without(backend.layers, removed))
    nats = math.fsum(-one.score.log_probability for one in found)
    return nats / sum(row.num_labels for row in rows)


class Greedy:
    """Chooses layers to remove, each next one costing least given those already out.

    Every rank makes the same calls and gets the same layers. Nothing is run before it is asked for.

    Args:
        rows: some of them, ``CHOICE_TOKENS`` from all over, are what layers are chosen on.
        after_pass: called after every pass over these.
    """

    def __init__(
        self,
        backend: Backend,
        rows: Sequence[Row],
        *,
        after_pass: Callable[[], object] = lambda: None,
    ) -> None:
        self.backend, self.after_pass = backend, after_pass
        tokens = sum(len(row.ids) for row in rows)
        self.rows = evenly(rows, max(1, round(len(rows) * CHOICE_TOKENS / tokens)))
        self.order: list[int] = []  # of removal, as far as it has been asked for
        self.losses: list[dict[int, float]] = []  # of every candidate in each round, nats a label

    def first(self, count: int) -> list[int]:
        """The ``count`` layers to remove, in the order of their removal."""
        assert count <= len(self.backend.layers)
        while len(self.order) < count:
            losses = {
                layer: self._loss([*self.order, layer])
                for layer in self.backend.layers
                if layer not in self.order
            }
            self.losses.append(losses)
            self.order.append(min(losses, key=losses.__getitem__))
        return self.order[:count]

    def _loss(self, removed: Collection[int]) -> float:
        loss = loss_without(self.backend, self.rows, removed)
        self.after_pass()
        return loss


def count_at_work(work: Work, rows: Sequence[Row], flops: int) -> int:
    """How many of the routed layers to remove so that a prefill of every row takes about ``flops``.

    Layers are alike, so each takes the same off.
    """
    layers = work.routing.layers
    with_all, with_none = (
        sum(_removal_flops(work, len(row.ids), removed) for row in rows) for removed in ((), layers)
    )
    count = round((with_all - flops) / (with_all - with_none) * len(layers))
    return min(max(count, 0), len(layers))


def _removal_flops(work: Work, length: int, removed: Collection[int]) -> int:
    layers = work.routing.layers
    kept = {layer: torch.full((length,), layer not in removed) for layer in layers}
    return work.at(thresholds_without(layers, removed)).prefill(length, kept)
