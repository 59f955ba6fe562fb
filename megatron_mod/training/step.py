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

from megatron_mod.data.batch import MicroBatch, equal_lengths
from megatron_mod.data.loader import StepBatch
from megatron_mod.model.builder import ModelChunks
from megatron_mod.model.layout import TokenLayout, zigzag
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
    chunks: list[torch.nn.Module],
    model: ModelChunks,
    batch: StepBatch,
    routing: RoutingConfig,
    *,
    controller: CapacityController | None,
) -> StepResult:
    """Run all micro-batches forward, and backward if there is a controller to train with.

    Every rank adds its exact share of the global batch's loss and gradient: the task loss is
    divided by the labels of the global batch, the penalty by its units, and nothing divides again.

    Args:
        chunks: what the schedule calls: the model's chunks, or the DDPs wrapped around them.
        model: this rank's part of the model, unwrapped.
    """
    routers = model.routers()
    if controller is not None:
        num_units = batch.num_sequences if routing.scheme.per_sequence else batch.num_tokens
        per_unit = dict(zip(routing.layers, controller.penalty_per_unit(num_units), strict=True))
        for layer, router in routers.items():
            router.penalty_per_unit.copy_(per_unit[layer])
    for router in routers.values():
        router.reset_counts()
    micro_batches = batch.micro_batches
    if len(chunks) > 1:
        micro_batches = equal_lengths(micro_batches)
    iterators = [iter(micro_batches) for _ in chunks]
    losses = get_forward_backward_func()(
        forward_step_func=partial(_forward_step, num_labels=batch.num_labels),
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=chunks,
        num_microbatches=len(micro_batches),
        seq_length=micro_batches[0].input_ids.shape[1],
        micro_batch_size=micro_batches[0].input_ids.shape[0],
        forward_only=controller is None,
    )
    return _reduce(losses, routers, routing)


def _forward_step(
    data: Iterator[MicroBatch], model: torch.nn.Module, *, num_labels: int
) -> tuple[Tensor, object]:
    batch = _part_of_this_rank(next(data).to(device.device()))
    output = model(
        batch.input_ids,
        batch.position_ids,
        None,
        labels=batch.labels.clamp(min=0),
        packed_seq_params=TokenLayout.of(
            batch, context_ranks=parallel_state.get_context_parallel_world_size()
        ),
    )
    return output, partial(_loss, labels=batch.labels, num_labels=num_labels)


def _part_of_this_rank(batch: MicroBatch) -> MicroBatch:
    """The tokens of each row that this context-parallel rank holds."""
    group = parallel_state.get_context_parallel_group()
    return batch.map(partial(zigzag, dim=1, rank=group.rank(), ranks=group.size()))


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
