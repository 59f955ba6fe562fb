"""Llama with Mixture-of-Depths routers, for Hugging Face Transformers 4.57 and 5.x.

This file travels with an exported model and needs only ``torch`` and ``transformers``::

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

A routed layer asks its router once per sequence, at prefill: a sequence that skips
the layer's attention computes nothing there and stores no keys or values, then and
at every decode step. The decision lives in the cache, so it follows reordering,
repetition and selection of rows. A call without cache decides on the whole row.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)


class MoDLlamaConfig(LlamaConfig):
    """A Llama configuration with a ``routing`` entry.

    ``routing`` holds ``granularity`` (``attn_sequence``), ``layers`` (zero-based indices of the
    routed layers), ``threshold`` (keep when ``sigmoid(logit)`` reaches it) and what the routers
    were trained for: ``capacity`` per routed layer, ``scope`` and ``pooling``.
    """

    model_type = "mod_llama"

    def __init__(self, routing: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self.routing = routing or {"granularity": "attn_sequence", "layers": [], "threshold": 0.5}
        if self.routing["granularity"] != "attn_sequence":
            raise ValueError(
                f"routing.granularity = {self.routing['granularity']!r}: this file knows only "
                "'attn_sequence'; use the modelling file the model was exported with."
            )
        super().__init__(**kwargs)


class Router(nn.Module):
    """One linear map ``H -> 1`` without bias, computed in fp32."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, hidden_size))

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Logits ``[...]`` of hidden states ``[..., H]``."""
        return nn.functional.linear(hidden_states.float(), self.weight.float()).squeeze(-1)


class RoutedCacheLayer(DynamicLayer):
    """Keys and values of the kept sequences only, ``[kept, heads, T, D]``, and who they are."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: Tensor | None = None  # [B] bool, set by the prefill
        self.rows: Tensor | None = None  # indices of the kept sequences, ascending
        self.seen = 0  # tokens every sequence has been through, kept or not

    def decide(self, kept: Tensor) -> None:
        self.kept = kept
        self.rows = kept.nonzero().squeeze(-1)

    def get_seq_length(self) -> int:
        return self.seen

    def reset(self) -> None:
        self.__init__()

    def crop(self, length: int) -> None:
        """Keep ``length`` tokens, or drop ``-length`` (Transformers 4.57 and 5.x mean one each)."""
        keep = min(length, self.seen) if length > 0 else self.seen + length
        self.seen = keep
        if self.is_initialized:
            self.keys, self.values = self.keys[..., :keep, :], self.values[..., :keep, :]

    def batch_select_indices(self, indices: Tensor) -> None:
        """Let sequence ``indices[i]`` become sequence ``i``."""
        if self.kept is None:
            return
        stored = (self.kept.cumsum(0) - 1)[indices]
        self.decide(self.kept[indices])
        if self.is_initialized:
            stored = stored[self.rows]
            self.keys, self.values = self.keys[stored], self.values[stored]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.kept is not None:
            self.batch_select_indices(beam_idx.to(self.kept.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.kept is not None:
            rows = torch.arange(len(self.kept), device=self.kept.device)
            self.batch_select_indices(rows.repeat_interleave(repeats))


def _with_routed_layers(cache: Cache, config: MoDLlamaConfig) -> Cache:
    """Give a cache the routed layers' own storage, in place, if it is new."""
    routed = config.routing["layers"]
    layers = getattr(cache, "layers", None)
    if not routed or any(isinstance(layer, RoutedCacheLayer) for layer in layers or ()):
        return cache
    if not isinstance(cache, DynamicCache) or cache.get_seq_length() > 0:
        raise ValueError(
            f"past_key_values is a {'used ' if isinstance(cache, DynamicCache) else ''}"
            f"{type(cache).__name__} that this model did not fill; routed layers keep keys and "
            "values of some sequences only: pass an empty DynamicCache, or none."
        )
    count = config.num_hidden_layers
    cache.layers = [
        RoutedCacheLayer() if i in set(routed) else DynamicLayer() for i in range(count)
    ]
    cache.layer_class_to_replicate = None
    return cache


class MoDLlamaDecoderLayer(LlamaDecoderLayer):
    """A Llama layer whose attention each sequence takes or skips (or that has no router)."""

    def __init__(self, config: MoDLlamaConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.layer_idx = layer_idx
        self.router = None
        if layer_idx in config.routing["layers"]:
            threshold = config.routing["threshold"]
            self.router = Router(config.hidden_size)
            self.logit_border = math.log(threshold / (1.0 - threshold))

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        routing_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """``[B, S, H]`` to the same; ``routing_mask`` ``[B, S]``: tokens the decision may see."""
        context = {
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "position_embeddings": position_embeddings,
            **kwargs,
        }
        if self.router is None:
            return super().forward(hidden_states, **context)
        hidden_states = hidden_states + self._attend(hidden_states, routing_mask, context)
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))

    def _attend(self, hidden_states: Tensor, routing_mask: Tensor | None, context: dict) -> Any:
        """The attention's update ``[B, S, H]``, or 0 where every sequence skips."""
        cache = context["past_key_values"]
        storage = cache.layers[self.layer_idx] if cache is not None else RoutedCacheLayer()
        normed = None
        if storage.kept is None:
            normed = self.input_layernorm(hidden_states)
            storage.decide(self._decide(normed, routing_mask))
        rows, batch = storage.rows, hidden_states.shape[0]
        if len(storage.kept) != batch:
            raise ValueError(
                f"the cache holds the decisions of {len(storage.kept)} sequences, but the batch "
                f"has {batch}; reorder or repeat the cache with its own methods."
            )
        update: Any = 0
        if len(rows):
            everyone = len(rows) == batch
            if normed is None:
                normed = self.input_layernorm(hidden_states if everyone else hidden_states[rows])
            elif not everyone:
                normed = normed[rows]
            if not everyone:
                context = {name: _select(value, rows, batch) for name, value in context.items()}
            update, _ = self.self_attn(hidden_states=normed, **context)
            if not everyone:
                whole = torch.zeros_like(hidden_states)
                whole[rows] = update
                update = whole
        storage.seen += hidden_states.shape[1]
        return update

    def _decide(self, normed: Tensor, routing_mask: Tensor | None) -> Tensor:
        """Which sequences keep this layer, ``[B]`` bool: the mean logit reaches the border."""
        logits = self.router(normed)
        if routing_mask is None:
            return logits.mean(1) >= self.logit_border
        count = routing_mask.sum(1).clamp(min=1)
        return (logits * routing_mask).sum(1) / count >= self.logit_border


def _select(value: Any, rows: Tensor, batch: int) -> Any:
    """The kept rows of a tensor with a batch dim; anything else as it is."""
    if isinstance(value, tuple):
        return tuple(_select(item, rows, batch) for item in value)
    if isinstance(value, Tensor) and value.dim() > 1 and value.shape[0] == batch:
        return value[rows]
    return value


class MoDLlamaModel(LlamaModel):
    config_class = MoDLlamaConfig
    _keep_in_fp32_modules_strict = ("router",)

    def __init__(self, config: MoDLlamaConfig) -> None:
        LlamaPreTrainedModel.__init__(self, config)  # LlamaModel's would build dense layers first
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(
            [MoDLlamaDecoderLayer(config, index) for index in range(config.num_hidden_layers)]
        )
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        routing_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As ``LlamaModel``; ``routing_mask`` ``[B, S]`` names the tokens the routers may see
        (default: those ``attention_mask`` does not call padding)."""
        inputs = input_ids if input_ids is not None else inputs_embeds
        if routing_mask is None and attention_mask is not None and attention_mask.dim() == 2:
            routing_mask = attention_mask[:, -inputs.shape[1] :]
        if past_key_values is None and (self.config.use_cache if use_cache is None else use_cache):
            past_key_values = DynamicCache()
        if past_key_values is not None:
            past_key_values = _with_routed_layers(past_key_values, self.config)
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            routing_mask=routing_mask,
            **kwargs,
        )


class MoDLlamaForCausalLM(LlamaForCausalLM):
    config_class = MoDLlamaConfig
    _keep_in_fp32_modules_strict = ("router",)

    def __init__(self, config: MoDLlamaConfig) -> None:
        LlamaPreTrainedModel.__init__(self, config)
        self.model = MoDLlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
