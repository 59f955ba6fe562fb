"""One pass of a global batch through Megatron's schedule: loss, gradients, capacity."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_mod.data.batch import MicroBatch
from megatron_mod.data.loader import StepBatch
from megatron_mod.model.builder import RoutedGPTModel
from megatron_mod.parallel import device
from megatron_mod.routing.capacity import CapacityController
from megatron_mod.routing.config import RoutingConfig
from megatron_mod.routing.router import Router


@dataclass(frozen=True)
class StepResult:
    """What a pass measured over the whole global batch, the same on every rank, on the device.

    ``task_loss``: nats per labelled token; ``capacity``: kept over valid units, ``[num_routed]``.
    """

    task_loss: Tensor
    capacity: Tensor


def run_schedule(
    chunk: torch.nn.Module,
    model: RoutedGPTModel,
    batch: StepBatch,
    routing: RoutingConfig,
    *,
    controller: CapacityController | None,
) -> StepResult:
    """Run all micro-batches forward, and backward if there is a controller to train with.

    Every rank adds its exact share of the global batch's loss and gradient: the task loss is
    divided by the labels of the global batch, the penalty by its sequences, and nothing
    divides again.

    Args:
        chunk: what the schedule calls: the model, or the DDP wrapped around it.
        model: this rank's stage, unwrapped.
    """
    routers = model.routers()
    if controller is not None:
        per_unit = dict(
            zip(routing.layers, controller.penalty_per_unit(batch.num_sequences), strict=True)
        )
        for layer, router in routers.items():
            router.penalty_per_unit.copy_(per_unit[layer])
    for router in routers.values():
        router.reset_counts()
    losses = get_forward_backward_func()(
        forward_step_func=partial(_forward_step, num_labels=batch.num_labels),
        data_iterator=iter(batch.micro_batches),
        model=[chunk],
        num_microbatches=len(batch.micro_batches),
        seq_length=batch.micro_batches[0].input_ids.shape[1],
        micro_batch_size=batch.micro_batches[0].input_ids.shape[0],
        forward_only=controller is None,
    )
    return _reduce(losses, routers, routing)


def _forward_step(
    data: Iterator[MicroBatch], model: torch.nn.Module, *, num_labels: int
) -> tuple[Tensor, object]:
    batch = next(data).to(device.device())
    output = model(
        batch.input_ids,
        batch.position_ids,
        batch.roles,
        labels=batch.labels.clamp(min=0),
    )
    return output, partial(_loss, labels=batch.labels, num_labels=num_labels)


def _loss(per_token: Tensor, *, labels: Tensor, num_labels: int) -> tuple[Tensor, Tensor, Tensor]:
    """This micro-batch's share of the global loss, from losses ``[B, S]``."""
    counted = labels >= 0
    loss = (per_token.float() * counted).sum() / num_labels
    return loss, counted.sum(), loss.detach()


def _reduce(losses: list[Tensor], routers: dict[int, Router], routing: RoutingConfig) -> StepResult:
    """Add up loss, kept and valid units of all ranks; tensor-parallel ranks hold copies."""
    totals = torch.zeros(1 + 2 * len(routing.layers), device=device.device())
    if parallel_state.get_tensor_model_parallel_rank() == 0:
        if losses:
            totals[0] = torch.stack(losses).sum()
        for position, layer in enumerate(routing.layers, start=1):
            if layer in routers:
                totals[position] = routers[layer].kept
                totals[position + len(routing.layers)] = routers[layer].valid
    dist.all_reduce(totals)
    kept, valid = totals[1:].chunk(2)
    return StepResult(task_loss=totals[0], capacity=kept / valid.clamp(min=1))
