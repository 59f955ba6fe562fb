"""Mixture-of-Depths on Hugging Face's own models, in plain torch; nothing of ours in it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.helpers.training_formula import feed_forward


class Found(NamedTuple):
    """Of a batch: nats a label; each layer's share of kept tokens, of tokens on which both rules
    agree, and mean binary cross entropy a token; how far from each other the scores are that
    decide; and each document's logits."""

    task_loss: Tensor
    capacity: list[float]
    agreement: list[float]
    causal_loss: list[Tensor]
    margin: float
    logits: list[Tensor]


def forward(
    model,
    ids: Sequence[int],
    added: Mapping[int, Mapping[str, Tensor]],
    *,
    granularity: str,
    capacity: Mapping[int, float],
    causal: bool = False,
    border: float = 0.0,
) -> tuple[Tensor, dict[int, tuple[Tensor, Tensor, Tensor]], float]:
    """One document through a model (``eager`` attention): logits ``[T, vocab]``; of each routed
    layer what was kept ``[T]`` bool, what the causal rule keeps, and causal logits; the margin."""
    ids = torch.tensor([list(ids)])
    hidden = model.model.embed_tokens(ids)
    length, decisions, margin = ids.shape[1], {}, math.inf
    cos, sin = model.model.rotary_emb(hidden, torch.arange(length)[None])
    for index, layer in enumerate(model.model.layers):
        normed = layer.input_layernorm(hidden)
        own = added.get(index)
        everyone = torch.arange(length)
        if own is None:
            attended = _attend(model, layer, index, normed, cos, sin, everyone)
            hidden = hidden + attended
            hidden = hidden + feed_forward(layer, layer.post_attention_layernorm(hidden))
            continue
        scores = F.linear(normed[0], own["router.weight"], own.get("router.bias"))[:, 0]
        guess = scores
        if "predictor.hidden.weight" in own:
            inner = F.linear(
                normed[0].detach(), own["predictor.hidden.weight"], own["predictor.hidden.bias"]
            )
            guess = F.linear(F.silu(inner), own["predictor.out.weight"], own["predictor.out.bias"])
            guess = guess[:, 0]
        k = math.floor(capacity[index] * length + 0.5)
        values = scores.tolist()
        ranked = sorted(range(length), key=lambda i, values=values: (-values[i], i))
        if 0 < k < length:
            margin = min(margin, values[ranked[k - 1]] - values[ranked[k]])
        margin = min(margin, float((guess.detach() - border).abs().min()))
        chosen = torch.zeros(length, dtype=torch.bool)
        chosen[ranked[:k]] = True
        allowed = guess >= border
        decisions[index] = chosen, allowed, guess
        kept = (allowed if causal else chosen).nonzero()[:, 0]
        if not len(kept):
            if granularity == "mlp_token":
                hidden = hidden + _attend(model, layer, index, normed, cos, sin, everyone)
            elif granularity == "attn_token":
                hidden = hidden + feed_forward(layer, layer.post_attention_layernorm(hidden))
            continue
        factor = scores[kept][None, :, None]
        if granularity == "mlp_token":
            hidden = hidden + _attend(model, layer, index, normed, cos, sin, everyone)
            update = feed_forward(layer, layer.post_attention_layernorm(hidden[:, kept]))
            hidden = hidden.index_add(1, kept, factor * update)
            continue
        update = _attend(model, layer, index, normed, cos, sin, kept)
        if granularity == "block_token":
            inner = hidden[:, kept] + update
            update = update + feed_forward(layer, layer.post_attention_layernorm(inner))
        hidden = hidden.index_add(1, kept, factor * update)
        if granularity == "attn_token":
            hidden = hidden + feed_forward(layer, layer.post_attention_layernorm(hidden))
    return model.lm_head(model.model.norm(hidden))[0], decisions, margin


def _attend(model, layer, index: int, normed: Tensor, cos: Tensor, sin: Tensor, kept: Tensor):
    """The attention of the kept tokens among each other, at their positions."""
    distance = kept[:, None] - kept
    visible = distance >= 0
    window = getattr(model.config, "sliding_window", None)
    kinds = getattr(model.config, "layer_types", None)
    if window and (not kinds or kinds[index] == "sliding_attention"):
        visible &= distance < window
    mask = torch.where(visible, 0.0, torch.finfo(normed.dtype).min)[None, None].to(normed.dtype)
    return layer.self_attn(
        normed[:, kept], position_embeddings=(cos[:, kept], sin[:, kept]), attention_mask=mask
    )[0]


def batch_loss(
    model, samples: Sequence, added: Mapping[int, Mapping[str, Tensor]], **rules
) -> Found:
    """Of samples with ``ids`` and ``labels``, each a document."""
    total, labels, tokens = torch.zeros(()), 0, 0
    sums = {layer: [0, 0, torch.zeros(())] for layer in added}
    margin, all_logits = math.inf, []
    for sample in samples:
        logits, decisions, apart = forward(model, sample.ids, added, **rules)
        margin = min(margin, apart)
        all_logits.append(logits.detach())
        labelled = torch.tensor(sample.labelled[1:])
        wanted = torch.tensor(sample.ids[1:])[labelled]
        total = total + F.cross_entropy(logits[:-1][labelled].float(), wanted, reduction="sum")
        labels, tokens = labels + len(wanted), tokens + len(sample.ids)
        for layer, (chosen, allowed, guess) in decisions.items():
            sums[layer][0] += int((allowed if rules.get("causal") else chosen).sum())
            sums[layer][1] += int((chosen == allowed).sum())
            sums[layer][2] = sums[layer][2] + F.binary_cross_entropy_with_logits(
                guess, chosen.to(guess.dtype), reduction="sum"
            )
    kept, agreed, losses = zip(*sums.values(), strict=True)
    return Found(
        total / labels,
        [count / tokens for count in kept],
        [count / tokens for count in agreed],
        [loss / tokens for loss in losses],
        margin,
        all_logits,
    )
