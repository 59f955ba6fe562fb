"""Borders between what a router keeps and skips, and thresholds that say the same.

A border is a logit, a threshold its sigmoid: a unit is kept where its logit reaches the border.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

MOST = 30.0  # the largest logit whose sigmoid is told apart from 1
SLACK = 0.002  # of the units, given up for a border that no score is near
ROUNDING = 1e-5  # relative; scores closer than this may be the same, computed twice
PASSES = 20  # over a text, to find one border for all layers


def logit_border(threshold: float) -> float:
    """The logit whose sigmoid is ``threshold``: ``log(t / (1 - t))``."""
    if threshold in (0.0, 1.0):
        return math.inf if threshold else -math.inf
    return math.log(threshold / (1.0 - threshold))


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


def border_at(scores: Tensor, capacity: float) -> float:
    """The logit from which on about ``capacity`` of the units with these ``[N]`` is kept; infinite
    where all or none are.

    Units with one score (a token that a text repeats, the beginning that all samples share) are
    kept or skipped together, however often it was computed. The border lies in the middle of the
    widest gap between two scores within ``SLACK`` of the wanted share, or, if rounding would decide
    about more than ``SLACK`` of the units there, as near to that share as it does not.

    Raises:
        ValueError: a score that is no finite number.
    """
    ranked = _ranked(scores)
    if not len(ranked):
        return -math.inf
    wanted = capacity * len(ranked)
    middles = (ranked[:-1] + ranked[1:]) / 2  # behind the first, the second, ...
    miss = (torch.arange(1, len(ranked)) - wanted).abs()
    miss = miss.masked_fill(~_is_sound(middles, ranked), math.inf)
    nearest = float(miss.min()) if len(miss) else math.inf
    if min(wanted, len(ranked) - wanted) < nearest:
        return math.inf if wanted < len(ranked) / 2 else -math.inf
    within = miss <= max(nearest, SLACK * len(ranked))
    gaps = ranked[:-1] - ranked[1:]
    return float(middles[gaps.masked_fill(~within, -1).argmax()])


def settled_border(scores: Tensor, border: float) -> float | None:
    """The border in the middle of its gap, which keeps the same of the units with these scores
    ``[N]``; None where rounding decides about more than ``SLACK`` of them, here or there."""
    ranked = _ranked(scores)
    kept = int((ranked >= border).sum())
    middle = math.inf
    if kept == len(ranked):
        middle = -math.inf
    elif kept:
        middle = float(ranked[kept - 1 : kept + 1].mean())
    finite = [b for b in (border, middle) if math.isfinite(b)]
    return middle if _is_sound(torch.tensor(finite, dtype=ranked.dtype), ranked).all() else None


def common_border(
    scores_at: Callable[[float], Tensor],
    capacity: float,
    *,
    known: dict[float, Tensor] | None = None,
    tolerance: float | None = None,
) -> float:
    """The border of all layers at which about ``capacity`` of their units is kept.

    A border moves what later layers see, and with it their scores, so it is found by repetition:
    each pass places it by the scores of the pass before (``border_at``), or halves what earlier
    ones leave if that leads out of them. The search ends where scores put the border that made
    them.

    Args:
        scores_at: all layers' scores ``[N]`` at a border.
        known: what that is known to answer.
        tolerance: a capacity this near is near enough, if no score is near its border.
    """
    known = dict(known) if known else {-math.inf: scores_at(-math.inf)}

    def kept(border: float) -> float:
        return float((known[border] >= border).double().mean())

    def miss(border: float) -> float:
        return abs(kept(border) - capacity)

    border = min(known, key=miss)
    for _ in range(PASSES):
        scores = known[border]
        settled = settled_border(scores, border)
        if tolerance is not None and settled is not None and miss(border) <= tolerance:
            return settled
        found = border_at(scores, capacity)
        if found == settled:
            return found
        low = max((b for b in known if kept(b) >= capacity), default=-math.inf)
        high = min((b for b in known if kept(b) < capacity), default=math.inf)
        if not low < found < high and low < high and math.isfinite(high - low):
            found = (low + high) / 2
        if found in known:
            break
        border = found
        known[border] = scores_at(border)
    sound = {b: s for b in known if (s := settled_border(known[b], b)) is not None}
    return sound[min(sound, key=miss)]


def _ranked(scores: Tensor) -> Tensor:
    """The scores in descending order, in double precision on the CPU."""
    ranked = scores.detach().cpu().double().sort(descending=True).values
    if not ranked.isfinite().all():
        raise ValueError(
            "the routers' scores are not all finite numbers; the weights of the model or of its "
            "routers hold inf or NaN."
        )
    return ranked


def _is_sound(borders: Tensor, ranked: Tensor) -> Tensor:
    """Whether rounding decides about at most ``SLACK`` of the ranked scores at each border, and
    about none that are equal."""
    if not len(ranked):
        return torch.ones_like(borders, dtype=torch.bool)
    reach = ROUNDING * borders.abs().clamp(min=float(ranked.abs().median()))
    ascending = ranked.flip(0)
    near = torch.searchsorted(ascending, borders + reach, right=True)
    near -= torch.searchsorted(ascending, borders - reach)
    above = torch.searchsorted(ascending, borders)
    between = above == torch.searchsorted(ascending, borders, right=True)
    return between & (near <= SLACK * len(ranked))


class CapacityBorders:
    """Finds each router's border, from the first on, in one pass."""

    def __init__(self, capacity: dict[tuple[int, str], float]) -> None:
        self.capacity = capacity
        self.found: dict[tuple[int, str], float] = {}

    def find(self, place: tuple[int, str], logits: Tensor) -> float:
        """The border at which the router's capacity of the units with ``logits`` ``[N]`` is
        kept."""
        self.found[place] = border_at(logits, self.capacity[place])
        return self.found[place]


class WatchedBorders:
    """Gives all routers one border, and keeps their scores."""

    def __init__(self, border: float) -> None:
        self.border = border
        self.scores: list[Tensor] = []

    def find(self, place: tuple[int, str], logits: Tensor) -> float:
        self.scores.append(logits)
        return self.border
