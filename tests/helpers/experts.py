"""A mixture of experts in plain torch on Hugging Face's own blocks, of Transformers 4.57 and 5;
nothing of ours in it."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

# Each family, tiny: (model type, changes to ``tiny.save_model``'s settings).
FAMILIES = {
    "mixtral": (
        "mixtral",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2},
    ),
    "qwen3_moe": (
        "qwen3_moe",
        {
            "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 16,
            "head_dim": 16, "num_key_value_heads": 2, "norm_topk_prob": True,
        },
    ),
    "olmoe": (
        "olmoe",
        {"num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": False, "clip_qkv": None},
    ),
}  # fmt: skip


def block_of(layer):
    """The mixture of a decoder layer."""
    return layer.block_sparse_moe if hasattr(layer, "block_sparse_moe") else layer.mlp


def count(model) -> int:
    """Experts of each layer of a model."""
    return len(block_of(model.model.layers[0]).gate.weight)


def gate_logits(block, read: Tensor, noops: Tensor | None = None) -> Tensor:
    """Of tokens ``[T, H]``, ``[T, E]``, and after them those of no-ops, of weight ``[n, H]``."""
    rows = block.gate.weight if noops is None else torch.cat((block.gate.weight, noops))
    return read @ rows.t()


def gate(block, read: Tensor, noops: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The weight of each expert for tokens ``[T, H]``, zero where they are not sent to it, and
    whether they are: ``[T, E]`` both, or ``[T, E + n]`` with no-ops."""
    logits = gate_logits(block, read, noops)
    chosen = logits.topk(_of(block, "top_k"), dim=-1).indices
    assigned = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, chosen, True)
    weights = logits.softmax(-1) * assigned
    if _of(block, "norm_topk_prob", default=True):  # Mixtral's has no other way
        weights = weights / weights.sum(-1, keepdim=True)
    return weights, assigned


def expert(block, number: int, read: Tensor) -> Tensor:
    """``F_e`` of tokens ``[T, H]``."""
    if isinstance(block.experts, torch.nn.ModuleList):
        return block.experts[number](read)
    inner, up = (read @ block.experts.gate_up_proj[number].t()).chunk(2, -1)
    return (block.experts.act_fn(inner) * up) @ block.experts.down_proj[number].t()


def mixture(
    block,
    read: Tensor,
    mask: Tensor | None = None,
    *,
    renormalize: bool = False,
    noops: Tensor | None = None,
) -> Tensor:
    """``sum over e of g_e m_e F_e`` of tokens ``[T, H]``, ``m`` ``[T, E]`` ones without a mask.

    ``renormalize``: the weights that are left get back the sum of all, where any is left.
    ``noops``: weight of the gate's no-ops, of which nothing comes.
    """
    weights, _ = gate(block, read, noops)
    if mask is not None:
        whole, weights = weights.sum(-1, keepdim=True), weights * mask
        left = weights.sum(-1, keepdim=True)
        if renormalize:
            weights = weights * torch.where(left > 0, whole / left.where(left > 0, 1.0), 1.0)
    experts = range(len(block.gate.weight))
    return sum(weights[:, e, None] * expert(block, e, read) for e in experts)


def top_k(block) -> int:
    """Experts that a token is sent to."""
    return _of(block, "top_k")


def _of(block, name: str, *, default: object = None) -> object:
    """A setting, of the block or of its gate."""
    return getattr(block, name, getattr(block.gate, name, default))


@torch.no_grad()
def with_noops(model, ids: list[int], rows: dict[int, Tensor]) -> tuple[Tensor, dict[int, Tensor]]:
    """One sequence through a dense model whose gates of some layers have ``rows`` ``[n, H]`` more,
    for experts that return nothing.

    Returns logits ``[T, vocab]`` and, by layer, which experts tokens are sent to, ``[T, E + n]``
    bool.
    """
    sent, hooks = {}, []

    def replace(block, inputs, output, index):
        read = inputs[0][0]
        own = torch.cat([block.gate.weight, rows[index]])
        logits = read @ own.t()
        best = logits.topk(_of(block, "top_k"), dim=-1).indices
        sent[index] = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, best, True)
        weights = logits.softmax(-1) * sent[index]
        if _of(block, "norm_topk_prob", default=True):
            weights = weights / weights.sum(-1, keepdim=True)
        experts = range(len(block.gate.weight))
        update = sum(weights[:, e, None] * expert(block, e, read) for e in experts)[None]
        return (update, *output[1:]) if isinstance(output, tuple) else update

    for index in rows:
        hook = functools.partial(replace, index=index)
        hooks.append(block_of(model.model.layers[index]).register_forward_hook(hook))
    logits = model(torch.tensor([list(ids)])).logits[0]
    for hook in hooks:
        hook.remove()
    return logits, sent
