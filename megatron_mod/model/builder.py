"""Builds the Megatron model of this rank."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_mod.model.architecture import Architecture
from megatron_mod.model.specs import get_routed_layer_specs
from megatron_mod.parallel import device
from megatron_mod.routing.config import RoutingConfig
from megatron_mod.routing.router import Router


class RoutedGPTModel(GPTModel):
    """Megatron's ``GPTModel`` whose padded vocabulary entries stay out of the softmax."""

    def __init__(self, *args, unpadded_vocab_size: int, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.unpadded_vocab_size = unpadded_vocab_size

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Cross entropy ``[B, S]`` of labels ``[B, S]`` under logits ``[S, B, vocab / tp]``."""
        local = logits.shape[-1]
        first = local * parallel_state.get_tensor_model_parallel_rank()
        padding = first + local - self.unpadded_vocab_size
        if padding > 0:
            logits[..., max(local - padding, 0) :] = torch.finfo(logits.dtype).min
        return super().compute_language_model_loss(labels, logits)

    def routers(self) -> dict[int, Router]:
        """This stage's routers by global layer index."""
        return {
            layer.layer_number - 1: layer.self_attention.router
            for layer in self.decoder.layers
            if hasattr(layer.self_attention, "router")
        }


def transformer_config(
    arch: Architecture,
    *,
    dtype: torch.dtype,
    tensor: int = 1,
    pipeline: int = 1,
    first_stage_layers: int | None = None,
    sequence_parallel: bool = False,
) -> TransformerConfig:
    """Megatron's configuration of ``arch`` at the given degrees."""
    return TransformerConfig(
        num_layers=arch.num_layers,
        hidden_size=arch.hidden_size,
        ffn_hidden_size=arch.ffn_hidden_size,
        num_attention_heads=arch.num_attention_heads,
        num_query_groups=arch.num_query_groups,
        kv_channels=arch.kv_channels,
        layernorm_epsilon=arch.layernorm_epsilon,
        normalization="RMSNorm",
        activation_func=F.silu,
        gated_linear_unit=True,
        add_bias_linear=False,
        add_qkv_bias=arch.qkv_bias,
        qk_layernorm=arch.qk_norm,
        window_size=None if arch.window_size is None else (arch.window_size - 1, 0),
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        num_layers_in_first_pipeline_stage=first_stage_layers,
        sequence_parallel=sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        use_cpu_initialization=not device.HAS_GPU,
        perform_initialization=False,
        # Micro-batches are padded to their own longest row.
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",  # asked for with variable lengths, experts or not
        # The loss function and the routers each add their exact share of the global
        # batch's gradient, so nothing may divide by micro-batches or ranks.
        calculate_per_token_loss=True,
        # Layers may differ, so each has its own keys in a distributed checkpoint.
        hetereogenous_dist_checkpoint=True,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
    )


def padded_vocab_size(vocab_size: int, *, tensor: int) -> int:
    """The smallest vocabulary of at least ``vocab_size`` that ``tensor`` ranks can share."""
    return -(-vocab_size // tensor) * tensor


def build_model(
    arch: Architecture, config: TransformerConfig, routing: RoutingConfig | None
) -> RoutedGPTModel:
    """This rank's stage of the model on its device, weights not yet loaded, all frozen but routers.

    Raises:
        ValueError: degrees that do not divide the model.
    """
    model = RoutedGPTModel(
        config=config,
        transformer_layer_spec=get_routed_layer_specs(config, routing),
        vocab_size=padded_vocab_size(arch.vocab_size, tensor=config.tensor_model_parallel_size),
        unpadded_vocab_size=arch.vocab_size,
        max_sequence_length=arch.max_sequence_length,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=arch.tied_embeddings,
        position_embedding_type="rope",
        rotary_base=arch.rotary_base,
        rope_scaling=arch.rope_scaling_factor is not None,
        rope_scaling_factor=arch.rope_scaling_factor or 1.0,
    )
    freeze_all_but_routers(model)
    return model.to(device.device())


def freeze_all_but_routers(model: RoutedGPTModel) -> None:
    """Leave only the routers' weights trainable; call before wrapping the model in DDP."""
    model.requires_grad_(False)
    for router in model.routers().values():
        router.requires_grad_(True)
