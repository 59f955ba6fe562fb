"""The mean of the routers over the last steps of a training."""

from __future__ import annotations

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

    @torch.no_grad()
    def apply(self) -> None:
        """Put the mean into the routers; without any update they stay as they are."""
        for layer, mean in self.mean.items():
            self.routers[layer].weight.copy_(mean)
