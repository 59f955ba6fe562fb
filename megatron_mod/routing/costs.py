"""What keeping units costs, and what share of a model's work a budget leaves to them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

SIZES = ("units", "tokens", "pairs")  # of a unit: itself, its tokens, the keys its queries see


@dataclass(frozen=True)
class UnitCosts:
    """What a kept unit costs at each place, in whatever a budget counts.

    Args:
        table: for each place, in the order of ``routing.places``, what a unit, a token of it and a
            key that one of its queries sees cost (the ``SIZES``).
        among_kept: keys are kept tokens' only, and a place's pairs quadratic in what it keeps.
            Counted are those that kept queries would see of all keys, times the place's share of
            kept units: as many as there are if kept tokens lie evenly in their documents.
    """

    table: tuple[tuple[float, float, float], ...]
    among_kept: bool = False

    @classmethod
    def equal(cls, places: int) -> UnitCosts:
        """Of a budget that counts units."""
        return cls(((1.0, 0.0, 0.0),) * places)

    def spent(self, kept: Tensor, valid: Tensor) -> Tensor:
        """What keeping units of these sizes costs, ``[P, ...]``.

        Args:
            kept: sums of the sizes of kept units, fp64 ``[P, ..., 3]``.
            valid: of all units, ``[P, 3]``.
        """
        parts = kept * self._by(kept)
        pairs = parts[..., 2]
        if self.among_kept:
            units = valid[:, 0].clamp(min=1).view(-1, *[1] * (kept.dim() - 2))
            pairs = pairs * (kept[..., 0] / units)
        return parts[..., :2].sum(-1) + pairs

    def of_a_unit(self, sizes: Tensor, capacity: Tensor) -> Tensor:
        """What one more unit of mean ``sizes`` ``[3]`` costs where places keep such shares of
        theirs (``[P]``): the derivative of ``spent``."""
        parts = self._by(sizes) * sizes
        pairs = parts[:, 2] * (2 * capacity if self.among_kept else 1)
        return parts[:, :2].sum(-1) + pairs

    def _by(self, like: Tensor) -> Tensor:
        table = self._tensor.to(like, non_blocking=True)
        return table.view(len(table), *[1] * (like.dim() - 2), len(SIZES))

    @cached_property
    def _tensor(self) -> Tensor:
        return torch.tensor(self.table, dtype=torch.float64)


@dataclass(frozen=True)
class Workload:
    """Counted operations of a routed model on a text, as a function of what its places keep.

    ``work`` is their share of the dense model's, ``share`` what is kept of all that can be skipped:
    ``work = (least + share * (most - least)) / dense``.

    Args:
        costs: operations of a kept unit, less those of its stand-in.
        sizes: units, tokens and pairs of the text, which every place has.
        dense: operations of the dense model.
        least: of the routed model if everything is skipped, routers and stand-ins included.
    """

    costs: UnitCosts
    sizes: tuple[int, int, int]
    dense: int
    least: int

    @cached_property
    def most(self) -> float:
        """Operations if everything is kept, routers included."""
        return self.least + self._skippable

    @cached_property
    def _skippable(self) -> float:
        return float(self._spent_evenly(1.0))

    def _spent_evenly(self, capacity: float) -> Tensor:
        valid = torch.tensor(self.sizes, dtype=torch.float64).expand(len(self.costs.table), -1)
        return self.costs.spent(valid * capacity, valid).sum()

    def work(self, share: float) -> float:
        """The share of the dense model's operations that a share of what can be skipped leaves."""
        return (self.least + share * self._skippable) / self.dense

    def share(self, work: float) -> float:
        """What to keep of what can be skipped for a share of the dense model's operations."""
        return min(max((work * self.dense - self.least) / max(self._skippable, 1.0), 0.0), 1.0)

    def even_capacity(self, work: float) -> float:
        """The share of its units that every place keeps at this work, if all keep the same."""
        low, high, wanted = 0.0, 1.0, self.share(work) * self._skippable
        for _ in range(50):
            middle = (low + high) / 2
            is_less = float(self._spent_evenly(middle)) < wanted
            low, high = (middle, high) if is_less else (low, middle)
        return high

    def prices(self, capacity: Tensor) -> Tensor:
        """What one more mean unit costs at each place ``[P]`` beside the mean of all places, where
        they keep such shares of theirs (``[P]``)."""
        found = self.costs.of_a_unit(self._mean_unit.to(capacity, non_blocking=True), capacity)
        return found / found.mean()

    def mean_costs(self) -> Tensor:
        """What a mean unit costs at each place ``[P]``, where all or nothing is kept."""
        whole = torch.ones(len(self.costs.table), dtype=torch.float64)
        return self.costs.spent(self._mean_unit * whole[:, None], self._mean_unit * whole[:, None])

    @cached_property
    def _mean_unit(self) -> Tensor:
        return torch.tensor(self.sizes, dtype=torch.float64) / max(self.sizes[0], 1)
