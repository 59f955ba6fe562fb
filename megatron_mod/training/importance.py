"""What each routed layer, or part of it, is worth: the cost of leaving it out."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mod.data.loader import StepBatch
from megatron_mod.model.builder import ModelChunks
from megatron_mod.model.forward import Outcome, run_batches
from megatron_mod.model.head import add_up
from megatron_mod.model.layout import StepContext
from megatron_mod.parallel import device
from megatron_mod.routing.quantile import MARGIN
from megatron_mod.routing.scheme import Place
from megatron_mod.training.losses import dense_states, divergence

SPREAD = 0.2  # of the starting biases: logits a nat of the costs' logarithm
LEAST = 1e-4  # nats; a cost below it is taken for it


@torch.no_grad()
def leave_one_out(
    model: ModelChunks, batches: Sequence[StepBatch], places: Sequence[Place]
) -> dict[Place, float]:
    """How far the model without the units of one router is from the dense one, for each of
    ``places``: Kullback-Leibler divergence in nats per labelled token, with the stand-in, if there
    is one, in the units' stead. Called by all ranks alike.

    A divergence is always positive, and a tenth as noisy as a difference of losses: some hundred
    labelled tokens are enough.
    """
    was_training = model.training
    model.eval()
    totals = torch.zeros(len(places), device=device.device())
    for batch in batches:
        teacher = dense_states(model, batch)
        for number, left_out in enumerate(places):
            states = deque(teacher)

            def apart(outcome: Outcome, states: deque = states) -> Tensor:
                dense = states.popleft()

                def of_chunk(logits: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
                    found = divergence(outcome.model, dense[rows], logits)
                    return found, found

                return add_up(outcome.model, outcome.states(), of_chunk)[0]

            borders = dict.fromkeys(places, -math.inf) | {left_out: math.inf}
            found = run_batches(
                model,
                batch.micro_batches,
                len(batch.micro_batches),
                finish=apart,
                step=StepContext(borders=borders),
            )
            if found and model.groups.tp.rank() == 0:
                totals[number] += torch.stack(found).sum()
    model.train(was_training)
    dist.all_reduce(totals)
    labels = sum(batch.num_labels for batch in batches)
    return dict(zip(places, (totals / max(labels, 1)).tolist(), strict=True))


@torch.no_grad()
def start_apart(model: ModelChunks, costs: dict[Place, float], *, border: float) -> None:
    """Start the routers' biases apart, by what their units are worth: the least just above the
    border, so that everything is kept."""
    values = {k: SPREAD * math.log(max(cost, LEAST)) for k, cost in costs.items()}
    least = min(values.values())
    for place, router in model.routers().items():
        assert router.bias is not None
        router.bias.fill_(border + values[place] - least + MARGIN)
