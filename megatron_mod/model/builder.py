"""Builds the Megatron model of this rank."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_mod.config.lora import LoraSettings
from megatron_mod.model import fp8 as fp8_products
from megatron_mod.model.architecture import Architecture, Mixture, padded_vocab_size
from megatron_mod.model.cost import forward_costs
from megatron_mod.model.layer import RoutedTransformerLayer
from megatron_mod.model.lora import LayerAdapters
from megatron_mod.model.mixture import Gate, MixtureOfExperts
from megatron_mod.model.pipeline import cheapest_layout, megatron_layout
from megatron_mod.model.recompute import SETTINGS
from megatron_mod.model.specs import get_routed_layer_specs
from megatron_mod.model.trainable import ROUTERS, open_parts
from megatron_mod.parallel import device
from megatron_mod.parallel.topology import ONE_RANK, Topology, process_groups
from megatron_mod.routing.config import RoutingConfig
from megatron_mod.routing.router import Router
from megatron_mod.routing.scheme import Place
from megatron_mod.routing.stand_in import StandIn


class _EndOfBackward(torch.autograd.Function):
    """Forward: the output. Backward: the received hidden states get zeros, at no cost."""

    @staticmethod
    def forward(ctx, output: Tensor, received: Tensor) -> Tensor:
        ctx.save_for_backward(received)
        return output.view_as(output)

    @staticmethod
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor, Tensor]:
        return grad_output, torch.zeros_like(ctx.saved_tensors[0])


class RoutedGPTModel(GPTModel):
    """Megatron's ``GPTModel`` whose padded vocabulary entries stay out of the softmax, and whose
    backward pass ends at the first thing that trains.

    ``trains_below``: whether an earlier pipeline stage has anything to train. If not, the
    schedule still gets a gradient to send, but none is computed below this stage's first.

    Args:
        computed: the layers of the whole model that it computes.
        takes_states: its first layer gets hidden states from the caller: there is no embedding.
    """

    def __init__(
        self, *args, unpadded_vocab_size: int, computed: range, takes_states: bool, **kwargs
    ) -> None:
        super().__init__(*args, **kwargs)
        self.unpadded_vocab_size = unpadded_vocab_size
        self.computed = computed
        self.takes_states = takes_states
        self.trains_below = True

    def forward(
        self, *args, with_head: bool = True, decoder_input: Tensor | None = None, **kwargs
    ) -> Tensor:
        """As ``GPTModel``'s; without the head the last stage gives its final hidden states
        ``[S, B, H]`` (``[S / tp, B, H]`` with sequence parallelism). ``decoder_input``, of the same
        shape, is what a model that ``takes_states`` starts from."""
        has_head, received = self.post_process, self.decoder.input_tensor
        self.post_process = has_head and with_head
        try:
            if self.takes_states:
                self.decoder.set_input_tensor(decoder_input)
                return super().forward(*args, **kwargs)
            if self.pre_process or self.trains_below or not torch.is_grad_enabled():
                return super().forward(*args, **kwargs)
            self.decoder.set_input_tensor(received.detach())
            return _EndOfBackward.apply(super().forward(*args, **kwargs), received)
        finally:
            self.post_process = has_head

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Cross entropy ``[B, S]`` of labels ``[B, S]`` under logits ``[S, B, vocab / tp]``."""
        return super().compute_language_model_loss(labels, self.without_padding(logits))

    def without_padding(self, logits: Tensor) -> Tensor:
        """Logits ``[..., vocab / tp]``, changed in place so that no softmax sees the padding."""
        local = logits.shape[-1]
        first = local * self.pg_collection.tp.rank()
        padding = first + local - self.unpadded_vocab_size
        if padding > 0:
            logits[..., max(local - padding, 0) :] = torch.finfo(logits.dtype).min
        return logits

    @property
    def head_weight(self) -> Tensor:
        """``[vocab / tp, H]``, on the last stage."""
        own = self.output_layer.weight  # none where it is tied and the embeddings are here too
        return self.shared_embedding_or_output_weight() if own is None else own

    def head(self, hidden_states: Tensor, weight: Tensor | None = None) -> Tensor:
        """Logits ``[..., vocab / tp]`` of final hidden states ``[..., H]``, on the last stage.

        ``weight``: stands for ``head_weight``.
        """
        weight = self.head_weight if weight is None else weight
        return self.without_padding(F.linear(hidden_states, weight))

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict:
        """As Megatron's; layers may differ, so each has its own keys unless ``metadata`` says
        otherwise."""
        metadata = {"non_homogeneous_layers": True, **(metadata or {})}
        return super().sharded_state_dict(prefix, sharded_offsets, metadata)

    def routed_layers(self) -> dict[int, RoutedTransformerLayer]:
        """This chunk's routed layers by global layer index."""
        return {
            layer.layer_number - 1: layer
            for layer in self.decoder.layers
            if isinstance(layer, RoutedTransformerLayer)
        }


class ModelChunks(torch.nn.ModuleList):
    """This rank's part of the model: one stage, or several with a virtual pipeline."""

    @property
    def config(self) -> TransformerConfig:
        return self[0].config

    def layers(self) -> list[int]:
        """The global indices of the layers that are here, computed or not."""
        return [layer.layer_number - 1 for chunk in self for layer in chunk.decoder.layers]

    @property
    def groups(self) -> ProcessGroupCollection:
        """The process groups this rank shares the model with."""
        return self[0].pg_collection

    @property
    def unpadded_vocab_size(self) -> int:
        return self[0].unpadded_vocab_size

    @property
    def is_whole(self) -> bool:
        """Whether every layer is computed; of a model that is not whole, some stage lacks the
        embedding or the head."""
        return len(self[0].computed) == self.config.num_layers

    @property
    def last(self) -> RoutedGPTModel:
        """The chunk that has the head, on the last stage."""
        chunk = self[-1]
        assert isinstance(chunk, RoutedGPTModel)
        return chunk

    def routed_layers(self) -> dict[int, RoutedTransformerLayer]:
        """This rank's routed layers by global layer index."""
        return {index: layer for chunk in self for index, layer in chunk.routed_layers().items()}

    def gates(self) -> dict[int, Gate]:
        """This rank's gates of mixtures of experts by global layer index."""
        layers = [layer for chunk in self for layer in chunk.decoder.layers]
        mixtures = {layer.layer_number - 1: getattr(layer, "mlp", None) for layer in layers}
        return {k: m.router for k, m in mixtures.items() if isinstance(m, MixtureOfExperts)}

    def adapters(self) -> dict[int, LayerAdapters]:
        """This rank's adapters by global layer index."""
        layers = [layer for chunk in self for layer in chunk.decoder.layers]
        found = {layer.layer_number - 1: getattr(layer, "lora", None) for layer in layers}
        return {index: adapters for index, adapters in found.items() if adapters is not None}

    def routers(self) -> dict[Place, Router]:
        """This rank's routers by their places."""
        layers = self.routed_layers().values()
        return {place: router for layer in layers for place, router in layer.routers.items()}

    def stand_ins(self) -> dict[Place, StandIn]:
        """What stands in for what this rank's routers skip, by their places."""
        layers = self.routed_layers().values()
        return {place: one for layer in layers for place, one in layer.stand_ins.items()}

    def sharded_state_dict(self, *, stacked: bool = False) -> dict:
        """Megatron's sharded state dicts of all chunks, under the keys of ``state_dict``.

        ``stacked``: parameters are parts of tensors that stack all layers, as Megatron-LM may
        write them.
        """
        metadata = {"non_homogeneous_layers": not stacked}
        return {
            f"{number}.{key}": value
            for number, chunk in enumerate(self)
            for key, value in chunk.sharded_state_dict(metadata=metadata).items()
        }


def transformer_config(
    arch: Architecture,
    ranks: Topology = ONE_RANK,
    *,
    dtype: torch.dtype,
    recompute: str = "none",
    fp8: str | None = None,
) -> TransformerConfig:
    """Megatron's configuration of ``arch`` on ranks so laid out.

    ``recompute``: what backward computes again, of ``model/recompute.py``; ``fp8``: the format of
    products, of ``model/fp8.py``.
    """
    virtual_pipeline, layout = ranks.virtual_pipeline, ranks.pipeline_layout
    if ranks.pipeline > 1 and layout is None:
        layout = cheapest_layout(forward_costs(arch), ranks.stages)
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
        qk_layernorm=arch.qk_norm or arch.qk_norm_across_heads,
        window_size=None if arch.window_size is None else (arch.window_size - 1, 0),
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=ranks.tensor,
        pipeline_model_parallel_size=ranks.pipeline,
        pipeline_model_parallel_layout=None if layout is None else megatron_layout(layout),
        virtual_pipeline_model_parallel_size=virtual_pipeline,
        # Megatron's default point-to-point settings give a virtual pipeline of two stages wrong
        # losses and gradients.
        overlap_p2p_comm=virtual_pipeline is not None,
        batch_p2p_comm=virtual_pipeline is None,
        context_parallel_size=ranks.context,
        sequence_parallel=ranks.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        use_cpu_initialization=not device.HAS_GPU,
        perform_initialization=False,
        # Micro-batches are padded to their own longest row, but for the virtual pipeline.
        variable_seq_lengths=virtual_pipeline is None,
        moe_token_dispatcher_type="alltoall",  # asked for with variable lengths, experts or not
        expert_model_parallel_size=ranks.expert,
        **_mixture_settings(arch.mixture),
        # The loss function and the routers each add their exact share of the global
        # batch's gradient, so nothing may divide by micro-batches or ranks.
        calculate_per_token_loss=True,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        **SETTINGS[recompute],
        **fp8_products.settings(fp8),
    )


def _mixture_settings(mixture: Mixture | None) -> dict[str, object]:
    """Megatron's, of gates whose load-balancing loss is ours (``model/balance.py``); its weight is
    here."""
    if mixture is None:
        return {}
    return {
        "num_moe_experts": mixture.num_experts,
        "moe_ffn_hidden_size": mixture.ffn_hidden_size,
        "moe_router_topk": mixture.top_k,
        "moe_router_pre_softmax": not mixture.normalizes_weights,
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": mixture.auxiliary_loss_weight,
        "moe_router_dtype": "fp32",
    }


def build_model(
    arch: Architecture,
    config: TransformerConfig,
    routing: RoutingConfig | None,
    *,
    implementation: str = "local",
    trained: Sequence[str] = (ROUTERS,),
    computed: range | None = None,
    lora: LoraSettings | None = None,
    groups: ProcessGroupCollection | None = None,
) -> ModelChunks:
    """This rank's part of the model on its device, weights not yet loaded; called by all ranks.

    Args:
        implementation: see ``specs.choose_implementation``.
        trained: the parts that train (see ``trainable.py``); all else is frozen.
        computed: the layers that the model computes, all without it. From above the first on it has
            no embedding and starts from the hidden states of its micro-batches; up to below the
            last it has no head and gives hidden states.
        lora: the adapters it has, which add nothing until they are filled.
        groups: the process groups to share it with; without them, ``parallel_state``'s.

    Raises:
        ValueError: degrees that do not divide the model.
    """
    virtual = config.virtual_pipeline_model_parallel_size
    stages = [None] if virtual is None else range(virtual)
    groups = groups or process_groups()
    computed = range(arch.num_layers) if computed is None else computed
    if len(computed) < arch.num_layers:  # only one end may have the embeddings to compare
        groups = copy.copy(groups)
        groups.embd = None
    model = ModelChunks(
        [
            _build_chunk(arch, config, routing, stage, implementation, computed, lora, groups)
            for stage in stages
        ]
    )
    if config.fp8:
        fp8_products.pad_tokens(model)
    _mark_shards(model)
    open_parts(model, trained)
    _tell_what_trains_below(model)
    return model.to(device.device())


def _build_chunk(
    arch: Architecture,
    config: TransformerConfig,
    routing: RoutingConfig | None,
    vp_stage: int | None,
    implementation: str,
    computed: range,
    lora: LoraSettings | None,
    groups: ProcessGroupCollection,
) -> RoutedGPTModel:
    rank, last = groups.pp.rank(), groups.pp.size() - 1
    last_chunk = (config.virtual_pipeline_model_parallel_size or 1) - 1
    is_first = rank == 0 and not vp_stage
    is_last = rank == last and (vp_stage or 0) == last_chunk
    takes_states = is_first and computed.start > 0
    return RoutedGPTModel(
        config=config,
        transformer_layer_spec=get_routed_layer_specs(
            config,
            routing,
            vp_stage=vp_stage,
            pp_rank=rank,
            implementation=implementation,
            computed=computed,
            lora=lora,
            qk_norm_across_heads=arch.qk_norm_across_heads,
        ),
        vocab_size=padded_vocab_size(arch.vocab_size, tensor=config.tensor_model_parallel_size),
        unpadded_vocab_size=arch.vocab_size,
        computed=computed,
        takes_states=takes_states,
        max_sequence_length=arch.max_sequence_length,
        pre_process=is_first and not takes_states,
        post_process=is_last and computed.stop == arch.num_layers,
        share_embeddings_and_output_weights=arch.tied_embeddings,
        position_embedding_type="rope",
        rotary_base=arch.rotary_base,
        rope_scaling=arch.rope_scaling_factor is not None,
        rope_scaling_factor=arch.rope_scaling_factor or 1.0,
        vp_stage=vp_stage,
        pg_collection=groups,
    )


# Along which dim tensor-parallel ranks share a module's weight.
_SHARED = {ColumnParallelLinear: 0, RowParallelLinear: 1, VocabParallelEmbedding: 0}


def _mark_shards(model: ModelChunks) -> None:
    """Say of each weight of which tensor-parallel ranks have a part each that it is one, as
    Megatron does while it initialises it: gradient norms count what is not a part on one rank."""
    for module in model.modules():
        dims = [dim for kind, dim in _SHARED.items() if isinstance(module, kind)]
        weight = getattr(module, "weight", None)  # none where a tied head has no other
        if dims and weight is not None and not hasattr(weight, "tensor_model_parallel"):
            set_tensor_model_parallel_attributes(weight, True, dims[0], stride=1)


def _tell_what_trains_below(model: ModelChunks) -> None:
    """Tell each chunk whether an earlier one, here or on another rank, has anything to train."""
    group = model.groups.pp
    mine = [any(p.requires_grad for p in chunk.parameters()) for chunk in model]
    of_ranks: list = [None] * group.size()
    dist.all_gather_object(of_ranks, mine, group=group)
    in_order = [trains for chunk in zip(*of_ranks, strict=True) for trains in chunk]
    for number, chunk in enumerate(model):
        chunk.trains_below = any(in_order[: number * group.size() + group.rank()])
