"""Megatron-core's own layer, to compare ours with."""

from __future__ import annotations

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)

from megatron_mod.benchmark.routing import Setting, architecture
from megatron_mod.model.builder import transformer_config
from megatron_mod.parallel import device
from megatron_mod.parallel.topology import process_groups


def megatron_layer(size: str, setting: Setting):
    """The only layer of a model as Megatron-core specifies it, with its rotary table."""
    arch = architecture(size, setting)
    config = transformer_config(arch, dtype=setting.dtype)
    if setting.implementation == "transformer_engine":
        spec = get_gpt_layer_with_transformer_engine_spec()
    else:
        spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    model = GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=arch.vocab_size,
        max_sequence_length=arch.max_sequence_length,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=True,
        pg_collection=process_groups(),
    ).to(device.device())
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.data.normal_(0.0, 0.02)
    return model.decoder.layers[0], model.rotary_pos_emb(setting.length)
