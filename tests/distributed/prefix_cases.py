"""What ranks run in the test of the frozen prefix; imported by name in every rank."""

from __future__ import annotations

import torch.distributed as dist

from megatron_mod.config import cli
from megatron_mod.training import loop
from megatron_mod.training.plan import prepare
from tests.helpers.ranks import meet


def gradients(jobs: list[tuple[dict, list[str]]]) -> list[list[dict]]:
    """Trainings one after the other, (degrees, command line): of each the gradients of all that
    this rank trains, step by step."""
    found = []
    for degrees, arguments in jobs:
        config = cli.parse(arguments)
        meet(**degrees)
        found.append(with_gradients(config))
        dist.barrier()
    return found


def with_gradients(config) -> list[dict]:
    """Train; the gradients of each step by layer and name."""
    steps, update = [], loop.Training._update

    def noting(training, step):
        steps.append(
            {
                (layer, name): parameter.main_grad.clone()
                for layer, module in training.model.routed_layers().items()
                for name, parameter in module.named_parameters()
                if parameter.requires_grad
            }
        )
        return update(training, step)

    loop.Training._update = noting
    try:
        loop.train(config, prepare(config))
    finally:
        loop.Training._update = update
    return steps
