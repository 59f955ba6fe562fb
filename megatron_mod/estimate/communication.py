"""Bytes that a rank sends, by what they are for.

Of ``n`` ranks in a ring, each sends ``(n - 1) / n`` of what is gathered or scattered, and twice
that of what is added up everywhere (Patarasuk and Yuan 2009).
"""

from __future__ import annotations

from collections import Counter

from megatron_mod.config.lora import TARGETS
from megatron_mod.estimate import parameters
from megatron_mod.estimate.placed import Placed
from megatron_mod.model.reach import BELOW, END, FC1, FC2, PLACES, PROJ, QKV

ALL_REDUCE, ALL_GATHER, REDUCE_SCATTER = (
    "tensor all-reduce", "tensor all-gather", "tensor reduce-scatter",
)  # fmt: skip
POINT_TO_POINT, RING, ROUTERS = (
    "pipeline point-to-point", "context ring", "data all-reduce of router gradients",
)  # fmt: skip
EXPERTS = "expert all-to-all"
KINDS = (ALL_REDUCE, ALL_GATHER, REDUCE_SCATTER, POINT_TO_POINT, RING, ROUTERS, EXPERTS)


def of_step(placed: Placed, rank: int) -> dict[str, int]:
    """Of a step, a rank of the pipeline."""
    found: Counter[str] = Counter(dict.fromkeys(KINDS, 0))
    for stage in placed.stages_of(rank):
        for kind, size in of_stage(placed, stage).items():
            found[kind] += size * placed.cut.micro_batches
    found[ALL_REDUCE] += _of_shared(placed, rank)
    found[POINT_TO_POINT] += _of_tied(placed, rank)
    found[ROUTERS] = of_gradients(placed, rank)
    return dict(found)


def of_gradients(placed: Placed, rank: int) -> int:
    """Of what trains there, in fp32, once a step."""
    ranks = placed.job.topology.data * placed.job.topology.context
    return 8 * parameters.of_rank(placed, rank).trained * (ranks - 1) // ranks


def _of_shared(placed: Placed, rank: int) -> int:
    """Of gradients that tensor-parallel ranks have of their share of the tokens, in fp32, once a
    step: of what each has whole of adapters, and of norms that train, where the layer's rows are
    shared."""
    job, tensor = placed.job, placed.job.topology.tensor
    if not job.topology.sequence_parallel:
        return 0
    norms = 0
    if job.reach.trains_base:
        dense = sum(layer not in job.routing.layers for layer in placed.layers_of(rank))
        norms = job.arch.hidden_size * (2 * dense + placed.has_head(rank))
    layers = [layer for layer in placed.layers_of(rank) if job.reach.adapts(layer)]
    dense = sum(layer not in job.routing.layers for layer in layers)
    # Of so many numbers on one rank and on one of several, what each has whole are the rest.
    alone, own = (parameters.of_adapters(placed, tensor=ranks) for ranks in (1, tensor))
    whole = (tensor * own - alone) // (tensor - 1)
    return 8 * (dense * whole + norms) * (tensor - 1) // tensor


def _of_tied(placed: Placed, rank: int) -> int:
    """Of the gradient of an embedding that trains, which the first and the last stage each have
    their part of, in fp32, once a step."""
    job, ranks = placed.job, placed.job.topology.pipeline
    is_tied = job.reach.trains_base and job.arch.tied_embeddings and ranks > 1
    if not is_tied or not (placed.has_embedding(rank) or placed.has_head(rank)):
        return 0
    return 4 * job.arch.vocab_size * job.arch.hidden_size // job.topology.tensor


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
        times[ALL_GATHER] += sharded and job.reach.trains_base  # its gradient
    if stage == last:  # what the head reads, and its gradient
        if sharded:
            times[ALL_GATHER] += passes
        times[REDUCE_SCATTER if sharded else ALL_REDUCE] += 1
    states = placed.tokens * job.arch.hidden_size * placed.element
    tensor = job.topology.tensor
    whole = Counter({kind: count * states for kind, count in times.items()})
    for layer in placed.stages[stage]:
        whole.update(_of_adapters(placed, layer))
    found = Counter({kind: size * (tensor - 1) // tensor for kind, size in whole.items()})
    found[ALL_REDUCE] *= 2
    split = placed.split_tokens * job.arch.hidden_size * placed.element
    found[POINT_TO_POINT] = split * (passes * (stage < last) + (stage > 0))
    found[RING] = sum(_ring(placed, layer) for layer in placed.stages[stage])
    found[EXPERTS] = sum(_to_experts(placed, layer) for layer in placed.stages[stage])
    return found


def _of_layer(placed: Placed, layer: int) -> Counter[str]:
    """How often the hidden states are added up, gathered or scattered by tensor-parallel ranks.

    Both parts of a layer are entered (sequence parallelism gathers, backward adds up) and left
    (adds up, backward with sequence parallelism gathers); what computes again does not leave the
    MLP again unless adapters follow on it, but Megatron's own checkpoint of one does.
    """
    job = placed.job
    first, recompute = job.reach.first, job.config.train.recompute
    is_routed, passes = layer in job.routing.layers, 1 + job.dense_passes
    entered = left = 2 * passes
    if recompute == "full" and layer >= first:
        entered, left = entered + 2, left + 1
    elif recompute == "selective" and job.reach.down_to(layer) == BELOW and not is_routed:
        entered, left = entered + 1, left + 1
    ends_in_adapters = job.lora is not None and "down_proj" in job.lora.targets
    if ends_in_adapters and job.reach.adapts(layer):
        left += recompute == "full" or (is_routed and job.reach.computes_mlp_again(layer))
    down_to = job.reach.down_to(layer)
    lowest = END if down_to is None else down_to
    back = (lowest < FC1) + (lowest < QKV)  # of gradients to what is entered
    if not job.topology.sequence_parallel:
        return Counter({ALL_REDUCE: left + back})
    if is_routed:  # gathers its rows, and works as if they were whole
        return Counter({ALL_REDUCE: left + back, ALL_GATHER: passes + 1})
    gathered = (lowest < FC2) + (lowest < PROJ)  # of those of what is left
    gathered += 2 * job.reach.trains_base  # and once more of what is entered, for weights'
    return Counter({ALL_GATHER: entered + gathered, REDUCE_SCATTER: left + back})


def _of_adapters(placed: Placed, layer: int) -> Counter[str]:
    """Bytes of the inner products of a layer's adapters that are added up, gathered or scattered by
    tensor-parallel ranks, each as if one rank sent all of them."""
    job, found = placed.job, Counter[str]()
    if job.lora is None or layer not in job.lora.layers:
        return found
    recompute, down_to = job.config.train.recompute, job.reach.down_to(layer)
    sharded = job.topology.sequence_parallel and layer not in job.routing.layers
    for target in job.lora.targets:
        place = PLACES[TARGETS[target]]
        again = down_to is not None and (
            recompute == "full" or (job.reach.computes_mlp_again(layer) and place >= FC1)
        )
        forward = 1 + again
        back = down_to is not None and (job.reach.adapts(layer) or place > down_to)
        size = placed.tokens * job.lora.rank * placed.element
        is_column = place in (QKV, FC1)
        if sharded:
            found[ALL_GATHER] += size * (forward if is_column else back)
            found[REDUCE_SCATTER] += size * (back if is_column else forward)
        else:
            found[ALL_REDUCE] += size * (back if is_column else forward)
    return found


def _to_experts(placed: Placed, layer: int) -> int:
    """Tokens sent to the experts of other ranks and back, and their gradients, if every expert gets
    as many."""
    job, ranks = placed.job, placed.job.topology.expert
    if job.arch.mixture is None or ranks == 1:
        return 0
    down_to, recompute = job.reach.down_to(layer), job.config.train.recompute
    times = 1 + job.dense_passes + (down_to is not None and down_to < FC1)
    again = recompute == "full" and down_to is not None
    times += again or job.reach.computes_mlp_again(layer)
    return 2 * times * of_pairs(placed) * (ranks - 1) // ranks


def of_pairs(placed: Placed) -> int:
    """Bytes of what the experts of a rank are sent of a micro-batch, or give back, if every expert
    gets as much."""
    mixture = placed.job.arch.mixture
    assert mixture is not None
    return placed.tokens * mixture.top_k * placed.job.arch.hidden_size * placed.element


def _ring(placed: Placed, layer: int) -> int:
    """Keys and values that go round the context-parallel ranks, and their gradients back."""
    job = placed.job
    context, down_to = job.topology.context, job.reach.down_to(layer)
    times = 1 + job.dense_passes + (down_to is not None and down_to <= QKV)
    times += job.config.train.recompute == "full" and down_to is not None
    own = 2 * placed.tokens * job.arch.key_channels * placed.element // job.topology.tensor
    return times * own * (context - 1)
