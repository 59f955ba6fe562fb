"""Llama, and every model published under its architecture (SmolLM2, ...)."""

from __future__ import annotations

from megatron_mod.conversion.families.base import Family, require, value_of
from megatron_mod.conversion.mappings import QKV, Direct, GatedMLP, Mapping
from megatron_mod.model.architecture import Architecture

# What Megatron's Llama-3 RoPE scaling fixes; only the factor can be set.
_LLAMA3_ROPE = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def _rope(hf_config: dict) -> tuple[float, float | None]:
    """``(base, llama-3 factor or None)`` from either release's way of writing it."""
    rope = hf_config.get("rope_parameters") or hf_config.get("rope_scaling") or {}
    base = float(rope.get("rope_theta") or hf_config.get("rope_theta") or 10000.0)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return base, None
    if kind != "llama3":
        raise ValueError(
            f"config.json: rope type {kind!r} is not supported; it must be 'default' or 'llama3'."
        )
    for field, value in _LLAMA3_ROPE.items():
        if rope.get(field) != value:
            raise ValueError(
                f"config.json: {field} = {rope.get(field)!r} of the llama3 rope scaling is not "
                f"supported; Megatron fixes it at {value}."
            )
    return base, float(rope["factor"])


def architecture_of(hf_config: dict) -> Architecture:
    """The shape a Llama ``config.json`` describes.

    Raises:
        ValueError: a feature that is not built, named by its field.
    """
    require(hf_config, "hidden_act", ("silu",), default="silu")
    require(hf_config, "attention_bias", (False,), default=False)
    require(hf_config, "mlp_bias", (False,), default=False)
    require(hf_config, "pretraining_tp", (1,), default=1)
    require(hf_config, "quantization_config", (None,), default=None)
    heads = value_of(hf_config, "num_attention_heads")
    hidden = value_of(hf_config, "hidden_size")
    base, factor = _rope(hf_config)
    return Architecture(
        num_layers=value_of(hf_config, "num_hidden_layers"),
        hidden_size=hidden,
        ffn_hidden_size=value_of(hf_config, "intermediate_size"),
        num_attention_heads=heads,
        num_query_groups=hf_config.get("num_key_value_heads") or heads,
        kv_channels=hf_config.get("head_dim") or hidden // heads,
        vocab_size=value_of(hf_config, "vocab_size"),
        max_sequence_length=value_of(hf_config, "max_position_embeddings"),
        layernorm_epsilon=value_of(hf_config, "rms_norm_eps"),
        rotary_base=base,
        tied_embeddings=hf_config.get("tie_word_embeddings", False),
        rope_scaling_factor=factor,
    )


def _layer(arch: Architecture, index: int) -> list[Mapping]:
    # Norms have the names of Transformer Engine's fused layers, as in Megatron's own
    # checkpoints; Megatron's layer specs without it map theirs to these.
    mcore, hf = f"decoder.layers.{index}", f"model.layers.{index}"
    return [
        Direct(
            f"{mcore}.self_attention.linear_qkv.layer_norm_weight", f"{hf}.input_layernorm.weight"
        ),
        QKV(
            f"{mcore}.self_attention.linear_qkv.weight",
            query=f"{hf}.self_attn.q_proj.weight",
            key=f"{hf}.self_attn.k_proj.weight",
            value=f"{hf}.self_attn.v_proj.weight",
            num_query_groups=arch.num_query_groups,
            queries_per_group=arch.num_attention_heads // arch.num_query_groups,
        ),
        Direct(f"{mcore}.self_attention.linear_proj.weight", f"{hf}.self_attn.o_proj.weight"),
        Direct(
            f"{mcore}.mlp.linear_fc1.layer_norm_weight", f"{hf}.post_attention_layernorm.weight"
        ),
        GatedMLP(
            f"{mcore}.mlp.linear_fc1.weight",
            gate=f"{hf}.mlp.gate_proj.weight",
            up=f"{hf}.mlp.up_proj.weight",
        ),
        Direct(f"{mcore}.mlp.linear_fc2.weight", f"{hf}.mlp.down_proj.weight"),
    ]


def table(arch: Architecture) -> list[Mapping]:
    """Every parameter of the model, once."""
    rows: list[Mapping] = [
        Direct("embedding.word_embeddings.weight", "model.embed_tokens.weight"),
        Direct("decoder.final_layernorm.weight", "model.norm.weight"),
    ]
    for index in range(arch.num_layers):
        rows += _layer(arch, index)
    if not arch.tied_embeddings:
        rows.append(Direct("output_layer.weight", "lm_head.weight"))
    return rows


def ignored(arch: Architecture, name: str) -> bool:
    """Rotary frequencies old releases saved, and the copy of a tied embedding."""
    return name.endswith("rotary_emb.inv_freq") or (
        arch.tied_embeddings and name == "lm_head.weight"
    )


FAMILY = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    architecture_of=architecture_of,
    table=table,
    ignored=ignored,
)
