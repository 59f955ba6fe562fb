"""Holding routers to their target capacity over the steps of a training."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_mod.routing.config import RoutingConfig


class CapacityController:
    """Switches the capacity penalty by the previous step's global capacity.

    The published ``weight * relu(mean(m) - target)`` on one micro-batch depends on
    how the batch was cut. Here a step's penalty is

        ``sum over routed layers l of weight * on_l * (capacity_l - target_l)``

    with ``capacity_l`` the kept over the valid units of the global batch and
    ``on_l`` one where the previous step's capacity was above its target (1 before
    the first step). ``scope: model`` compares the means over the layers instead,
    so important layers may stay on. All state stays on the device.

    The target may fall from 1 over the first share of a training
    (``capacity_warmup_fraction``), so that the least important units are given up first
    (gradual pruning, Zhu and Gupta 2017, with a linear schedule).
    """

    def __init__(self, config: RoutingConfig, *, device: torch.device | None = None) -> None:
        self.config = config
        self.final_target = torch.tensor(config.capacity, dtype=torch.float32, device=device)
        self.start_step(1.0)
        self.previous = torch.ones_like(self.final_target)

    def start_step(self, progress: float) -> None:
        """Set a step's target; ``progress``: the share of the training's steps done, 0 to 1."""
        warmup = self.config.capacity_warmup_fraction
        share = min(progress / warmup, 1.0) if warmup else 1.0
        self.target = torch.lerp(torch.ones_like(self.final_target), self.final_target, share)

    def switch(self) -> Tensor:
        """``on_l`` of this step, fp32 ``[num_routed]``."""
        if self.config.scope == "model":
            above = self.previous.mean() > self.target.mean()
            return above.to(self.target.dtype).expand_as(self.target)
        return (self.previous > self.target).to(self.target.dtype)

    def penalty_per_unit(self, num_units: int) -> Tensor:
        """Derivative of the penalty by one unit's mask, ``[num_routed]``.

        ``num_units`` counts the valid units of the global batch.
        """
        return self.switch() * (self.config.capacity_loss_weight / num_units)

    def penalty(self, capacity: Tensor) -> Tensor:
        """This step's penalty, a scalar, given its global capacity ``[num_routed]``."""
        excess = self.switch() * (capacity - self.target)
        return self.config.capacity_loss_weight * excess.sum()

    def end_step(self, capacity: Tensor) -> None:
        """Remember this step's global capacity ``[num_routed]`` for the next switch."""
        self.previous = capacity.detach().clone()

    def state_dict(self) -> dict[str, list[float]]:
        return {"previous": self.previous.tolist()}

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        self.previous = torch.tensor(state["previous"]).to(self.target)
