"""The formula in plain torch on Hugging Face's own Llama, nothing of ours in it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def straight_through(logit: Tensor, threshold: float = 0.5) -> Tensor:
    """``m = 1 if logit >= log(t / (1 - t)) else 0``; backward ``dL/dp = dL/dm``."""
    probability = torch.sigmoid(logit)
    keep = (logit >= math.log(threshold / (1 - threshold))).float()
    return probability + (keep - probability).detach()


def sequence_logit(weight: Tensor, normed: Tensor, pooled: slice) -> Tensor:
    """Router ``[1, H]`` on the mean of normed hidden states ``[T, H]``, a scalar."""
    return (normed[pooled].double() @ weight.double().squeeze(0)).mean().float()


def forward(
    model,
    ids: Sequence[int],
    routers: dict[int, Tensor],
    *,
    pooled: slice = slice(None),
    masks: dict[int, Tensor] | None = None,
) -> tuple[Tensor, dict[int, Tensor], dict[int, Tensor]]:
    """One sequence through a Hugging Face Llama whose routed layers add ``m * attention``.

    Returns logits ``[T, vocab]``, the mask of each routed layer and the router's logit.
    ``masks`` holds decisions fixed instead of making them.
    """
    ids = torch.tensor([list(ids)])
    hidden = model.model.embed_tokens(ids)
    positions = torch.arange(ids.shape[1])[None]
    rotary = model.model.rotary_emb(hidden, positions)
    made, logits = {}, {}
    for index, layer in enumerate(model.model.layers):
        normed = layer.input_layernorm(hidden)
        update = layer.self_attn(normed, position_embeddings=rotary, attention_mask=None)[0]
        if index in routers:
            logits[index] = sequence_logit(routers[index], normed[0], pooled)
            made[index] = masks[index] if masks else straight_through(logits[index])
            update = made[index] * update
        hidden = hidden + update
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return model.lm_head(model.model.norm(hidden))[0], made, logits


def training_loss(
    model, samples: Sequence, routers: dict[int, Tensor], *, weight: float, target: float,
    pooling: str, penalised: bool = True,
) -> tuple[Tensor, dict[int, float], float]:  # fmt: skip
    """Loss of a whole batch: cross entropy per label plus ``weight * (mean(m) - target)`` a layer.

    Returns the loss (with its graph), each layer's capacity and the smallest distance of a
    logit from the border.
    """
    nll, count, kept, margin = 0.0, 0, {layer: [] for layer in routers}, math.inf
    for sample in samples:
        pooled = slice(0, sample.prompt_length) if pooling == "prompt" else slice(None)
        logits, masks, router_logits = forward(model, sample.ids, routers, pooled=pooled)
        targets = [i for i, label in enumerate(sample.labelled) if label and i]
        expected = torch.tensor([sample.ids[i] for i in targets])
        picked = logits[[i - 1 for i in targets]]
        nll = nll + torch.nn.functional.cross_entropy(picked, expected, reduction="sum")
        count += len(targets)
        for layer, mask in masks.items():
            kept[layer].append(mask)
            margin = min(margin, abs(float(router_logits[layer].detach())))
    capacity = {layer: torch.stack(masks).mean() for layer, masks in kept.items()}
    loss = nll / count
    if penalised:
        loss = loss + weight * sum(value - target for value in capacity.values())
    return loss, {layer: float(value.detach()) for layer, value in capacity.items()}, margin
