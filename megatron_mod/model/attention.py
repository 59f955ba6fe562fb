"""Self-attention over chosen tokens, and the torch attention inside it."""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_mod.hf.kernels_mod import MASKED, kernels_of_any_shape
from megatron_mod.model.layout import AttentionPlan, TokenLayout
from megatron_mod.model.projection import Part, project
from megatron_mod.routing.selection import Segments

NEVER = torch.iinfo(torch.int64).max  # position of what pads keys: later than every query
LAST = NEVER - 1  # position of what pads queries: after every key, so no row of scores is empty


class TorchCoreAttention(MegatronModule):
    """Causal attention by ``torch.nn.functional.scaled_dot_product_attention``.

    With Megatron's ``window_size = (w, 0)`` a query sees ``w`` positions before its own.
    Context-parallel ranks gather keys and values of the whole documents.
    """

    def __init__(
        self, config, layer_number: int, attn_mask_type, attention_type, *, pg_collection, **unused
    ) -> None:
        super().__init__(config=config)
        self.dropout = config.attention_dropout
        self.window = config.window_size[0] if config.window_size else None
        self.context_group = pg_collection.cp

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: None = None,
        *,
        packed_seq_params: AttentionPlan | TokenLayout | None = None,
        **unused: object,
    ) -> Tensor:
        """Attend: query ``[S, B, heads, D]``, key and value ``[T, B, groups, D]`` (this tensor
        rank's part; streams have ``B = 1``) to ``[S, B, heads * D]``."""
        plan = self._plan(packed_seq_params, query)
        k, v = plan.keys.pad(key), plan.keys.pad(value)
        if self._is_quick_among_keys(plan, query, k):
            return self._among_keys(query, k, v, plan)
        q, mask = plan.queries.pad(query), None
        if (
            plan.queries is not plan.keys
            or plan.kept_keys is not None
            or self.context_group.size() > 1
            or (self.window is not None and self._reaches_beyond_window(plan, k))
        ):
            k, v = self._whole_documents(k, plan), self._whole_documents(v, plan)
            if self.window not in plan.masks:
                plan.masks[self.window] = self._mask(plan)
            mask = plan.masks[self.window]
        varies = isinstance(plan.queries, Segments)
        with kernels_of_any_shape() if varies else contextlib.nullcontext():
            return plan.queries.unpad(self._attend(q, k, v, mask)).flatten(2).contiguous()

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Of padded ``[D, S, heads, D']`` and ``[D, T, groups, D']``; causal without a mask."""
        if mask is not None and q.is_cuda:  # with a mask a GPU's kernels take no groups
            k, v = (t.repeat_interleave(q.shape[2] // t.shape[2], 2) for t in (k, v))
        context = F.scaled_dot_product_attention(
            *(t.transpose(1, 2) for t in (q, k, v)),
            attn_mask=mask,
            is_causal=mask is None,
            dropout_p=self.dropout if self.training else 0.0,
            enable_gqa=q.shape[2] != k.shape[2],
        )
        return context.transpose(1, 2)

    def _is_quick_among_keys(self, plan: AttentionPlan, query: Tensor, k: Tensor) -> bool:
        """Whether chosen queries are better off at their places among all padded keys than with a
        mask: GPUs have fast kernels for what is causal and none for masks."""
        return (
            query.is_cuda
            and isinstance(plan.queries, Segments)
            and plan.queries is not plan.keys
            and plan.kept_keys is None
            and self.window is None
            and self.context_group.size() == 1
            and plan.queries.longest >= MASKED * k.shape[1]
        )

    def _among_keys(self, query: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> Tensor:
        """``forward`` of a stream of queries, with zeros at the places of all others."""
        places = plan.queries.places(k.shape[1], plan.documents)
        grid = query.new_zeros(k.shape[0] * k.shape[1], *query.shape[2:])
        q = grid.index_copy(0, places, query.squeeze(1)).unflatten(0, k.shape[:2])
        return self._attend(q, k, v, None).flatten(0, 1)[places].flatten(1).unsqueeze(1)

    def _plan(self, plan: AttentionPlan | TokenLayout | None, query: Tensor) -> AttentionPlan:
        if isinstance(plan, AttentionPlan):
            return plan
        if plan is None:
            group = self.context_group
            plan = TokenLayout.of_prompts(
                query, context_rank=group.rank(), context_ranks=group.size()
            )
        return plan.attention

    def _reaches_beyond_window(self, plan: AttentionPlan, k: Tensor) -> bool:
        """Whether a query can have earlier keys out of its window; a stream's tokens may be any
        distance apart."""
        return isinstance(plan.keys, Segments) or self.window < k.shape[1] - 1

    def _mask(self, plan: AttentionPlan) -> Tensor:
        """bool ``[D, 1, S, T]``."""
        positions = self._whole_documents(plan.keys.pad_positions(NEVER), plan)
        kept = plan.kept_keys
        if kept is not None:
            kept = self._whole_documents(kept.to(torch.uint8), plan).bool()
        queries = plan.queries.pad_positions(LAST)
        return _visible(queries, positions, kept, window=self.window)[:, None]

    def _whole_documents(self, padded: Tensor, plan: AttentionPlan) -> Tensor:
        """What belongs to the keys ``[D, T, ...]``, of all context-parallel ranks and of the
        documents that are asked about."""
        if self.context_group.size() > 1:
            padded = self._gather(padded)
        return padded if plan.documents is None else padded[plan.documents]

    def _gather(self, padded: Tensor) -> Tensor:
        """``[D, T, ...]`` of each rank to ``[D, ranks * T, ...]``; backward sums over the ranks."""
        ranks = self.context_group.size()
        gathered = gather_from_sequence_parallel_region(
            padded.contiguous(), tensor_parallel_output_grad=True, group=self.context_group
        )
        parts = gathered.view(ranks, *padded.shape).transpose(0, 1)
        return parts.reshape(padded.shape[0], ranks * padded.shape[1], *padded.shape[2:])


def _visible(queries: Tensor, keys: Tensor, kept: Tensor | None, *, window: int | None) -> Tensor:
    """Which keys a query sees, bool ``[D, S, T]``, of positions ``[D, S]`` and ``[D, T]``: earlier
    ones that are kept and at most ``window`` away, and its own."""
    queries, keys = queries[:, :, None], keys[:, None, :]
    seen = keys <= queries
    if window is not None:
        seen &= (queries - keys <= window) | (queries == LAST)
    if kept is not None:
        seen &= kept[:, None, :] | (keys == queries)
    return seen


class RoutedSelfAttention(SelfAttention):
    """Megatron's self-attention for packed rows and for queries of fewer tokens than keys."""

    def forward(
        self,
        hidden_states: Tensor,
        *args: object,
        rotary_pos_emb: Tensor | tuple[Tensor, Tensor] | None = None,
        packed_seq_params: AttentionPlan | TokenLayout | None = None,
        **kwargs: object,
    ) -> tuple[Tensor, Tensor | None]:
        """As Megatron's; in packed rows rotary positions begin anew with each document."""
        if isinstance(packed_seq_params, TokenLayout) and packed_seq_params.packed:
            rotary_pos_emb = packed_seq_params.rotary(rotary_pos_emb)
        return super().forward(
            hidden_states,
            *args,
            rotary_pos_emb=rotary_pos_emb,
            packed_seq_params=packed_seq_params,
            **kwargs,
        )

    def get_query_key_value_tensors(
        self, hidden_states: Tensor, key_value_states: Tensor | None = None, **kwargs: object
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As Megatron's, of no tokens too; with ``key_value_states`` ``[T, B, H]`` keys and values
        are theirs and queries those of ``hidden_states``, with no more than either's projection
        computed if ``project`` can do so."""
        if key_value_states is None:
            if len(hidden_states):
                return super().get_query_key_value_tensors(hidden_states, **kwargs)
            # Megatron's reshapes infer sizes, which no tokens do not tell: project one and drop it.
            one = F.pad(hidden_states, (0, 0, 0, 0, 0, 1))
            return tuple(t[:0] for t in super().get_query_key_value_tensors(one, **kwargs))
        groups, dim = self.num_query_groups_per_partition, self.hidden_size_per_attention_head
        heads = self.num_attention_heads_per_partition // groups
        queries = Part(groups, 0, heads * dim)
        keys_values = Part(groups, heads * dim, (heads + 2) * dim)
        query = project(self.linear_qkv, hidden_states, queries).unflatten(-1, (-1, dim))
        both = project(self.linear_qkv, key_value_states, keys_values)
        key, value = both.unflatten(-1, (groups, -1)).split(dim, dim=-1)
        if self.q_layernorm is not None and not isinstance(self.q_layernorm, IdentityOp):
            query = self.q_layernorm(query)
        if self.k_layernorm is not None and not isinstance(self.k_layernorm, IdentityOp):
            key = self.k_layernorm(key)
        return query, key, value
