"""Bytes that a rank sends, by what they are for.

Of ``n`` ranks in a ring, each sends ``(n - 1) / n`` of what is gathered or scattered, and twice
that of what is added up everywhere (Patarasuk and Yuan 2009).
"""

from __future__ import annotations

from collections import Counter

from megatron_mod.estimate import parameters
from megatron_mod.estimate.placed import Placed

ALL_REDUCE, ALL_GATHER, REDUCE_SCATTER = (
    "tensor all-reduce", "tensor all-gather", "tensor reduce-scatter",
)  # fmt: skip
POINT_TO_POINT, RING, ROUTERS = (
    "pipeline point-to-point", "context ring", "data all-reduce of router gradients",
)  # fmt: skip
KINDS = (ALL_REDUCE, ALL_GATHER, REDUCE_SCATTER, POINT_TO_POINT, RING, ROUTERS)


def of_step(placed: Placed, rank: int) -> dict[str, int]:
    """Of a step, a rank of the pipeline."""
    found: Counter[str] = Counter(dict.fromkeys(KINDS, 0))
    for stage in placed.stages_of(rank):
        for kind, size in of_stage(placed, stage).items():
            found[kind] += size * placed.cut.micro_batches
    found[ROUTERS] = of_gradients(placed, rank)
    return dict(found)


def of_gradients(placed: Placed, rank: int) -> int:
    """Of what trains there, in fp32, once a step."""
    ranks = placed.job.topology.data * placed.job.topology.context
    return 8 * parameters.of_rank(placed, rank).trained * (ranks - 1) // ranks


def of_stage(placed: Placed, stage: int) -> Counter[str]:
    """Of a micro-batch in one stage, forward and backward."""
    job, last = placed.job, len(placed.stages) - 1
    times: Counter[str] = Counter()
    for layer in placed.stages[stage]:
        times.update(_of_layer(placed, layer))
    passes = 1 + job.dense_passes
    sharded = job.topology.sequence_parallel
    if stage == 0 and not job.computed.start:  # the embedding
        times[REDUCE_SCATTER if sharded else ALL_REDUCE] += passes
    if stage == last:  # what the head reads, and its gradient
        if sharded:
            times[ALL_GATHER] += passes
        times[REDUCE_SCATTER if sharded else ALL_REDUCE] += 1
    states = placed.tokens * job.arch.hidden_size * placed.element
    tensor = job.topology.tensor
    found = Counter(
        {kind: count * states * (tensor - 1) // tensor for kind, count in times.items()}
    )
    found[ALL_REDUCE] *= 2
    split = placed.split_tokens * job.arch.hidden_size * placed.element
    found[POINT_TO_POINT] = split * (passes * (stage < last) + (stage > 0))
    found[RING] = sum(_ring(placed, layer) for layer in placed.stages[stage])
    return found


def _of_layer(placed: Placed, layer: int) -> Counter[str]:
    """How often the hidden states are added up, gathered or scattered by tensor-parallel ranks.

    Both parts of a layer are entered (sequence parallelism gathers, backward adds up) and left
    (adds up, backward with sequence parallelism gathers); what computes again does not leave the
    MLP again, but Megatron's own checkpoint of one does.
    """
    job = placed.job
    first, recompute = job.routing.layers[0], job.config.train.recompute
    is_routed, passes = layer in job.routing.layers, 1 + job.dense_passes
    entered = left = 2 * passes
    if recompute == "full" and layer >= first:
        entered, left = entered + 2, left + 1
    elif recompute == "selective" and layer > first and not is_routed:
        entered, left = entered + 1, left + 1
    ends_in_mlp = layer == first and "attn" in job.routing.scheme.targets
    back = 2 if layer > first else int(ends_in_mlp)
    if not job.topology.sequence_parallel:
        return Counter({ALL_REDUCE: left + back})
    if is_routed:  # gathers its rows, and works as if they were whole
        return Counter({ALL_REDUCE: left + back, ALL_GATHER: passes + 1})
    return Counter({ALL_GATHER: entered + back, REDUCE_SCATTER: left + back})


def _ring(placed: Placed, layer: int) -> int:
    """Keys and values that go round the context-parallel ranks, and their gradients back."""
    job = placed.job
    first, context = job.routing.layers[0], job.topology.context
    times = 1 + job.dense_passes + (layer > first)
    times += job.config.train.recompute == "full" and layer >= first
    own = 2 * placed.tokens * job.arch.key_channels * placed.element // job.topology.tensor
    return times * own * (context - 1)
