"""Thresholds from routers' logits."""

from __future__ import annotations

import math

import torch
from torch import Tensor

MOST = 30.0  # the largest logit whose sigmoid is told apart from 1
SLACK = 0.002  # of the units, given up for a border that no logit is near
ROUNDING = 1e-5  # relative; logits closer than this are the same, computed twice


def border_at(logits: Tensor, capacity: float) -> float:
    """The logit from which on about ``capacity`` of the units with ``logits`` ``[N]`` is kept;
    infinite where all or none are.

    It lies in the middle of the widest gap between two logits within ``SLACK`` of that share. Units
    with one logit (the beginning that all samples share) are kept or skipped together.
    """
    ranked = logits.double().sort(descending=True).values
    wanted = capacity * len(ranked)
    gaps = ranked[:-1] - ranked[1:]  # behind the first, the second, ...
    same = gaps <= ROUNDING * ranked.abs().clamp(min=1)[1:]
    miss = (torch.arange(1, len(ranked)) - wanted).abs().masked_fill(same, math.inf)
    nearest = float(miss.min()) if len(miss) else math.inf
    if min(wanted, len(ranked) - wanted) < nearest:
        return math.inf if wanted < len(ranked) / 2 else -math.inf
    within = miss <= max(nearest, SLACK * len(ranked))
    best = int(gaps.masked_fill(~within, -1).argmax())
    return float(ranked[best] + ranked[best + 1]) / 2


def threshold_at(border: float) -> float:
    """The sigmoid of a logit, of which ``logit_border`` is the inverse.

    Raises:
        ValueError: a logit that no threshold between 0 and 1 can express.
    """
    if math.isinf(border):
        return 1.0 if border > 0 else 0.0
    if abs(border) > MOST:
        raise ValueError(
            f"the routers' scores lie around the logit {border:.0f}, which no threshold between 0 "
            "and 1 can express; train them with a smaller optimizer.lr."
        )
    return 1.0 / (1.0 + math.exp(-border))
