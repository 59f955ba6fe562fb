"""Which sample comes when: a function of the seed alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Order:
    """An endless sequence of sample indices, epoch after epoch, each in an order of its own.

    An epoch holds part ``p`` of the samples ``weight`` times: whole copies, and for the
    fraction as many samples as ``round`` says, drawn anew for each epoch.

    Args:
        parts: number of samples and weight of each part, in the order the samples are in.
        limit: train on no more than this many, the first ones of the first epoch, in each.
    """

    def __init__(
        self, parts: Sequence[tuple[int, float]], *, seed: int, limit: int | None = None
    ) -> None:
        self.parts = tuple(parts)
        self.seed = seed
        self._current: tuple[int, Tensor] | None = None
        self._chosen: Tensor | None = None
        if limit is not None:
            self._chosen = self._shuffled(self._items(0), 0)[:limit]
        self.epoch_length = len(self._items(0) if self._chosen is None else self._chosen)

    def __getitem__(self, position: int) -> int:
        """The sample at a position, counted over all epochs from 0."""
        epoch, offset = divmod(position, self.epoch_length)
        if self._current is None or self._current[0] != epoch:
            items = self._items(epoch) if self._chosen is None else self._chosen
            self._current = epoch, self._shuffled(items, epoch)
        return int(self._current[1][offset])

    def _shuffled(self, items: Tensor, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        return items[torch.randperm(len(items), generator=generator)]

    def _items(self, epoch: int) -> Tensor:
        """What an epoch holds, int64, in no order yet."""
        generator = torch.Generator().manual_seed(self.seed * 999_983 + epoch)
        items, first = [], 0
        for count, weight in self.parts:
            indices = torch.arange(first, first + count)
            whole = int(weight)
            drawn = torch.randperm(count, generator=generator)[: round((weight - whole) * count)]
            items += [indices] * whole + [indices[drawn]]
            first += count
        return torch.cat(items)
