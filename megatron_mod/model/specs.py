"""Which layer of a model gets which Megatron ``ModuleSpec``."""

from __future__ import annotations

import copy

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron_mod.model.attention import SequenceRoutedSelfAttention, TorchCoreAttention
from megatron_mod.model.norm import RMSNorm
from megatron_mod.routing.config import RoutingConfig


def dense_layer_spec(config: TransformerConfig) -> ModuleSpec:
    """An ordinary layer: Megatron's parallel linears, torch's attention, our norm."""
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    spec.submodules.input_layernorm = RMSNorm
    spec.submodules.pre_mlp_layernorm = RMSNorm
    attention = spec.submodules.self_attention.submodules
    attention.core_attention = TorchCoreAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return spec


def routed_layer_spec(config: TransformerConfig, routing: RoutingConfig) -> ModuleSpec:
    """The ordinary layer with a router in front of what ``routing.granularity`` names."""
    spec = copy.deepcopy(dense_layer_spec(config))
    attention = spec.submodules.self_attention
    attention.module = SequenceRoutedSelfAttention
    attention.params = {**attention.params, "routing": routing}
    return spec


def get_routed_layer_specs(
    config: TransformerConfig, routing: RoutingConfig | None, *, vp_stage: int | None = None
) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage, routed where ``routing`` says; ``None``: all dense.

    Pass it as ``transformer_layer_spec`` to Megatron's ``GPTModel``. Needs an
    initialised ``parallel_state``.
    """
    offset = get_transformer_layer_offset(config, vp_stage)
    count = get_num_layers_to_build(config, vp_stage)
    routed = set(routing.layers) if routing else set()
    layers = [
        routed_layer_spec(config, routing) if index in routed else dense_layer_spec(config)
        for index in range(offset, offset + count)
    ]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm)
