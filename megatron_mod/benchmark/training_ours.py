"""A training of this package that is taken step by step."""

from __future__ import annotations

import contextlib
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mod.benchmark.training_ways import Taken
from megatron_mod.config.schema import Config
from megatron_mod.model.lora import seed_dropout
from megatron_mod.parallel import device, topology
from megatron_mod.training.loop import Training
from megatron_mod.training.plan import prepare
from megatron_mod.training.resume import RunCheckpoints
from megatron_mod.training.run_folder import RunFolder


class Ours:
    """A training, on this rank, of whatever settings."""

    def __init__(self, config: Config, stack: contextlib.ExitStack, *, meet: Path) -> None:
        """Meet the other ranks and make everything ready; called by all ranks.

        Args:
            stack: what is to be left at the end is put on it.
            meet: file that ranks meet through, not there yet.
        """
        plan = prepare(config)
        method = {"init_method": f"file://{meet}"} if plan.topology.world_size > 1 else {}
        stack.enter_context(topology.joined(plan.topology, seed=config.train.seed, **method))
        folder = RunFolder(config.checkpoint)
        stack.enter_context(folder.held())
        seed_dropout(plan.lora, seed=config.train.seed, groups=topology.process_groups())
        self.training = Training(config, plan, RunCheckpoints(config, folder, plan))
        self.loader = self.training.data
        self.shape = (plan.base.arch.hidden_size, plan.base.arch.ffn_hidden_size)
        self.places = plan.routing.places
        self.gradient: Tensor | None = None
        self.found = torch.zeros(len(self.places), self.shape[0], device=device.device())
        self.hooks = [
            router.weight.register_hook(partial(self._add, self.places.index(place)))
            for place, router in self.training.model.routers().items()
        ]

    def _add(self, number: int, grad: Tensor) -> None:
        """Take in what a micro-batch's backward pass gives a router."""
        self.found[number] += grad[0]

    def step(self, number: int) -> Taken:
        """Take a step, counted from 0; the gradient is that of the first one."""
        metrics = self.training.state.metrics
        before = metrics.tokens
        self.training.take(number + 1)
        if number == 0:
            for hook in self.hooks:
                hook.remove()
            dist.all_reduce(self.found)  # every rank has its share
            self.gradient = self.found
        return Taken(metrics.tokens - before, self.gradient)

    def capacity(self) -> float:
        """Share of the units that the last step kept."""
        return float(self.training.state.controller.previous.mean())
