"""What a run's routers decide on documents, as the report shows it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_mod.calibration.search import Calibration, Point
from megatron_mod.routing.config import logit_border

TOKENS = 20  # of the most and of the least skipped ones
OCCURRENCES = 5  # of a token that is shown


@dataclass(frozen=True)
class Decisions:
    """A point's decisions by router and document.

    ``labels``: what the routers are called; ``shares``: kept share of each document's units,
    ``[num_routed, documents]`` (0 or 1 where a document decides as one); ``logits`` and
    ``borders``: of each router.
    """

    labels: list[str]
    shares: Tensor
    logits: list[Tensor]
    borders: list[float]

    @classmethod
    def of(cls, calibration: Calibration, point: Point) -> Decisions:
        borders = list(map(logit_border, point.thresholds))
        shares = [
            torch.stack([part.double().mean() for part in _by_document(calibration, kept)])
            for kept in _kept(point, borders)
        ]
        routing = calibration.work.routing
        assert routing is not None
        return cls(routing.labels, torch.stack(shares), list(point.logits.values()), borders)


def skipped_tokens(calibration: Calibration, point: Point) -> dict[str, list[dict]] | None:
    """The ``most`` and ``least`` skipped tokens of the vocabulary, by the mean over the
    routers, their occurrences and the experts of each; nothing where documents decide as one."""
    backend = calibration.backend
    if backend.by_sequence:
        return None
    borders = list(map(logit_border, point.thresholds))
    skipped = 1 - torch.stack(_kept(point, borders)).double().mean(0)
    ids = torch.cat([torch.tensor(list(row.ids)) for row in calibration.rows])
    skipped = skipped.view(len(ids), -1).mean(1)
    tokens, place, counts = ids.unique(return_inverse=True, return_counts=True)
    shares = torch.zeros(len(tokens), dtype=torch.float64).index_add_(0, place, skipped) / counts
    often = counts >= min(OCCURRENCES, int(counts.max()))
    ranked = shares[often].argsort(descending=True, stable=True)

    def entry(index: Tensor) -> dict:
        token = int(tokens[often][index])
        return {
            "text": backend.tokenizer.decode([token]),
            "id": token,
            "count": int(counts[often][index]),
            "skipped": float(shares[often][index]),
        }

    shown = min(TOKENS, len(ranked) // 2)
    most, least = ranked[:shown], ranked.flip(0)[:shown]
    return {"most": list(map(entry, most)), "least": list(map(entry, least))}


def experts(before: Point, after: Point) -> list[dict]:
    """Of every routed layer and expert how many tokens the model's gate sends to it and how many
    of them it computes, at the point ``before`` and ``after``; nothing where others are routed."""
    found = []
    for place, now in after.experts.items():
        counts = torch.cat((before.experts[place], now)).long().t().tolist()
        for number, (executed_before, assigned_before, executed, assigned) in enumerate(counts):
            found.append(
                {
                    "layer": place.layer,
                    "expert": number,
                    "assigned_before": assigned_before,
                    "executed_before": executed_before,
                    "assigned": assigned,
                    "executed": executed,
                }
            )
    return found


def _kept(point: Point, borders: list[float]) -> list[Tensor]:
    pairs = zip(point.logits.values(), borders, strict=True)
    return [logits >= border for logits, border in pairs]


def _by_document(calibration: Calibration, units: Tensor) -> tuple[Tensor, ...]:
    by_sequence, entries = calibration.backend.by_sequence, calibration.work.entries
    return units.split([1 if by_sequence else entries(len(row.ids)) for row in calibration.rows])
