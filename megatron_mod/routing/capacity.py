"""Holding routers to their target capacity over the steps of a training."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_mod.routing.config import RoutingConfig
from megatron_mod.routing.costs import Workload
from megatron_mod.routing.scheme import Place

MEMORY = 0.7  # of the price: what a step's own finding leaves of it


class CapacityController:
    """The target of each step, and what a kept unit costs.

    The published ``weight * relu(mean(m) - target)`` on one micro-batch depends on
    how the batch was cut. Here a step's penalty is

        ``sum over routed layers l of weight * on_l * (capacity_l - target_l)``

    with ``capacity_l`` the kept over the valid units of the global batch and
    ``on_l`` one where the previous step's capacity was above its target (1 before
    the first step). ``scope: model`` compares the means over the layers instead,
    so important layers may stay on. All state stays on the device.

    ``capacity_loss_weight: auto`` finds a price in place of a weight: that at which moving all
    logits together would gain nothing. Moving them by ``d`` changes the loss by ``d sum(s e)`` and
    what is spent by ``d sum(s c)``, with ``e = dL/dm`` of each unit (in ``L`` what it has later
    layers pay, but not its own price), ``s`` the sigmoid's slope at its logit and ``c`` what it
    costs to keep: together nothing at a price of ``-sum(s e) / sum(s c)`` for what costs 1. It is
    the derivative of the loss along the budget, so what is left of the gradient,
    ``s (e + price c)``, only says which units are worth more than others for what they cost. Where
    a budget counts units, all ``c`` are 1; where it counts operations (``router.work``), those of a
    mean unit of the place beside the mean of all places. ``price`` is here that of the ``N`` units
    of a global batch, ``-N sum(s e) / sum(s c)``. A step uses the running
    mean of those before it; the first has none and pays nothing.

    Targets are shares of what all units cost: capacities, or with ``router.work`` the share of what
    can be skipped that the budget leaves, of all places together.

    They may fall from 1 over the first share of a training
    (``capacity_warmup_fraction``), so that the least important units are given up first
    (gradual pruning, Zhu and Gupta 2017, with a linear schedule).
    """

    def __init__(
        self,
        config: RoutingConfig,
        *,
        device: torch.device | None = None,
        workload: Workload | None = None,
    ) -> None:
        """``workload``: what ``router.work`` is counted by."""
        self.config = config
        self.workload = None
        shares = config.capacity
        work = config.least_work
        if work is not None:
            assert workload is not None, "a budget of work that nothing counts"
            self.workload = workload
            shares = (workload.share(work),) * len(config.places)
        weight = config.capacity_loss_weight
        self.weight = None if isinstance(weight, str) else weight  # none: auto
        self.final_target = torch.tensor(shares, dtype=torch.float32, device=device)
        self.target = self.target_at(0.0)
        self.previous = torch.ones_like(self.final_target)
        self.price: Tensor | None = None
        self.capacities: dict[Place, float] = {}

    def target_at(self, progress: float, work: float | None = None) -> Tensor:
        """``[num_routed]``.

        Args:
            progress: the share of the training's steps done, 0 to 1.
            work: the budget, of several.
        """
        warmup = self.config.capacity_warmup_fraction
        share = min(progress / warmup, 1.0) if warmup else 1.0
        final = self.final_target if work is None else self.target_of(work)
        return torch.lerp(torch.ones_like(final), final, share)

    def target_of(self, work: float) -> Tensor:
        """``[num_routed]``, of a budget of work."""
        assert self.workload is not None
        return torch.full_like(self.final_target, self.workload.share(work))

    def start_step(self, progress: float, work: float | None = None) -> None:
        """Set a step's target, see ``target_at``, and with an exact selection the ``capacities``
        that are kept."""
        self.target = self.target_at(progress, work)
        if self.config.is_exact:
            self.capacities = self.config.capacities_at(progress)

    def prices(self) -> Tensor:
        """What a unit costs beside the mean of all places, ``[num_routed]``."""
        if self.workload is None:
            return torch.ones_like(self.target)
        return self.workload.prices(self.previous)

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
        if self.weight is None:
            price = torch.zeros_like(self.target) if self.price is None else self.price
            return price * self.prices() / num_units
        return self.switch() * (self.weight / num_units)

    def penalty(self, capacity: Tensor) -> Tensor:
        """This step's penalty, a scalar, given its global capacity ``[num_routed]``.

        A price is none: it is paid for and against every unit alike.
        """
        if self.weight is None:
            return capacity.new_zeros(())
        excess = self.switch() * (capacity - self.target)
        return self.weight * excess.sum()

    def end_step(self, capacity: Tensor, pull: Tensor, num_units: int) -> None:
        """Remember this step's global capacity ``[num_routed]`` for the next switch, and what the
        units pulled (``[num_routed, 2]``, see ``decision.keep_mask``) for the next price."""
        prices, self.previous = self.prices(), capacity.detach().clone()
        if self.weight is not None or self.config.is_exact:
            return
        pull = torch.stack((pull[:, 0], pull[:, 1] * prices), -1)
        if self.config.scope == "model":
            pull = pull.sum(0, keepdim=True).expand_as(pull)
        found = -num_units * pull[:, 0] / pull[:, 1].clamp(min=1e-30)
        self.price = found if self.price is None else torch.lerp(found, self.price, MEMORY)

    def state_dict(self) -> dict[str, list[float] | None]:
        price = None if self.price is None else self.price.tolist()
        return {"previous": self.previous.tolist(), "price": price}

    def load_state_dict(self, state: dict[str, list[float] | None]) -> None:
        self.previous = torch.tensor(state["previous"]).to(self.target)
        price = state.get("price")
        self.price = None if price is None else torch.tensor(price).to(self.target)
