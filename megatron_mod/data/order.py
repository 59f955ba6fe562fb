"""Which sample comes when: a function of the seed alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor


def epoch_length(parts: Sequence[tuple[int, float]]) -> int:
    """How many samples an epoch of ``Order``'s parts holds."""
    return sum(count * int(weight) + _more(count, weight) for count, weight in parts)


def _more(count: int, weight: float) -> int:
    """How many of ``count`` samples an epoch holds once more than all of them."""
    return round((weight - int(weight)) * count)


def steps_of(epochs: float, *, samples: int, batch: int) -> int:
    """The steps of ``batch`` samples that so many epochs of ``samples`` take, rounded up: batches
    run across epoch borders. 1.1 counts as 11/10, which no float is."""
    return math.ceil(Fraction(str(epochs)) * samples / batch)


class Order:
    """An endless sequence of sample indices, epoch after epoch, each in an order of its own.

    An epoch holds part ``p`` of the samples ``weight`` times: whole copies, and for the
    fraction as many samples as ``round`` says, drawn anew for each epoch.

    Args:
        parts: number of samples and weight of each part, in the order the samples are in.
    """

    def __init__(self, parts: Sequence[tuple[int, float]], *, seed: int) -> None:
        self.parts = tuple(parts)
        self.seed = seed
        self._current: tuple[int, Tensor] | None = None
        self.epoch_length = epoch_length(self.parts)

    def __getitem__(self, position: int) -> int:
        """The sample at a position, counted over all epochs from 0."""
        epoch, offset = divmod(position, self.epoch_length)
        if self._current is None or self._current[0] != epoch:
            self._current = epoch, self.epoch(epoch)
        return int(self._current[1][offset])

    def epoch(self, number: int) -> Tensor:
        """The samples of one epoch in their order, int64 ``[epoch_length]``."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        items = self._items(number)
        return items[torch.randperm(len(items), generator=generator)]

    def first(self, count: int) -> Tensor:
        """The samples that the first ``count`` positions hold, each once and ascending, int64."""
        held = torch.zeros(sum(size for size, _ in self.parts), dtype=torch.bool)
        for number in range(-(-count // self.epoch_length)):
            held[self.epoch(number)[: count - number * self.epoch_length]] = True
            if held.all():
                break
        return held.nonzero().flatten()

    def _items(self, epoch: int) -> Tensor:
        """What an epoch holds, int64, in no order yet."""
        generator = torch.Generator().manual_seed(self.seed * 999_983 + epoch)
        items, first = [], 0
        for count, weight in self.parts:
            indices = torch.arange(first, first + count)
            whole = int(weight)
            drawn = torch.randperm(count, generator=generator)[: _more(count, weight)]
            items += [indices] * whole + [indices[drawn]]
            first += count
        return torch.cat(items)
