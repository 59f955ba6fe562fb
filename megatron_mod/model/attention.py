"""Self-attention that a router can skip, and the torch attention inside it."""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_mod.routing.config import RoutingConfig
from megatron_mod.routing.decision import keep_mask
from megatron_mod.routing.masks import pooled_tokens, valid_tokens
from megatron_mod.routing.router import Router


class TorchCoreAttention(MegatronModule):
    """Causal attention by ``torch.nn.functional.scaled_dot_product_attention``.

    Rows are padded on the right, so the causal mask alone keeps padding out of
    every valid token's attention, and ``attention_mask`` is not looked at.
    """

    def __init__(self, config, layer_number: int, attn_mask_type, attention_type, **unused) -> None:
        super().__init__(config=config)
        self.dropout = config.attention_dropout
        self.window = config.window_size and config.window_size[0]  # tokens before a query's own

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask=None, **unused: object
    ) -> Tensor:
        """Attend: query ``[S, B, heads, D]``, key and value ``[S, B, groups, D]`` (this tensor
        rank's part) to ``[S, B, heads * D]``."""
        query, key, value = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        mask = None
        if self.window is not None and self.window + 1 < key.shape[2]:
            seen = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
            mask = seen.tril().triu(-self.window)
        context = torch.nn.functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=mask is None,
            dropout_p=self.dropout if self.training else 0.0,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return context.permute(2, 0, 1, 3).flatten(2).contiguous()


class SequenceRoutedSelfAttention(SelfAttention):
    """Self-attention with one keep-or-skip decision per sequence (``attn_sequence``).

    Its input is the output of the layer's unfused input norm, which is what the
    router reads. In place of an attention mask it takes the batch's token roles
    (``[B, S]`` uint8, see ``routing.masks``; ``None``: every token is a valid one of
    a prompt). In training it computes every sequence and multiplies by the
    straight-through mask; otherwise skipped sequences are not computed.
    """

    def __init__(self, config, *args, routing: RoutingConfig, **kwargs) -> None:
        super().__init__(config, *args, **kwargs)
        self.routing = routing
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        self.router = Router(config.hidden_size, device=device)
        self.router.weight.sequence_parallel = config.sequence_parallel

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs):
        """``[S, B, H]`` (``[S / tp, B, H]`` with sequence parallelism) to the same shape; the
        second value, Megatron's bias to be added later, is already added."""
        mask = self._decide(hidden_states, attention_mask)
        if self.training:
            output = self._attend(hidden_states, **kwargs)
            return output * mask.to(output.dtype)[None, :, None], None

        kept = mask.nonzero().squeeze(-1)  # the one host synchronisation: its size is a shape
        if len(kept) == hidden_states.shape[1]:
            return self._attend(hidden_states, **kwargs), None
        output = torch.zeros_like(hidden_states)
        if len(kept):
            output[:, kept] = self._attend(hidden_states[:, kept], **kwargs)
        return output, None

    def _attend(self, hidden_states: Tensor, **kwargs) -> Tensor:
        output, bias = super().forward(hidden_states, attention_mask=None, **kwargs)
        return output if bias is None else output + bias

    def _decide(self, hidden_states: Tensor, roles: Tensor | None) -> Tensor:
        """The keep mask ``[B]``, the same on all tensor-parallel ranks."""
        logits = self.router(hidden_states)  # [S or S / tp, B]
        if roles is None:
            pooled = valid = torch.ones_like(logits, dtype=torch.bool)
        else:
            pooled = self._local_tokens(pooled_tokens(roles, pooling=self.routing.pooling))
            valid = self._local_tokens(valid_tokens(roles))
        total = (logits * pooled).sum(0)
        counts = torch.stack((pooled.sum(0), valid.sum(0))).to(total.dtype)
        if self.config.sequence_parallel:
            total = reduce_from_tensor_model_parallel_region(total)
            counts = reduce_from_tensor_model_parallel_region(counts)
        is_valid = counts[1] > 0
        mask = keep_mask(
            total / counts[0].clamp(min=1),
            border=self.routing.logit_border,
            penalty_gradient=self.router.penalty_per_unit * is_valid,
        )
        self.router.count(mask.detach().bool(), is_valid)
        if self.config.sequence_parallel:
            # Each rank's use of the mask sees only its tokens: add up what comes back.
            mask = copy_to_tensor_model_parallel_region(mask)
        return mask

    def _local_tokens(self, mask: Tensor) -> Tensor:
        """``[B, S]`` to this rank's ``[S, B]``, or ``[S / tp, B]`` with sequence parallelism."""
        mask = mask.t()
        if not self.config.sequence_parallel:
            return mask
        group = self.pg_collection.tp
        return mask.chunk(group.size())[group.rank()]
