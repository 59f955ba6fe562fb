"""One pass of a global batch through the model: loss, gradients, capacity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mod.data.loader import StepBatch
from megatron_mod.model.builder import ModelChunks
from megatron_mod.model.forward import run_batches
from megatron_mod.model.layout import StepContext
from megatron_mod.parallel import device
from megatron_mod.routing.capacity import CapacityController
from megatron_mod.routing.config import RoutingConfig
from megatron_mod.training.losses import CrossEntropy, Loss


@dataclass(frozen=True)
class StepResult:
    """What a pass measured over the whole global batch, the same on every rank, on the device.

    ``task_loss``: the loss without the penalty, in nats per labelled token where it is the cross
    entropy; ``capacity``: kept over valid units, ``[num_routed]``.
    """

    task_loss: Tensor
    capacity: Tensor


def run_schedule(
    chunks: Sequence[torch.nn.Module],
    model: ModelChunks,
    batch: StepBatch,
    routing: RoutingConfig,
    *,
    controller: CapacityController | None,
    loss: Loss | None = None,
    check_decisions: bool = False,
) -> StepResult:
    """Run all micro-batches forward, and backward if there is a controller to train with.

    Every rank adds its exact share of the global batch's loss and gradient: a loss divides by
    counts of the global batch, the penalty by its units, and nothing divides again.

    Args:
        chunks: what the schedule calls: the model's chunks, or the DDPs wrapped around them.
        model: this rank's part of the model, unwrapped.
        loss: ``CrossEntropy`` without.
        check_decisions: stop if tensor-parallel ranks decide differently.
    """
    loss = loss or CrossEntropy()
    penalty = {}
    if controller is not None:
        num_units = batch.num_sequences if routing.scheme.per_sequence else batch.num_tokens
        penalty = dict(zip(routing.layers, controller.penalty_per_unit(num_units), strict=True))
    for router in model.routers().values():
        router.reset_counts()
    losses = run_batches(
        model,
        batch.micro_batches,
        len(batch.micro_batches),
        finish=partial(loss, batch=batch),
        chunks=chunks,
        with_labels=not loss.reads_logits,
        training=controller is not None,
        step=StepContext(penalty_per_unit=penalty, check_decisions=check_decisions),
    )
    return _reduce(losses, model, routing)


def _reduce(losses: list[Tensor], model: ModelChunks, routing: RoutingConfig) -> StepResult:
    """Add up loss, kept and valid units of all ranks; tensor-parallel ranks hold copies."""
    totals, routers = torch.zeros(1 + 2 * len(routing.layers), device=device.device()), {}
    if model.groups.tp.rank() == 0:
        routers = model.routers()
        if losses:
            totals[0] = torch.stack(losses).sum()
    for position, layer in enumerate(routing.layers, start=1):
        if layer in routers:
            totals[position] = routers[layer].kept
            totals[position + len(routing.layers)] = routers[layer].valid
    dist.all_reduce(totals)
    kept, valid = totals[1:].chunk(2)
    return StepResult(task_loss=totals[0], capacity=kept / valid.clamp(min=1))
