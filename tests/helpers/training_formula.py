"""Every routing scheme in plain torch on Hugging Face's own models, nothing of ours in it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from tests.helpers import experts


@dataclass
class Scheme:
    """What is routed and how (the fields of a routing configuration, spelled out again).

    ``priced``: what a unit costs is a price, which what is not computed does not hear of.
    ``fixed``: routers do not train, and their decisions are constants.
    ``loss``: ``task``, ``distill`` or ``both``.
    """

    granularity: str
    layers: Sequence[int]
    pooling: str | None = None
    keys_values: str | None = None
    training_compute: str = "dense"
    threshold: float = 0.5
    priced: bool = False
    fixed: bool = False
    renormalize: bool = False
    loss: str = "task"

    @property
    def targets(self) -> list[str]:
        return [part.split("_")[0] for part in self.granularity.split("+")]

    @property
    def places(self) -> list[tuple[int, str]]:
        """Of the routers."""
        return [(layer, target) for layer in self.layers for target in self.targets]

    def own(self, added: dict[str, Tensor], target: str) -> dict[str, Tensor]:
        """What of a layer's belongs to a target, named as if there were no other."""
        if len(self.targets) == 1:
            return added
        parted = f".{target}."
        return {name.replace(parted, "."): t for name, t in added.items() if parted in name}


def straight_through(logit: Tensor, threshold: float) -> Tensor:
    """``m = 1 if logit >= log(t / (1 - t)) else 0``; backward ``dL/dp = dL/dm``."""
    probability = torch.sigmoid(logit)
    keep = (logit >= math.log(threshold / (1 - threshold))).float()
    return probability + (keep - probability).detach()


def attention(module, normed: Tensor, rotary: tuple, seen: Tensor) -> Tensor:
    """Softmax attention of one document ``[T, H]``; ``seen`` bool ``[T, T]``: key by query."""
    length, dim = normed.shape[0], module.head_dim
    q, k, v = (p(normed) for p in (module.q_proj, module.k_proj, module.v_proj))
    norms = hasattr(module, "q_norm") and (module.q_norm, module.k_norm)
    across_heads = norms and len(norms[0].weight) == q.shape[-1] != dim  # OLMoE
    if across_heads:
        q, k = norms[0](q), norms[1](k)
    q, k, v = (t.view(1, length, -1, dim) for t in (q, k, v))
    if norms and not across_heads:
        q, k = norms[0](q), norms[1](k)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    q, k = apply_rotary_pos_emb(q, k, *rotary)
    k, v = (t.repeat_interleave(module.num_key_value_groups, dim=1) for t in (k, v))
    scores = (q @ k.transpose(-1, -2)) / math.sqrt(dim)
    weights = scores.masked_fill(~seen, -math.inf).softmax(-1)
    return module.o_proj((weights @ v).transpose(1, 2).reshape(length, -1))


Added: TypeAlias = dict[int, dict[str, Tensor]]
"""What routed layers have beside dense ones, by layer and name; any but the router's weight may be
missing."""


def stand_in(own: dict[str, Tensor], read: Tensor) -> Tensor:
    """``B A x + b`` of each token of ``[T, H]``, zeros without one."""
    if "stand_in.up.weight" not in own:
        return torch.zeros_like(read)
    inner = read @ own["stand_in.down.weight"].t()
    return inner @ own["stand_in.up.weight"].t() + own["stand_in.up.bias"]


def feed_forward(layer, read: Tensor, *mask: Tensor, **how: object) -> Tensor:
    """The update ``[..., H]`` of a layer's MLP, or of its mixture (see ``experts.mixture``)."""
    block = experts.block_of(layer)
    if not hasattr(block, "gate"):
        return block(read)
    return experts.mixture(block, read.flatten(0, -2), *mask, **how).view_as(read)


def forward(
    model, ids: Sequence[int], prompt: int, added: Added, scheme: Scheme
) -> tuple[Tensor, dict[tuple[int, str], Tensor], float]:
    """One document: logits ``[T, vocab]``, each router's mask (a scalar or ``[T]``; of experts one
    number for each pair that the gate makes) by place, and the smallest distance of a logit from
    the border."""
    ids = torch.tensor([list(ids)])
    x = model.model.embed_tokens(ids)
    rotary = model.model.rotary_emb(x, torch.arange(ids.shape[1])[None])
    x, made, margin = x[0], {}, math.inf
    causal = torch.ones(len(x), len(x)).tril().bool()
    by_expert = scheme.granularity == "expert_token"
    if window := getattr(model.config, "sliding_window", None):
        causal = causal.triu(1 - window)
    border = math.log(scheme.threshold / (1 - scheme.threshold))
    for index, layer in enumerate(model.model.layers):
        normed = layer.input_layernorm(x)
        masks, owns, seen = {}, {}, causal
        noops = added.get(index, {}).get("noop_gate.weight")
        for target in scheme.targets if index in scheme.layers and noops is None else ():
            own = owns[target] = scheme.own(added[index], target)
            logit = (normed.double() @ own["router.weight"].double().t()).float()
            logit = logit + own.get("router.bias", torch.zeros(1))
            if by_expert:  # of pairs that the gate makes
                continue
            logit = logit.squeeze(-1)
            if scheme.granularity.endswith("sequence"):
                pooled = logit[:prompt] if scheme.pooling == "prompt" else logit
                logit = pooled.mean()
            margin = min(margin, float((logit.detach() - border).abs().min()))
            m = made[index, target] = straight_through(logit, scheme.threshold)
            if scheme.training_compute == "sparse":  # what is skipped has no task gradient
                m = m * m.detach()
                if scheme.priced:
                    made[index, target] = m
            if scheme.fixed:
                m = m.detach()
            m = m.expand(len(x))
            if scheme.keys_values == "selected" and target != "mlp":
                seen = causal & ((m.detach() > 0)[None, :] | torch.eye(len(x)).bool())
            masks[target] = m[:, None]

        def choose(target: str, update: Tensor, read: Tensor, masks=masks, owns=owns) -> Tensor:
            if target not in masks:
                return update
            m = masks[target]
            return m * update + (1 - m) * stand_in(owns[target], read)

        update = attention(layer.self_attn, normed, rotary, seen)
        if "block" in masks:
            update = update + feed_forward(layer, layer.post_attention_layernorm(x + update))
            x = x + choose("block", update, normed)
            continue
        x = x + choose("attn", update, normed)
        read = layer.post_attention_layernorm(x)
        if noops is not None:
            assigned = experts.gate(experts.block_of(layer), read, noops)[1]
            kept = torch.arange(assigned.shape[1]) < assigned.shape[1] - len(noops)
            made[index, "expert"] = kept.expand_as(assigned)[assigned].float()
            x = x + feed_forward(layer, read, noops=noops)
            continue
        if by_expert and index in scheme.layers:
            assigned = experts.gate(experts.block_of(layer), read)[1]
            margin = min(margin, float((logit.detach() - border)[assigned].abs().min()))
            m = straight_through(logit, scheme.threshold) * assigned
            own_mask, m = m, m * m.detach() if scheme.training_compute == "sparse" else m
            made[index, "expert"] = (m if scheme.priced else own_mask)[assigned]
            m = m.detach() if scheme.fixed else m
            x = x + feed_forward(layer, read, m, renormalize=scheme.renormalize)
            continue
        x = x + choose("mlp", feed_forward(layer, read), read)
    return model.lm_head(model.model.norm(x)), made, margin


class BatchLoss(NamedTuple):
    """Per label of a whole batch: what is minimised and the cross entropy; each router's capacity
    by place (all with their graphs), the number of units of each, the smallest margin, and each
    sample's logits ``[T, vocab]``."""

    loss: Tensor
    task_loss: Tensor
    capacity: dict[tuple[int, str], Tensor]
    num_units: int
    margin: float
    logits: list[Tensor]


class LowRank(torch.nn.Module):
    """``W x + c + s B A x`` around a linear of Hugging Face's, ``A`` ``[r, in]``, ``B``
    ``[out, r]``."""

    def __init__(self, linear: torch.nn.Linear, a: Tensor, b: Tensor, scale: float) -> None:
        super().__init__()
        self.linear, self.a, self.b, self.scale = linear, a, b, scale

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.scale * (x @ self.a.t() @ self.b.t())


def adapt(model, adapters: dict[int, dict[str, Tensor]], scale: float) -> None:
    """Put adapters, ``q_proj.a`` and so on by layer, around the linears of a model."""
    for index, own in adapters.items():
        layer = model.model.layers[index]
        for target in {name.partition(".")[0] for name in own}:
            owner = layer.self_attn if hasattr(layer.self_attn, target) else layer.mlp
            around = LowRank(getattr(owner, target), own[f"{target}.a"], own[f"{target}.b"], scale)
            setattr(owner, target, around)


def batch_loss(
    model, samples: Sequence, added: Added, scheme: Scheme, *, teacher=None
) -> BatchLoss:
    """``teacher``: the dense model, if it is not ``model``."""
    teacher = model if teacher is None else teacher
    nll, divergence, count, margin = 0.0, 0.0, 0, math.inf
    masks, all_logits = {place: [] for place in scheme.places}, []
    for sample in samples:
        logits, made, closest = forward(model, sample.ids, sample.prompt_length, added, scheme)
        all_logits.append(logits)
        targets = [i for i, label in enumerate(sample.labelled) if label and i]
        expected = torch.tensor([sample.ids[i] for i in targets])
        before = [i - 1 for i in targets]
        picked = logits[before]
        dense = teacher(torch.tensor([list(sample.ids)])).logits[0][before].log_softmax(-1)
        ratio = dense - picked.log_softmax(-1)
        divergence = divergence + (dense.exp() * ratio).sum()
        nll = nll + torch.nn.functional.cross_entropy(picked, expected, reduction="sum")
        count += len(targets)
        margin = min(margin, closest)
        for place, mask in made.items():
            masks[place].append(mask.reshape(-1))
    made = {place: torch.cat(m) for place, m in masks.items()}
    losses = {"task": nll, "distill": divergence, "both": nll + divergence}
    return BatchLoss(
        losses[scheme.loss] / count,
        nll / count,
        {place: m.mean() for place, m in made.items()},
        len(next(iter(made.values()), ())),
        margin,
        all_logits,
    )
