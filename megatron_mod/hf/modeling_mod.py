"""Causal language models with Mixture-of-Depths routers, for Transformers 4.57 and 5.x.

This file and the ones it imports from beside it travel with an exported model and need only
``torch`` and ``transformers``::

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

A routed layer's router reads the output of the input norm and decides what is computed:
``y = x + m * F(x)``, F = the attention, the MLP or both (``attn``, ``mlp``, ``block``), m one
number per sequence or per token (``attn_sequence``, ``attn_token``, ...); with
``attn_token+mlp_token`` the attention and the MLP have a router each, with ``expert_token``
every expert of a mixture, about the tokens that its gate assigns it. What is skipped is
not computed; where the layer has a stand-in S, a small affine map of what the router reads (of an
MLP: of what the MLP reads), it adds ``(1 - m) * S``, computed for what is skipped only.

Routers that were trained to keep a number of tokens exactly (``selection: top_k``,
Mixture-of-Depths) multiply what a token is given by its logit: ``y = x + m * r * F(x)``. Which
tokens have the largest logits is known at a text's end only, so a causal rule decides in their
place: the threshold of a small predictor's logits, or of the router's. ``set_selection("top_k")``
lets calls without a cache keep exactly those that training would.

- A sequence's decision is made once, at prefill, and lives in the cache, so that it follows
  reordering, repetition and cropping. Sequences that skip an attention store nothing there.
- A token's decision is its own, at decode steps too. With ``keys_values: selected`` a token
  that skips an attention stores nothing there either; with ``all`` it still offers its key
  and value to others, unless the layer's threshold is 1: what is skipped for good makes none.

The model and its generation are here, with the families at the end; what else a model offers is in
``controls_mod.py``, the configuration in ``configuration_mod.py``, caches in ``cache_mod.py``, the
layer in ``layer_mod.py``, that of mixtures in ``mixture_mod.py``, what calls decided in
``record_mod.py``, and the rule for thresholds in ``thresholds_mod.py``.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MistralConfig,
    MistralForCausalLM,
    MistralModel,
    MixtralConfig,
    MixtralForCausalLM,
    MixtralModel,
    OlmoeConfig,
    OlmoeForCausalLM,
    OlmoeModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Model,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3MoeModel,
)
from transformers.cache_utils import Cache, DynamicCache
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.mixtral.modeling_mixtral import MixtralDecoderLayer
from transformers.models.olmoe.modeling_olmoe import OlmoeDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeDecoderLayer

# All files beside this one are named here: Transformers 4.57 does not look into them for more.
from .answers_mod import Answers  # noqa: F401
from .attention_mod import IMPLEMENTATION  # noqa: F401
from .buffers_mod import AHEAD  # noqa: F401
from .cache_mod import CACHE, prepare_cache
from .configuration_mod import RoutedConfig
from .controls_mod import RoutingControls
from .graph_mod import DecodingGraphs
from .kernels_mod import kernels_of_any_shape
from .layer_mod import RoutedLayer, RoutingCall
from .mixture_mod import GateLogits, MixtureNames, RoutedMixtureLayer
from .olmoe_mod import OldOlmoeCausalLM, OldOlmoeLayer, OldOlmoeModel
from .record_mod import RoutingRecord
from .room_mod import ROOM  # noqa: F401
from .step_mod import DecodeStep  # noqa: F401
from .thresholds_mod import CapacityBorders, WatchedBorders


@torch.compiler.assume_constant_result  # so that it runs, and stops, while the model is traced
def refuse_compiling() -> None:
    raise ValueError(
        "torch.compile: what is computed depends on the routers' decisions, so shapes change from "
        "call to call; run the model as it is."
    )


class RoutedModel(RoutingControls):
    """Mixed into a family's model: its layers are routed ones, of class ``layer_class``."""

    layer_class: type[nn.Module]

    def __init__(self, config: RoutedConfig) -> None:
        super().__init__(config)  # its dense layers cost nothing: from_pretrained builds on meta
        self.layers = nn.ModuleList(
            self.layer_class(config, index) for index in range(config.num_hidden_layers)
        )
        self._no_split_modules = [self.layer_class.__name__]
        self.record: RoutingRecord | None = None  # of the last call
        self.recording: RoutingRecord | None = None  # of the ``generate`` that is under way
        self.graphs: DecodingGraphs | None = None  # of decode steps, if these are to be graphs
        self.selection = "causal"  # of exact routers, as ``set_selection`` says
        self._finish_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        routing_mask: Tensor | None = None,
        borders: CapacityBorders | WatchedBorders | None = None,
        *,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the family's model, whose cache is ``past_key_values`` or ``cache``; ``routing_mask``
        ``[B, S]`` names the tokens that a sequence's decision may see (default: those that
        ``attention_mask`` does not call padding)."""
        if cache is not None and past_key_values is not None:
            raise ValueError("cache and past_key_values are two names of one thing: pass one.")
        cache = past_key_values if cache is None else cache
        top_k = self.selection == "top_k" and borders is None
        if top_k and (use_cache or cache is not None):
            raise ValueError(
                "a cache is given or asked for, and set_selection('top_k') keeps a text's tokens "
                "of the largest logits, which the tokens to come would change: pass "
                "use_cache=False, or call set_selection('causal')."
            )
        if use_cache is None:
            use_cache = self.config.use_cache and not top_k
        if cache is None and use_cache:
            cache = DynamicCache(config=self.config)
        if cache is not None:
            removed = () if borders else self._removed_attention()
            cache = prepare_cache(cache, self.config, removed)
        self._refuse(attention_mask, position_ids, cache, routing_mask, kwargs)
        length = (input_ids if input_ids is not None else inputs_embeds).shape[1]
        tokens = None if attention_mask is None else attention_mask.bool()
        pooled = routing_mask
        if pooled is None and tokens is not None:
            pooled = tokens[:, -length:]
        if tokens is not None and length > 1 and bool(tokens.all()):
            tokens = None  # no padding; of a single token to ask would take longer than it spares
        routing = RoutingCall(pooled, tokens, borders, top_k)
        is_step = length == 1 and cache is not None and cache.get_seq_length() > 0
        returns_more = kwargs.get("output_hidden_states", self.config.output_hidden_states)
        if is_step and routing.by_thresholds and not (returns_more or torch.is_grad_enabled()):
            routing.graphs = self.graphs
        with kernels_of_any_shape() if is_step and self.device.type == "cuda" else nullcontext():
            output = super().forward(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                inputs_embeds=inputs_embeds,
                use_cache=use_cache,
                routing=routing,
                **{CACHE: cache},
                **kwargs,
            )
        self.record = self.recording or RoutingRecord()
        self.record.add(routing, cache)
        return output

    def _removed_attention(self) -> list[int]:
        """The layers whose attention no token will ever ask for."""
        if self.config.per_sequence or self.config.attention_target is None:
            return []
        return [index for index, layer in self._routed_layers().items() if layer.is_removed]

    def _refuse(
        self,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: Cache | None,
        routing_mask: Tensor | None,
        kwargs: dict[str, Any],
    ) -> None:
        """Raise ``ValueError`` for what would silently be wrong, with the reason."""
        if torch.compiler.is_compiling():
            refuse_compiling()
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise ValueError(
                "a CUDA graph is being captured: what is computed depends on the routers' "
                "decisions, which no graph repeats; run the model as it is."
            )
        if attention_mask is not None and attention_mask.dim() != 2:
            raise ValueError(
                f"attention_mask has {attention_mask.dim()} dims: routers must know which tokens "
                "are padding; pass one of [batch, tokens]."
            )
        if routing_mask is not None and not self.config.per_sequence:
            granularity = self.config.routing["granularity"]
            raise ValueError(
                f"routing_mask: with granularity {granularity!r} each token decides for itself; "
                "leave it out."
            )
        if kwargs.get("output_attentions", self.config.output_attentions):
            raise ValueError("output_attentions: what was skipped has none; leave it out.")
        packed = any(name.startswith("cu_seq_lens") for name in kwargs)
        if position_ids is not None and attention_mask is None and cache is None:
            packed = packed or bool((position_ids.diff(dim=-1) != 1).any())
        if packed:
            raise ValueError(
                "several texts are packed into one row (position_ids restart, or cu_seq_lens is "
                "given): a row is routed as one text; give each its own row, with attention_mask."
            )


class RoutedCausalLM(RoutingControls):
    """Mixed into a family's causal language model around a ``model_class``."""

    model_class: type[nn.Module]

    def __init__(self, config: RoutedConfig) -> None:
        super().__init__(config)
        self.model = self.model_class(config)
        self._finish_init()

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As Transformers'; checksums that an exporter left there are those of other files."""
        super().save_pretrained(save_directory, *args, **kwargs)
        Path(save_directory, "checksums.json").unlink(missing_ok=True)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As Transformers' ``generate``; ``routing_report`` then covers all its steps."""
        self.model.recording, self.prompt_mask = RoutingRecord(), None
        try:
            return super().generate(*args, **kwargs)
        finally:
            self.model.recording = None

    def _validate_generation_mode(self, mode: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        super()._validate_generation_mode(mode, config, *args, **kwargs)
        if not self.config.per_sequence:
            return
        granularity = self.config.routing["granularity"]
        reason = (
            f"with granularity {granularity!r} a sequence's decision is its whole prompt's, and"
        )
        if config.prefill_chunk_size is not None:
            raise ValueError(f"prefill_chunk_size: {reason} the first chunk would make it alone.")
        if "assisted" in str(getattr(mode, "value", mode)):
            raise ValueError(
                f"assisted decoding: {reason} the assistant's guesses would be part of it."
            )

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Without a cache each step runs the whole text: let the prompt alone decide again."""
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        if self.config.per_sequence and self.model.recording and inputs.get(CACHE) is None:
            text = inputs.get("input_ids")
            text = text if text is not None else inputs["inputs_embeds"]
            if self.prompt_mask is None:
                mask = inputs.get("attention_mask")
                ones = torch.ones(text.shape[:2], device=text.device, dtype=torch.bool)
                self.prompt_mask = ones if mask is None else mask
            new = text.shape[1] - self.prompt_mask.shape[1]
            inputs["routing_mask"] = nn.functional.pad(self.prompt_mask, (0, new))
        return inputs


def routed_family(
    config: type,
    layer: type,
    model: type,
    causal_lm: type,
    names: MixtureNames | None = None,
) -> tuple[type, type, type, type]:
    """A family's routed classes, each named as its dense one with ``MoD`` before it; ``names``: of
    what its mixtures of experts consist of."""

    def routed(mixins: Sequence[type], dense: type, **members: Any) -> type:
        return type(f"MoD{dense.__name__}", (*mixins, dense), {"__module__": __name__, **members})

    layers, models, whole = [RoutedLayer], [RoutedModel], [RoutedCausalLM]
    if names:
        layers, models = [RoutedMixtureLayer], [GateLogits, RoutedModel]
        takes_more = inspect.signature(model.forward).parameters.values()
        if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in takes_more):
            layers, models = [OldOlmoeLayer, *layers], [*models, OldOlmoeModel]
            whole = [*whole, OldOlmoeCausalLM]

    routed_config = routed(
        [RoutedConfig],
        config,
        model_type=f"mod_{config.model_type}",
        __init__=RoutedConfig.__init__,  # a class without one gets Transformers 5's
    )
    routed_layer = routed(layers, layer, names=names)
    routed_model = routed(models, model, config_class=routed_config, layer_class=routed_layer)
    return (
        routed_config,
        routed_layer,
        routed_model,
        routed(whole, causal_lm, config_class=routed_config, model_class=routed_model),
    )


# Transformers finds these by name: a folder's config.json says modeling_mod.MoDLlamaConfig.
MoDLlamaConfig, MoDLlamaDecoderLayer, MoDLlamaModel, MoDLlamaForCausalLM = routed_family(
    LlamaConfig, LlamaDecoderLayer, LlamaModel, LlamaForCausalLM
)
MoDMistralConfig, MoDMistralDecoderLayer, MoDMistralModel, MoDMistralForCausalLM = routed_family(
    MistralConfig, MistralDecoderLayer, MistralModel, MistralForCausalLM
)
MoDQwen2Config, MoDQwen2DecoderLayer, MoDQwen2Model, MoDQwen2ForCausalLM = routed_family(
    Qwen2Config, Qwen2DecoderLayer, Qwen2Model, Qwen2ForCausalLM
)
MoDQwen3Config, MoDQwen3DecoderLayer, MoDQwen3Model, MoDQwen3ForCausalLM = routed_family(
    Qwen3Config, Qwen3DecoderLayer, Qwen3Model, Qwen3ForCausalLM
)
MoDMixtralConfig, MoDMixtralDecoderLayer, MoDMixtralModel, MoDMixtralForCausalLM = routed_family(
    MixtralConfig,
    MixtralDecoderLayer,
    MixtralModel,
    MixtralForCausalLM,
    MixtureNames("block_sparse_moe", ("w1", "w3", "w2")),
)
MoDQwen3MoeConfig, MoDQwen3MoeDecoderLayer, MoDQwen3MoeModel, MoDQwen3MoeForCausalLM = (
    routed_family(
        Qwen3MoeConfig,
        Qwen3MoeDecoderLayer,
        Qwen3MoeModel,
        Qwen3MoeForCausalLM,
        MixtureNames(size="moe_intermediate_size"),
    )
)
MoDOlmoeConfig, MoDOlmoeDecoderLayer, MoDOlmoeModel, MoDOlmoeForCausalLM = routed_family(
    OlmoeConfig, OlmoeDecoderLayer, OlmoeModel, OlmoeForCausalLM, MixtureNames()
)
