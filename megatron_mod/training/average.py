"""The mean of the routers over the last steps of a training."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_mod.routing.router import Router


class RouterAverage:
    """Running mean of router weights (Polyak and Juditsky, 1992).

    A penalty that switches on and off makes capacity swing about its target; the mean over
    the swings lies closer to it than the step at which training happens to end.
    """

    def __init__(self, routers: dict[int, Router]) -> None:
        self.routers = routers
        self.count = 0
        self.mean: dict[int, Tensor] = {}

    @torch.no_grad()
    def update(self) -> None:
        """Take the routers as they are now into the mean."""
        self.count += 1
        for layer, router in self.routers.items():
            mean = self.mean.setdefault(layer, router.weight.detach().clone())
            mean += (router.weight - mean) / self.count

    def forget(self) -> None:
        """Start over: the steps taken in so far are no longer the last."""
        self.count, self.mean = 0, {}

    @contextlib.contextmanager
    def applied(self, when: bool = True) -> Iterator[None]:
        """Have the mean in the routers for the block; without any update they stay as they are.

        The optimizer goes on from the routers it knows, so they come back after the block.
        """
        own = {layer: self.routers[layer].weight.detach().clone() for layer in self.mean}
        self._put(self.mean if when else {})
        try:
            yield
        finally:
            self._put(own if when else {})

    @torch.no_grad()
    def _put(self, weights: dict[int, Tensor]) -> None:
        for layer, weight in weights.items():
            self.routers[layer].weight.copy_(weight)
