"""What backward keeps of a micro-batch, layer by layer, and what a layer works with.

Derived from the modules that a training builds (``model/layer.py``, ``local``): every tensor that
autograd saves, but for numbers of single tokens. A product with a frozen weight keeps no input, one
with a weight that trains does. Transformer Engine's norms keep theirs in the model's dtype, so that
with it this is the most there can be.
"""

from __future__ import annotations

from megatron_mod.config.lora import TARGETS
from megatron_mod.estimate.communication import of_pairs
from megatron_mod.estimate.placed import Placed
from megatron_mod.model.head import CHUNK
from megatron_mod.model.reach import BELOW, FC1, FC2, PLACES, PROJ, QKV


def kept(placed: Placed, layer: int) -> int:
    """Bytes of one layer: nothing below the first that trains, where no gradient goes."""
    return _kept(placed, layer, placed.job.config.train.recompute)


def _kept(placed: Placed, layer: int, recompute: str) -> int:
    job, down_to = placed.job, placed.job.reach.down_to(layer)
    if down_to is None:
        return 0
    adapters = _adapters(placed, layer, recompute)
    if job.reach.routes(layer):
        return _routed(placed, layer, recompute, down_to=down_to) + adapters
    states = placed.split_tokens * job.arch.hidden_size * placed.element
    if recompute == "full":
        return states
    norm, found = _norm(placed, placed.split_tokens), adapters
    found += norm * (down_to == BELOW) + _attention(placed, layer) * (down_to <= QKV)
    found += norm * (down_to < FC1)
    if down_to < FC2:
        found += states if recompute == "selective" else _mlp(placed)
    if job.reach.trains_base:  # what norms multiply, and what linears read, but for attention's
        found += 3 * states
        found += 0 if recompute == "selective" else states + _product(placed)
    return found


def _routed(placed: Placed, layer: int, recompute: str, *, down_to: int) -> int:
    """Of a routed layer, which has whole rows."""
    job, e, tokens = placed.job, placed.element, placed.tokens
    states, goes_on = tokens * job.arch.hidden_size * e, down_to == BELOW
    norm = _norm(placed, tokens)
    is_wide = e == 4  # then a norm's or router's copy in fp32 is the tensor itself
    targets = job.routing.scheme.targets
    router = norm * (1 if is_wide else len(targets))  # each one's input in fp32, and a logit
    whole = job.reach.trains_base
    if recompute == "full":
        stream = 0 if is_wide and goes_on else states
        return router + norm * goes_on + stream + (0 if is_wide else states) + states * whole
    # What each mask multiplies.
    found = router + len(targets) * states + _stand_ins(placed, is_wide=is_wide)
    found += norm * goes_on + _attention(placed, layer) * (down_to <= QKV)
    if down_to < FC1 and "mlp" in targets and job.routing.stand_in_rank:  # the stand-in's own
        found += norm * (not is_wide) + states * whole
    if job.reach.computes_mlp_again(layer) and recompute == "selective":
        found += states
    else:
        found += norm * (down_to < FC1) + _mlp(placed) * (down_to < FC2)
        found += (2 * states + _product(placed)) * whole
    if whole:  # the input norm's product, and what queries read, if nothing else keeps it
        is_kept = is_wide or (job.routing.stand_in_rank and set(targets) != {"mlp"})
        found += states if is_kept else 2 * states
    return found


def _adapters(placed: Placed, layer: int, recompute: str) -> int:
    """What adapters that train read, what they make of it within, and their matrices as they are
    multiplied with."""
    job, e, lora = placed.job, placed.element, placed.job.lora
    if lora is None or not job.reach.adapts(layer) or recompute == "full":
        return 0
    is_routed, found = layer in job.routing.layers, 0
    split = placed.tokens if is_routed else placed.split_tokens
    for linear, place in PLACES.items():
        targets = [target for target in TARGETS if TARGETS[target] == linear]
        ranks = lora.rank * sum(target in lora.targets for target in targets)
        if not ranks or (recompute == "selective" and place >= FC1):
            continue
        inputs = job.arch.projections[targets[0]][0]
        outputs = sum(job.arch.projections[target][1] for target in targets)
        if place in (QKV, FC1):
            read, within, outputs = split, placed.tokens, outputs // _tensor(placed)
            if place == QKV and e == 4 and job.reach.routes(layer):
                read = 0  # the router's own input
        else:
            read, within, inputs = placed.tokens, split, inputs // _tensor(placed)
            if place == PROJ:
                read = 0  # attention's own output
        found += e * (read * inputs + within * ranks + ranks * (inputs + outputs))
    return found


def _stand_ins(placed: Placed, *, is_wide: bool) -> int:
    """Their inputs, if they train; else their weights alone are needed."""
    routing, found = placed.job.routing, 0
    if "stand_ins" not in placed.job.config.train.parts:
        return 0
    for target in routing.scheme.targets:
        shared = is_wide and target != "mlp"
        found += (routing.stand_in_rank or 0) + (0 if shared else placed.job.arch.hidden_size)
    return placed.tokens * found * placed.element


def _norm(placed: Placed, tokens: int) -> int:
    """An RMSNorm's input and root, in fp32."""
    return 4 * tokens * (placed.job.arch.hidden_size + 1)


def _mlp(placed: Placed) -> int:
    """Gate and up (one tensor), the activated gate, and up once more (``+ glu_linear_offset``); of
    experts also what their weights multiply, and of the mixture's gate two softmaxes and the
    choice, twice."""
    mixture = placed.job.arch.mixture
    if mixture is None:
        return 4 * _product(placed)
    return 5 * _product(placed) + 10 * placed.tokens * mixture.num_experts


def _product(placed: Placed) -> int:
    """What the MLP's second linear reads; of experts all of a rank's together, if every expert is
    sent as many tokens."""
    mixture = placed.job.arch.mixture
    tokens = placed.tokens * (mixture.top_k if mixture else 1)
    return tokens * placed.job.arch.ffn_hidden_size * placed.element // _tensor(placed)


def _attention(placed: Placed, layer: int) -> int:
    """Query and output, key, and the whole projection, whose values are read in place; of several
    context-parallel ranks the keys and values of all; a logarithm a head; and a mask, if any.
    Beside them four rotary tables of a row."""
    arch, e, tokens = placed.job.arch, placed.element, placed.tokens
    context = placed.job.topology.context
    queries, keys = arch.query_channels, arch.key_channels
    width = 3 * queries + 3 * keys if context == 1 else 2 * queries + 2 * keys * context
    found = tokens * (width * e + 4 * arch.num_attention_heads)
    if arch.qk_norm or arch.qk_norm_across_heads:  # in fp32 keys are read in place
        found += 4 * tokens * (queries + (keys if e < 4 else 0))
        roots = arch.num_attention_heads + arch.num_query_groups if arch.qk_norm else 2
        found += 4 * tokens * roots
        found += tokens * e * (queries + keys) * placed.job.reach.trains_base
    mask = tokens * placed.length * e if _is_masked(placed, layer) else 0
    tables = 4 * placed.length // context * arch.kv_channels * e
    return found // _tensor(placed) + mask + tables


def _is_masked(placed: Placed, layer: int) -> bool:
    """Whether torch's attention is given a mask, which it keeps as numbers."""
    job, window = placed.job, placed.job.arch.window_size
    selects = layer in job.routing.layers and job.routing.keys_values == "selected"
    reaches_beyond = window is not None and window < placed.length
    return job.topology.context > 1 or reaches_beyond or selects


def _tensor(placed: Placed) -> int:
    return placed.job.topology.tensor


def of_stage(placed: Placed, stage: int) -> int:
    """Bytes that a micro-batch keeps in one stage: its layers', what comes in and what goes out."""
    job, last = placed.job, len(placed.stages) - 1
    states = placed.split_tokens * job.arch.hidden_size * placed.element
    found = sum(kept(placed, layer) for layer in placed.stages[stage])
    found += states * (stage > 0 or job.computed.start > 0) + states * (stage < last)
    if stage == last:  # labelled states, and the head's gradient to them
        labelled = 2 * placed.tokens * job.arch.hidden_size * placed.element
        found += _norm(placed, placed.split_tokens) + labelled
        found += states * job.reach.trains_base  # what the norm multiplies
    return found


def working(placed: Placed, rank: int) -> int:
    """Bytes that come and go within a layer, beside what is kept.

    Of an MLP forward: gate and up, the two that become their product, and it. Backward, when all is
    kept: the gradients of these three, and what is computed again. Of experts,
    which follow one another, these are one's, and what all are sent and give back, in both orders.
    """
    layers = placed.layers_of(rank)
    if not layers:
        return 0
    product = _product(placed)
    all_kept = sum(kept(placed, layer) for layer in layers)
    again = max(_kept(placed, layer, "none") - kept(placed, layer) for layer in layers)
    sent, arch = 0, placed.job.arch
    if arch.mixture:
        sent = 5 * of_pairs(placed)
        product //= arch.num_experts // placed.job.topology.expert
    return sent + max(5 * product - all_kept, 3 * product + again if all_kept else 0)


def head(placed: Placed, rank: int) -> int:
    """Bytes of the logits that exist at a time, on the last stage.

    Logits in the model's dtype, and in fp32, overwritten until they are the gradient; of a
    distillation those of two models, their logarithms, and what becomes of these. Beside them the
    gradient to a head's weight that trains, in fp32, and a chunk's to be added to it.
    """
    if not placed.has_head(rank):
        return 0
    width = 4 if placed.element == 4 else placed.element + 4
    tokens = min(CHUNK, placed.tokens)
    found = tokens * _vocabulary(placed) * (30 if placed.job.dense_passes else width)
    of_weight = _vocabulary(placed) * placed.job.arch.hidden_size * (4 + placed.element)
    return found + of_weight * placed.job.reach.trains_base


def _vocabulary(placed: Placed) -> int:
    return -(-placed.job.arch.vocab_size // _tensor(placed))
