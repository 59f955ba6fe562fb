"""Attention as routed layers ask for it: projections of some tokens, queries of any number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.llama.modeling_llama import rotate_half

from .kernels_mod import kernels_of_any_shape

IMPLEMENTATION = "sdpa"  # Transformers' name for what is used here
PART = 256  # keys that one of a GPU's processors reads


def attend(
    attn: Any, query: Tensor, keys: Tensor, values: Tensor, visible: Tensor | None, **how: Any
) -> Tensor:
    """What queries ``[B, heads, Q, D]`` of any number find among ``[B, groups, K, D]``:
    ``[B, Q, heads * D]``; ``visible``: torch's ``attn_mask`` (None: causal; one query sees all)."""
    with kernels_of_any_shape():
        return attend_at_places(attn, query, keys, values, visible, **how)


def attend_at_places(
    attn: Any, query: Tensor, keys: Tensor, values: Tensor, visible: Tensor | None, **how: Any
) -> Tensor:
    """``attend``, of shapes that do not depend on what is chosen."""
    scaling = attn.head_dim**-0.5  # OLMoE's attention of 4.57 has no name for it
    if query.shape[2] == 1:
        query = together(query, groups=keys.shape[1])
        found = scaled_dot_product_attention(query, keys, values, visible, scale=scaling)
        return found.reshape(len(found), 1, -1)
    attended, _ = sdpa_attention_forward(attn, query, keys, values, visible, scaling=scaling, **how)
    return attended.flatten(2)


def together(query: Tensor, *, groups: int) -> Tensor:
    """Queries of a single token ``[B, heads, 1, D]`` as ``[B, groups, heads / groups, D]``: asked
    together, the heads of a group need no copies of its keys."""
    return query.reshape(len(query), groups, -1, query.shape[-1])


def attend_in_parts(
    query: Tensor, keys: Tensor, values: Tensor, bias: Tensor, scaling: float
) -> Tensor:
    """What queries ``[B, groups, Q, D]`` find among ``[B, groups, K, D]``, of a few and in fp32;
    ``bias`` ``[B, 1, 1, K]`` is added to their scores, and ``K`` is of whole parts.

    For numbers of keys that are fixed and partly masked, which is what a graph can repeat: kernels
    that take a mask read all keys of a head one after the other, here they are read together.
    """
    batch, groups, queries, _ = query.shape
    scores = _product(query.flatten(0, 1), keys.flatten(0, 1).transpose(1, 2))
    scores = torch.add(bias, scores.unflatten(0, (batch, groups)), alpha=scaling)
    parts = scores.softmax(-1).view(batch * groups, queries, -1, PART).transpose(1, 2)
    parts = parts.to(values.dtype, memory_format=torch.contiguous_format).flatten(0, 1)
    found = _product(parts, values.view(len(parts), PART, -1))
    return found.view(batch, groups, -1, *found.shape[1:]).sum(2)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Of batches of matrices, in fp32."""
    if left.dtype is torch.float32:
        return torch.bmm(left, right)
    if left.is_cuda and hasattr(torch.ops.aten.bmm, "dtype"):  # since torch 2.8
        return torch.bmm(left, right, out_dtype=torch.float32)
    return torch.bmm(left.float(), right.float())


def project(
    attn: Any, name: str, hidden_states: Tensor, rotary: Sequence[Tensor] | None = None
) -> Tensor:
    """Queries, keys or values ``[..., heads, D]`` of hidden states ``[..., H]``, as ``attn`` has
    them; ``rotary`` holds cosine and sine ``[..., D]`` of the tokens' positions."""
    channels = getattr(attn, f"{name}_proj")(hidden_states)
    if norm := getattr(attn, f"{name}_norm", None):  # of each head, or (OLMoE's) of all of them
        channels = norm(channels.unflatten(-1, (-1, norm.weight.numel()))).flatten(-2)
    if (limit := getattr(attn.config, "clip_qkv", None)) is not None:
        channels = channels.clamp(-limit, limit)
    heads = channels.unflatten(-1, (-1, attn.head_dim))
    if rotary is None:
        return heads
    cos, sin = (t.unsqueeze(-2) for t in rotary)
    return heads * cos + rotate_half(heads) * sin
