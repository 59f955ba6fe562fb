"""What decoders of Llama's shape share: rotary positions, RMSNorm, gated MLP, grouped queries."""

from __future__ import annotations

from collections.abc import Callable

from megatron_mod.conversion.families.base import read_rope, require, value_of
from megatron_mod.conversion.mappings import QKV, Direct, GatedMLP, Mapping
from megatron_mod.model.architecture import Architecture


def read_decoder(hf_config: dict, **more: object) -> Architecture:
    """The shape a ``config.json`` describes; ``more`` are the family's own ``Architecture`` fields.

    Raises:
        ValueError: a feature that is not built, named by its field.
    """
    require(hf_config, "hidden_act", ("silu",), default="silu")
    require(hf_config, "attention_dropout", (0, 0.0), default=0.0)
    require(hf_config, "quantization_config", (None,), default=None)
    heads = value_of(hf_config, "num_attention_heads")
    hidden = value_of(hf_config, "hidden_size")
    groups = hf_config.get("num_key_value_heads") or heads
    head_dim = more.get("kv_channels") or hf_config.get("head_dim")
    _require_whole_heads(heads=heads, groups=groups, hidden=hidden, head_dim=head_dim)
    base, factor = read_rope(hf_config)
    fields = {
        "num_layers": value_of(hf_config, "num_hidden_layers"),
        "hidden_size": hidden,
        "ffn_hidden_size": value_of(hf_config, "intermediate_size"),
        "num_attention_heads": heads,
        "num_query_groups": groups,
        "kv_channels": head_dim or hidden // heads,
        "vocab_size": value_of(hf_config, "vocab_size"),
        "max_sequence_length": value_of(hf_config, "max_position_embeddings"),
        "layernorm_epsilon": value_of(hf_config, "rms_norm_eps"),
        "rotary_base": base,
        "tied_embeddings": bool(hf_config.get("tie_word_embeddings")),
        "rope_scaling_factor": factor,
    }
    return Architecture(**{**fields, **more})


def _require_whole_heads(*, heads: int, groups: int, hidden: int, head_dim: int | None) -> None:
    if heads % groups:
        raise ValueError(
            f"config.json: num_key_value_heads = {groups}: does not divide num_attention_heads = "
            f"{heads}."
        )
    if head_dim is None and hidden % heads:
        raise ValueError(
            f"config.json: num_attention_heads = {heads}: does not divide hidden_size = {hidden}, "
            "and there is no head_dim."
        )
    if (head_dim or hidden // heads) % 2:
        raise ValueError(
            f"config.json: head_dim = {head_dim or hidden // heads}: must be even, because rotary "
            "positions turn pairs."
        )


def require_full_attention(hf_config: dict) -> None:
    """Refuse a config.json some of whose layers attend to a window only.

    Raises:
        ValueError: naming the field.
    """
    require(hf_config, "use_sliding_window", (False,), default=False)
    kinds = sorted(set(hf_config.get("layer_types") or ()) - {"full_attention"})
    if kinds:
        raise ValueError(
            f"config.json: layer_types holds {kinds}, which is not supported; all layers must be "
            "'full_attention'."
        )


def _mlp(arch: Architecture, mcore: str, hf: str) -> list[Mapping]:
    return [
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


def table(
    arch: Architecture, *, mlp: Callable[[Architecture, str, str], list[Mapping]] = _mlp
) -> list[Mapping]:
    """Every parameter of the model, once.

    Args:
        mlp: the rows of what follows a layer's attention, its norm included, from what the layer's
            names begin with in Megatron and in Hugging Face's model.
    """
    rows: list[Mapping] = [
        Direct("embedding.word_embeddings.weight", "model.embed_tokens.weight"),
    ]
    for index in range(arch.num_layers):
        mcore, hf = f"decoder.layers.{index}", f"model.layers.{index}"
        rows += _attention(arch, f"{mcore}.self_attention", hf) + mlp(arch, mcore, hf)
    rows.append(Direct("decoder.final_layernorm.weight", "model.norm.weight"))
    if not arch.tied_embeddings:
        rows.append(Direct("output_layer.weight", "lm_head.weight"))
    return rows


# Norms have the names of Transformer Engine's fused layers, as in Megatron's own
# checkpoints; Megatron's layer specs without it map theirs to these.
def _attention(arch: Architecture, mcore: str, hf: str) -> list[Mapping]:
    rows: list[Mapping] = [
        Direct(f"{mcore}.linear_qkv.layer_norm_weight", f"{hf}.input_layernorm.weight")
    ]
    for kind in ("weight", "bias") if arch.qkv_bias else ("weight",):
        rows.append(
            QKV(
                f"{mcore}.linear_qkv.{kind}",
                query=f"{hf}.self_attn.q_proj.{kind}",
                key=f"{hf}.self_attn.k_proj.{kind}",
                value=f"{hf}.self_attn.v_proj.{kind}",
                num_query_groups=arch.num_query_groups,
                queries_per_group=arch.num_attention_heads // arch.num_query_groups,
            )
        )
    if arch.qk_norm or arch.qk_norm_across_heads:
        rows += [
            Direct(f"{mcore}.{x}_layernorm.weight", f"{hf}.self_attn.{x}_norm.weight") for x in "qk"
        ]
    return [*rows, Direct(f"{mcore}.linear_proj.weight", f"{hf}.self_attn.o_proj.weight")]


def ignored(arch: Architecture, name: str) -> bool:
    """Rotary frequencies old releases saved, and the copy of a tied embedding."""
    return name.endswith("rotary_emb.inv_freq") or (
        arch.tied_embeddings and name == "lm_head.weight"
    )
