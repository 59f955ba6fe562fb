"""Computes the hidden states that enter the first routed layer, and keeps them.

The ranks of a replica share its work as they do in training, and data-parallel ranks the samples.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from rich.filesize import decimal
from torch import Tensor

from megatron_mod.checkpoint.folders import require_room
from megatron_mod.config.schema import Config
from megatron_mod.conversion.progress import byte_progress
from megatron_mod.conversion.restore import load_model
from megatron_mod.data.batch import MicroBatch, blank_like, collate
from megatron_mod.model.builder import ModelChunks
from megatron_mod.model.cost import Costs
from megatron_mod.model.forward import Outcome, run_batches
from megatron_mod.model.layout import undo_zigzag
from megatron_mod.model.pipeline import cheapest_layout
from megatron_mod.parallel import device, topology
from megatron_mod.parallel.agree import on_first_rank, together
from megatron_mod.training.needed_states import Needed
from megatron_mod.training.plan import DTYPES, Plan, row_multiple

IN_FLIGHT = 4  # micro-batches of each of several pipeline stages, which work at the same time


def fill(config: Config, plan: Plan, needed: Needed, missing: np.ndarray, *, folder: Path) -> None:
    """Compute what is missing, with a model of the prefix alone; called by all ranks.

    What a batch is made of depends on the run alone, so that a job that goes on after a kill
    computes the same numbers.

    Args:
        missing: items of ``needed``.
        folder: what messages call the place where states are kept.

    Raises:
        ValueError: the disk has no room for it, or it cannot be written.
    """
    size, began = needed.nbytes(missing), time.monotonic()
    what = f"{len(missing)} samples ({needed.lengths[missing].sum()} tokens, {decimal(size)})"
    topology.print_once(
        f"hidden states that enter layer {plan.computed.start}, computed once: {what} in {folder}"
    )
    whose = "what train.frozen_prefix = cache keeps (train.prefix_cache)"
    on_first_rank(lambda: require_room(folder, size, what=whose))
    entries = [entry for entry, _ in needed.by_entry(missing)]
    for entry in entries:
        on_first_rank(entry.make)
    topology.at("computing the frozen prefix")
    model, ranks = _prefix(config, plan), plan.topology
    left = np.isin(np.arange(len(needed)), missing)
    budget = config.train.micro_batch_size * config.data.max_length
    batches = [batch for batch in like_lengths(needed.lengths, budget) if left[batch].any()]
    at_once = ranks.data * (1 if ranks.pipeline == 1 else IN_FLIGHT * ranks.pipeline)
    writes = _writes(model)
    with contextlib.ExitStack() as stack:
        with together():
            write = {e.path: stack.enter_context(e.filled()) for e in entries if writes}
        advance = stack.enter_context(_progress("frozen prefix", total=size))
        for first in range(0, len(batches), at_once):
            shared = batches[first : first + at_once]
            mine = shared[model.groups.dp.rank() :: ranks.data]
            micro_batches = _micro_batches(needed, shared, mine, plan)
            states = run_batches(
                model, micro_batches, len(micro_batches), finish=partial(_whole_rows, model)
            )
            with together():  # a disk that is full is so for all
                for batch, rows in zip(mine, states if writes else (), strict=False):
                    for item, row in zip(batch, rows, strict=False):  # blank ones come last
                        if left[item]:
                            entry, place = needed.entries[needed.entry[item]], needed.place[item]
                            write[entry.path](int(place), row[: needed.lengths[item]])
            done = np.concatenate(shared)
            advance(needed.nbytes(done[left[done]]))
    del model
    gc.collect()
    if device.HAS_GPU:
        torch.cuda.empty_cache()
    topology.print_once(f"computed {what} in {time.monotonic() - began:.0f} s")


def _prefix(config: Config, plan: Plan) -> ModelChunks:
    """The layers that training does without."""
    ranks, below = plan.topology, range(plan.computed.start)
    costs = Costs(tuple(int(k in below) for k in range(plan.base.arch.num_layers)), head=0)
    ranks = replace(ranks, pipeline_layout=cheapest_layout(costs, ranks.stages))
    return load_model(
        plan.base,
        None,
        ranks,
        implementation=plan.implementation,
        dtype=DTYPES[config.model.dtype],
        fp8=config.model.fp8,
        trained=(),
        computed=below,
    ).eval()


def _writes(model: ModelChunks) -> bool:
    """Whether this is the rank of its replica that has the result, and writes it."""
    groups = model.groups
    is_last = groups.pp.rank() == groups.pp.size() - 1
    return is_last and groups.tp.rank() == 0 and groups.cp.rank() == 0


def like_lengths(lengths: np.ndarray, budget: int) -> Iterator[np.ndarray]:
    """All items, longest first, in batches of at most ``budget`` tokens with their padding, or of
    one that is longer."""
    order, first = np.argsort(-lengths, kind="stable"), 0
    while first < len(order):
        count = max(budget // int(lengths[order[first]]), 1)
        yield order[first : first + count]
        first += count


def _micro_batches(
    needed: Needed, shared: Sequence[np.ndarray], mine: Sequence[np.ndarray], plan: Plan
) -> list[MicroBatch]:
    """This rank's, and blank ones where others have more; of a virtual pipeline all have as many
    rows."""
    ranks = plan.topology
    num_rows = max(map(len, shared)) if ranks.virtual_pipeline else 0
    group = ranks.pipeline if ranks.virtual_pipeline else 1

    def made(batch: np.ndarray) -> MicroBatch:
        rows = [[needed.sample(item)] for item in batch]
        rows += [[]] * (num_rows - len(rows))
        return collate(rows, multiple=row_multiple(ranks))

    count = -(-len(shared) // (ranks.data * group)) * group
    found = [made(batch) for batch in mine]
    while len(found) < count:
        found.append(blank_like(found[0] if found else made(shared[0])))
    return found


def _whole_rows(model: ModelChunks, outcome: Outcome) -> Tensor:
    """The hidden states ``[B, S, H]`` of whole rows, on the CPU."""
    states, groups = outcome.hidden_states, model.groups
    if model.config.sequence_parallel:
        states = gather_from_sequence_parallel_region(states, group=groups.tp)
    if groups.cp.size() > 1:
        states = gather_from_sequence_parallel_region(states, group=groups.cp)
        states = undo_zigzag(states, dim=0, ranks=groups.cp.size())
    return states.transpose(0, 1).cpu()


@contextlib.contextmanager
def _progress(what: str, *, total: int) -> Iterator[Callable[[int], None]]:
    """On the first rank."""
    if dist.get_rank():
        yield lambda size: None
        return
    with byte_progress(what, total=total) as advance:
        yield advance
