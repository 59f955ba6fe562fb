"""The layers' Transformer Engine back end; importing this module needs Transformer Engine."""

from __future__ import annotations

from itertools import accumulate

import torch
import transformer_engine.pytorch  # noqa: F401  (fails here, with its own reason, if it cannot work)
from megatron.core.extensions.transformer_engine import (
    TEColumnParallelLinear,
    TEDotProductAttention,
)
from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_mod.model.attention import TorchCoreAttention
from megatron_mod.model.layout import AttentionPlan, GridSegments, TokenLayout
from megatron_mod.model.mixture import Experts, MixtureOfExperts
from megatron_mod.model.projection import PartLinear
from megatron_mod.routing.selection import Rows, Segments


class UnfusedSpecProvider(TESpecProvider):
    """Transformer Engine's modules with norms of their own, whose output a router can read."""

    def fuse_layernorm_and_linear(self) -> bool:
        return False

    def column_parallel_layer_norm_linear(self) -> None:
        return None


class TEPartColumnParallelLinear(PartLinear, TEColumnParallelLinear):
    """Transformer Engine's, its parts computed by torch."""


class TEExperts(Experts):
    """Of Transformer Engine's linears."""

    linears = UnfusedSpecProvider()


class TEMixtureOfExperts(MixtureOfExperts):
    """Its experts are Transformer Engine's."""

    experts_type = TEExperts


class TECoreAttention(TEDotProductAttention):
    """Transformer Engine's attention over rows and over streams of chosen tokens.

    What its kernels cannot express goes to torch's attention: queries of fewer tokens than
    keys, keys left out by a mask, streams in fp32 or shared by context-parallel ranks, and rows
    that these share in fp32 or with a window.
    """

    def __init__(self, config, layer_number, attn_mask_type, attention_type, **kwargs) -> None:
        super().__init__(config, layer_number, attn_mask_type, attention_type, **kwargs)
        self.torch_attention = TorchCoreAttention(
            config, layer_number, attn_mask_type, attention_type, **kwargs
        )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: None,
        attn_mask_type,
        *,
        packed_seq_params: AttentionPlan | TokenLayout | None = None,
        **kwargs: object,
    ) -> Tensor:
        """As ``TorchCoreAttention.forward``."""
        plan = packed_seq_params
        if isinstance(plan, TokenLayout):
            plan = plan.attention
        if self._is_rows(plan, query):
            return super().forward(query, key, value, None, attn_mask_type, **kwargs)
        if plan is None or not self._is_stream(plan, query):
            return self.torch_attention(query, key, value, packed_seq_params=plan)
        grid = plan.queries if isinstance(plan.queries, GridSegments) else None
        if grid is not None:
            query, key, value = (grid.selection.take(t) for t in (query, key, value))
        context = super().forward(
            *(t.squeeze(1) for t in (query, key, value)),
            None,
            attn_mask_type,
            packed_seq_params=_packed(grid.selection.segments if grid else plan.queries),
            **kwargs,
        )
        context = context.reshape(query.shape[0], 1, -1)
        return grid.selection.put(context, grid.shape) if grid else context

    def _is_rows(self, plan: AttentionPlan | None, query: Tensor) -> bool:
        if plan is not None and not (isinstance(plan.queries, Rows) and _sees_all(plan)):
            return False
        return not self._shares_rows or self._is_flash(query)

    def _is_stream(self, plan: AttentionPlan, query: Tensor) -> bool:
        return _sees_all(plan) and self._is_flash(query) and not self._shares_rows

    def _is_flash(self, query: Tensor) -> bool:
        """Whether it is for its fused kernels; its plain attention takes rows of one rank only."""
        return query.dtype in (torch.float16, torch.bfloat16) and self.config.window_size is None

    @property
    def _shares_rows(self) -> bool:
        return self.torch_attention.context_group.size() > 1


def _sees_all(plan: AttentionPlan) -> bool:
    """Whether every query is a key too, and may see all keys before it."""
    return plan.queries is plan.keys and plan.kept_keys is None


def _packed(segments: Segments) -> PackedSeqParams:
    """Megatron's description of a stream of documents."""
    ends = torch.tensor([0, *accumulate(segments.lengths)], dtype=torch.int32)
    ends = ends.to(segments.positions.device, non_blocking=True)
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=ends,
        cu_seqlens_kv=ends,
        max_seqlen_q=segments.longest,
        max_seqlen_kv=segments.longest,
    )
