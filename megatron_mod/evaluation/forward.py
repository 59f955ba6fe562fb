"""A Megatron model run forward on batches, through Megatron's schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_mod.data.batch import MicroBatch
from megatron_mod.model.builder import ModelChunks
from megatron_mod.model.layout import TokenLayout
from megatron_mod.parallel import device

T = TypeVar("T")


@torch.no_grad()
def run_forward(
    model: ModelChunks,
    batches: Iterable[MicroBatch],
    count: int,
    *,
    read: Callable[[Tensor, MicroBatch], T],
) -> list[T]:
    """What ``read`` makes of each batch's logits ``[B, S, vocab / tp]``, on the last stage.

    Elsewhere nothing. ``count``: how many batches there are, the same on all stages.
    """
    if not count:
        return []

    def forward_step(data, model):
        batch = next(data).to(device.device())
        layout = TokenLayout.of(batch)
        output = model(batch.input_ids, batch.position_ids, None, packed_seq_params=layout)

        def result(logits: Tensor, *, non_loss_data: bool) -> T:
            assert non_loss_data
            return read(logits, batch)

        return output, result

    # Lengths vary from batch to batch, so the schedule's own are never used.
    data = iter(batches)
    found = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=data,
        model=list(model),
        num_microbatches=count,
        seq_length=1,
        micro_batch_size=1,
        forward_only=True,
        collect_non_loss_data=True,
    )
    next(data, None)  # lets a progress bar around the batches see their end
    return found
