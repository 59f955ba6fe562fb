"""Which layer of a model gets which Megatron ``ModuleSpec``."""

from __future__ import annotations

import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
    get_mlp_module_spec_for_backend,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron_mod.config.lora import LoraSettings
from megatron_mod.model.attention import RoutedSelfAttention, TorchCoreAttention
from megatron_mod.model.layer import RoutedTransformerLayer
from megatron_mod.model.mixture import MixtureOfExperts
from megatron_mod.model.norm import KeyNorm, QueryNorm, RMSNorm
from megatron_mod.model.passing import PassingLayer
from megatron_mod.model.projection import PartColumnParallelLinear
from megatron_mod.model.recompute import DenseTransformerLayer
from megatron_mod.parallel import device
from megatron_mod.routing.config import RoutingConfig

IMPLEMENTATIONS = ("local", "transformer_engine")


def choose_implementation(wanted: str | None = None, *, dtype: torch.dtype = torch.bfloat16) -> str:
    """The layers' back end: ``wanted``, or Transformer Engine where it works, else ``local``.

    In float32 it is ``local`` unless the other is wanted: Transformer Engine's products are TF32
    then, with ten bits of mantissa, and its attention is its slow one.

    Args:
        dtype: of the weights.

    Raises:
        ValueError: Transformer Engine is wanted and cannot work here.
    """
    if wanted == "local" or (wanted is None and dtype == torch.float32):
        return "local"
    reason = why_not_transformer_engine()
    if reason and wanted is not None:
        raise ValueError(
            f"model.transformer_impl = {wanted!r}: Transformer Engine cannot work here, {reason}; "
            "use local, or leave it out."
        )
    return "local" if reason else "transformer_engine"


def why_not_transformer_engine() -> str | None:
    """Why Transformer Engine's layers cannot work here; ``None``: they can."""
    if not device.HAS_GPU:
        return "there is no GPU"
    try:
        import megatron_mod.model.transformer_engine  # noqa: F401
    except ImportError as error:
        return f"it does not import: {error}"
    return None


def dense_layer_spec(
    config: TransformerConfig,
    implementation: str = "local",
    lora: LoraSettings | None = None,
    *,
    qk_norm_across_heads: bool = False,
) -> ModuleSpec:
    """An ordinary layer: Megatron's parallel linears, torch's attention and our norm (``local``),
    or Transformer Engine's modules; with adapters, which read what linears do, unfused norms. Its
    MLP is a mixture of experts if the configuration has any."""
    if implementation == "transformer_engine":
        from megatron_mod.model.transformer_engine import TECoreAttention

        spec = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
        attention, core = spec.submodules.self_attention.submodules, TECoreAttention
    else:
        spec = get_gpt_layer_local_spec(normalization="RMSNorm")
        spec.submodules.input_layernorm = RMSNorm
        spec.submodules.pre_mlp_layernorm = RMSNorm
        attention, core = spec.submodules.self_attention.submodules, TorchCoreAttention
        if config.qk_layernorm:
            attention.q_layernorm = attention.k_layernorm = RMSNorm
    if qk_norm_across_heads:
        attention.q_layernorm, attention.k_layernorm = QueryNorm, KeyNorm
    spec.module = DenseTransformerLayer
    spec.submodules.self_attention.module = RoutedSelfAttention
    attention.core_attention = core
    if lora is not None:
        spec.params = {**spec.params, "lora": lora}
        if implementation == "transformer_engine":
            _unfuse_norms(spec)
    if config.num_moe_experts:
        _set_mixture(spec, implementation)
    return spec


def routed_layer_spec(
    config: TransformerConfig,
    routing: RoutingConfig,
    implementation: str = "local",
    lora: LoraSettings | None = None,
    *,
    qk_norm_across_heads: bool = False,
) -> ModuleSpec:
    """The ordinary layer, its norms unfused and its queries apart from its keys if need be, with a
    router that chooses what ``routing.granularity`` names."""
    spec = dense_layer_spec(config, implementation, lora, qk_norm_across_heads=qk_norm_across_heads)
    if implementation == "transformer_engine":
        _unfuse_norms(spec)
    else:
        spec.submodules.self_attention.submodules.linear_qkv = PartColumnParallelLinear
    if config.num_moe_experts:
        _set_mixture(spec, implementation)
    spec.module = RoutedTransformerLayer
    spec.params = {**spec.params, "routing": routing}
    return spec


def _unfuse_norms(spec: ModuleSpec) -> None:
    """Split Transformer Engine's norm-and-linear modules, keeping their checkpoint keys."""
    from megatron_mod.model.transformer_engine import (
        TEPartColumnParallelLinear,
        UnfusedSpecProvider,
    )

    backend, layer = UnfusedSpecProvider(), spec.submodules
    layer.self_attention.submodules.linear_qkv = TEPartColumnParallelLinear
    layer.input_layernorm = backend.layer_norm()
    layer.pre_mlp_layernorm = backend.layer_norm()
    layer.mlp = get_mlp_module_spec_for_backend(backend=backend)
    local = get_gpt_layer_local_spec(normalization="RMSNorm")
    layer.sharded_state_dict_keys_map = local.submodules.sharded_state_dict_keys_map


def _set_mixture(spec: ModuleSpec, implementation: str) -> None:
    """Put a mixture in the place of the MLP, with a norm of its own before it."""
    layer = spec.submodules
    if implementation == "transformer_engine":
        from megatron_mod.model.transformer_engine import TEMixtureOfExperts, UnfusedSpecProvider

        layer.mlp, layer.pre_mlp_layernorm = TEMixtureOfExperts, UnfusedSpecProvider().layer_norm()
    else:
        layer.mlp = MixtureOfExperts
    layer.sharded_state_dict_keys_map = {
        name: key
        for name, key in layer.sharded_state_dict_keys_map.items()
        if not name.startswith("pre_mlp_layernorm")
    }


def get_routed_layer_specs(
    config: TransformerConfig,
    routing: RoutingConfig | None,
    *,
    vp_stage: int | None = None,
    pp_rank: int | None = None,
    implementation: str = "local",
    computed: range | None = None,
    lora: LoraSettings | None = None,
    qk_norm_across_heads: bool = False,
) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage, routed where ``routing`` says; ``None``: all dense.

    Pass it as ``transformer_layer_spec`` to Megatron's ``GPTModel``, and each micro-batch's
    ``TokenLayout`` as ``packed_seq_params`` (without one, every row is a whole prompt); the
    attention mask stays ``None``. Needs ``hidden_dropout = 0``. README shows a training script
    around it.

    Args:
        config: the model's; ``normalization`` must be ``RMSNorm``.
        routing: layers by global, zero-based index.
        vp_stage: which chunk of a virtual pipeline.
        pp_rank: which pipeline stage; without it, ``parallel_state``'s.
        implementation: ``local`` or ``transformer_engine`` (see ``choose_implementation``).
        computed: the layers that do something; the others hold their places (``PassingLayer``).
            ``None``: all.
        lora: the adapters, and which layers have them; ``None``: none have.
        qk_norm_across_heads: of a ``qk_layernorm``, whether it is one on a token's whole query and
            one on its whole key, in the place of one on each head.

    Raises:
        ValueError: a layer index the model does not have, or another normalization.
    """
    routed = set(routing.layers) if routing else set()
    adapted = set(lora.layers) if lora else set()
    if routed and max(routed) >= config.num_layers:
        raise ValueError(
            f"routing.layers names layer {max(routed)}, but num_layers is {config.num_layers}; "
            f"use 0 to {config.num_layers - 1}."
        )
    if config.normalization != "RMSNorm":
        raise ValueError(
            f"normalization = {config.normalization!r}: these layers are built with 'RMSNorm'."
        )
    offset = get_transformer_layer_offset(config, vp_stage, pp_rank)
    count = get_num_layers_to_build(config, vp_stage, pp_rank)
    computed = range(config.num_layers) if computed is None else computed
    assert routed | adapted <= set(computed), "a layer that is routed or adapted, not computed"

    def spec(index: int) -> ModuleSpec:
        if index not in computed:
            return ModuleSpec(PassingLayer)
        own = lora if index in adapted else None
        across = {"qk_norm_across_heads": qk_norm_across_heads}
        if index in routed:
            return routed_layer_spec(config, routing, implementation, own, **across)
        return dense_layer_spec(config, implementation, own, **across)

    layers = [spec(index) for index in range(offset, offset + count)]
    norm = RMSNorm
    if implementation == "transformer_engine":
        from megatron_mod.model.transformer_engine import UnfusedSpecProvider

        norm = UnfusedSpecProvider().layer_norm()
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=norm)
