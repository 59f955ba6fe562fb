"""A model driven over micro-batches through Megatron's schedule: the one forward step there is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, repeat
from typing import TypeVar

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from torch import Tensor

from megatron_mod.data.batch import MicroBatch, blank, equal_lengths, label_places, on_device
from megatron_mod.data.chat import IGNORE
from megatron_mod.model.builder import ModelChunks, RoutedGPTModel
from megatron_mod.model.layout import StepContext, TokenLayout, zigzag
from megatron_mod.parallel import device
from megatron_mod.routing.decision import Decisions
from megatron_mod.routing.scheme import Place

T = TypeVar("T")


@dataclass(frozen=True)
class Outcome:
    """A micro-batch that has gone through the model, on the last pipeline stage.

    Args:
        model: the chunk with the head, which has not been asked.
        hidden_states: final ones, ``[S, B, H]`` (``[S / tp, B, H]`` with sequence parallelism).
        batch: the tokens that this context-parallel rank holds, on the device.
        places: row and column ``[N]`` of each of its labels, row by row.
        decisions: of this stage's routers, by their places.
    """

    model: RoutedGPTModel
    hidden_states: Tensor
    batch: MicroBatch
    places: tuple[Tensor, Tensor]
    decisions: Mapping[Place, Decisions]

    @property
    def labels(self) -> Tensor:
        """int64 ``[N]``, row by row."""
        return self.batch.labels[self.places]

    def states(self, places: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Final hidden states ``[N, H]`` at ``places``, the labelled ones without.

        Tensor-parallel ranks get the same, and their gradients, each of its part of the
        vocabulary, add up.
        """
        rows, columns = self.places if places is None else places
        hidden, group = self.hidden_states, self.model.pg_collection.tp
        # Taken from [S, B, H] as it is: a transposed gradient would have every frozen weight's
        # backward computed as S small products instead of one.
        if self.model.config.sequence_parallel:
            return gather_from_sequence_parallel_region(hidden, group=group)[columns, rows]
        return copy_to_tensor_model_parallel_region(hidden[columns, rows], group=group)


def run_batches(
    model: ModelChunks,
    batches: Iterable[MicroBatch],
    count: int,
    *,
    finish: Callable[[Outcome], T],
    chunks: Sequence[torch.nn.Module] | None = None,
    training: bool = False,
    step: StepContext | None = None,
    watch: Callable[[Mapping[Place, Decisions]], None] | None = None,
) -> list[T]:
    """Run micro-batches forward, in training backward too; called by all ranks.

    Ranks that share experts run as many each, of which ``finish`` and ``watch`` see nothing where
    they have none left.

    Args:
        count: how many batches there are, the same on all stages, and in training on all ranks that
            share experts.
        finish: what is wanted of each batch; in training its loss, a scalar whose gradient is
            this batch's exact share.
        chunks: what the schedule calls: the DDPs wrapped around the model's chunks, if they are.
        step: what it asks of the routed layers.
        watch: is shown every batch's decisions, on each stage those of its layers.

    Returns:
        What ``finish`` gave for each batch, on the last stage; elsewhere nothing.
    """
    passes = count if training else most_passes(model, count)
    if not passes:
        return []
    context, ranks = model.groups.cp, model.groups.tp.size() * model.groups.cp.size()
    filler = blank(1, 2 * ranks)  # a length that all who share a sequence can share
    batches = chain(batches, repeat(filler, passes - count))

    def is_own(batch: MicroBatch) -> bool:
        # A filler holds no document; what a caller gives always holds one where fillers are made.
        return passes == count or any(batch.documents)

    chunks = list(chunks or model)
    if len(chunks) > 1:
        batches = equal_lengths(list(batches))
        iterators, first = [iter(batches) for _ in chunks], batches[0]
    else:
        rest = iter(batches)
        first = next(rest)
        iterators = [chain((first,), rest)]

    def forward_step(data: Iterator[MicroBatch], chunk: torch.nn.Module) -> tuple[Tensor, object]:
        cut = partial(zigzag, dim=1, rank=context.rank(), ranks=context.size())
        on_host = next(data).map(cut)
        batch = on_host.to(device.device())
        layout = TokenLayout.of(batch, context_ranks=context.size(), step=step)
        output = chunk(
            batch.input_ids,
            batch.position_ids,
            None,
            decoder_input=_entering(batch, model),
            packed_seq_params=layout,
            with_head=False,
        )
        if watch is not None and is_own(on_host):
            watch(layout.decisions)

        def end(output: Tensor, *, non_loss_data: bool = False) -> object:
            if not is_own(on_host):
                return None
            # Found on the host: on the device their number would have to be waited for.
            rows, columns = (on_device(place, device.device()) for place in label_places(on_host))
            found = finish(Outcome(model.last, output, batch, (rows, columns), layout.decisions))
            if non_loss_data:
                return found
            assert isinstance(found, Tensor)
            return found, (batch.labels != IGNORE).sum(), found.detach()

        return output, end

    with torch.set_grad_enabled(training):
        found = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iterators if len(chunks) > 1 else iterators[0],
            model=chunks,
            num_microbatches=passes,
            # Batches differ in both; only a virtual pipeline, where they do not, looks at them.
            seq_length=first.input_ids.shape[1],
            micro_batch_size=first.input_ids.shape[0],
            forward_only=not training,
            collect_non_loss_data=not training,
        )
    for data in iterators:
        next(data, None)  # lets a progress bar around the batches see their end
    return found[:count]


def most_passes(model: ModelChunks, count: int) -> int:
    """The largest ``count`` among the ranks that share experts with this one, which wait for each
    other in every layer; called by all of them."""
    group = model.groups.ep
    if group.size() == 1:
        return count
    most = torch.tensor(count, device=device.device())
    dist.all_reduce(most, op=dist.ReduceOp.MAX, group=group)
    return int(most)


def _entering(batch: MicroBatch, model: ModelChunks) -> Tensor | None:
    """The hidden states of this rank's tokens as Megatron's layers take them, if there are any."""
    if batch.states is None:
        return None
    states = batch.states.transpose(0, 1).contiguous()
    if model.config.sequence_parallel:
        states = scatter_to_sequence_parallel_region(states, group=model.groups.tp)
    return states
