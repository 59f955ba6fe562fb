"""The mean of what trains over the last steps of a training."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor


class ParameterAverage:
    """Running mean of parameters (Polyak and Juditsky, 1992), by their keys, in fp32 whatever
    theirs is.

    A penalty that switches on and off makes capacity swing about its target; the mean over
    the swings lies closer to it than the step at which training happens to end.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self.parameters = parameters
        self.count = 0
        self.mean: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self) -> None:
        """Take the parameters as they are now into the mean."""
        self.count += 1
        for key, parameter in self.parameters.items():
            mean = self.mean.setdefault(key, parameter.detach().to(torch.float32, copy=True))
            mean += (parameter - mean) / self.count

    def forget(self) -> None:
        """Start over: the steps taken in so far are no longer the last."""
        self.count, self.mean = 0, {}

    @contextlib.contextmanager
    def applied(self, when: bool = True) -> Iterator[None]:
        """Have the mean in the parameters for the block; without any update they stay as they are.

        The optimizer goes on from the values it knows, so they come back after the block.
        """
        own = {key: self.parameters[key].detach().clone() for key in self.mean}
        self._put(self.mean if when else {})
        try:
            yield
        finally:
            self._put(own if when else {})

    @torch.no_grad()
    def _put(self, values: Mapping[str, Tensor]) -> None:
        for key, value in values.items():
            self.parameters[key].copy_(value)
