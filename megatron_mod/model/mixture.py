"""The mixture of experts that stands in a layer where other models have one MLP."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import ClassVar, TypeAlias

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.process_groups_config import ProcessGroupCollection as Groups
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_mod.model import recompute
from megatron_mod.parallel.topology import process_groups

# Which pairs of tokens and experts count, and how much, ``[..., experts]``: from the gate's weights
# and its choice, a bool, to others.
Pairs: TypeAlias = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Gate(TopKRouter):
    """The model's own choice of experts for each token, which Megatron calls a router: it belongs
    to the base, as the experts do, and has nothing to do with the routers that this package adds.

    Its logits are in the model's dtype and all that follows on them in float32, as Hugging Face's
    models have it.
    """

    def gating(self, input: Tensor) -> Tensor:
        """Logits ``[..., experts]`` of ``[..., H]``."""
        return F.linear(input, self.weight).float()


class Experts(SequentialMLP):
    """This rank's experts, one after the other; in checkpoints each has keys of its own."""

    linears: ClassVar = LocalSpecProvider()

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        *,
        pg_collection: Groups,
        **unused: object,
    ) -> None:
        expert = MLPSubmodules(
            linear_fc1=self.linears.column_parallel_linear(),
            linear_fc2=self.linears.row_parallel_linear(),
        )
        super().__init__(num_local_experts, config, expert, pg_collection=pg_collection)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict:
        """As Megatron's, of whole experts by their numbers among those of all ranks: no tensor
        holds all of them."""
        state, first = {}, self.ep_group.rank() * self.num_local_experts
        for number, expert in enumerate(self.local_experts):
            local, name = f"{prefix}local_experts.{number}.", f"{prefix}experts.{first + number}."
            entries = expert.sharded_state_dict(local, sharded_offsets, metadata)
            replace_prefix_for_sharding(entries, local, name)
            for entry in entries.values():
                entry.replica_id = (*entry.replica_id[:2], self.dp_group.rank())
            state.update(entries)
        return state


class Dispatcher(MoEAlltoAllTokenDispatcher):
    """Megatron's, between ranks that share the experts: tensor-parallel ranks, of which each has a
    part of an expert's channels, all send the same tokens.

    On a CPU it finds its numbers where it looks for them.
    """

    def __init__(self, experts: Sequence[int], config: TransformerConfig, groups: Groups) -> None:
        own = copy.copy(groups)
        own.expt_tp, own.tp_ep = None, groups.ep
        super().__init__(len(experts), list(experts), config=config, pg_collection=own)

    def preprocess(self, routing_map: Tensor) -> Tensor:
        """As Megatron's, which makes arrays of what it brings from a GPU to the host, and of
        nothing that is there already."""
        counts = super().preprocess(routing_map)
        if not routing_map.is_cuda:
            for name in ("input_splits", "output_splits", "output_splits_tp"):
                value = getattr(self, name)
                if isinstance(value, Tensor):
                    setattr(self, name, value.numpy())
        return counts


class _LaidOut(torch.autograd.Function):
    """Forward: the tensor. Backward: its gradient, contiguous, which Megatron's sum over ranks
    takes for granted: of another it sums a copy."""

    @staticmethod
    def forward(ctx, tensor: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad.contiguous()


class MixtureOfExperts(MoELayer):
    """``y = sum over the chosen experts e of g_e * F_e(x)``, ``g`` and the choice its gate's.

    Every rank that shares the experts must enter it, with no tokens too, and its backward pass: the
    others wait in it.
    """

    experts_type: ClassVar[type[Experts]] = Experts
    recomputes = False  # a layer that does not see to it sets it: its input is all that is kept

    def __init__(
        self,
        config: TransformerConfig,
        *,
        pg_collection: Groups | None = None,
        **unused: object,
    ) -> None:
        groups = pg_collection or process_groups()
        submodules = MoESubmodules(experts=self.experts_type, router=Gate)
        super().__init__(config=config, submodules=submodules, pg_collection=groups)
        self.token_dispatcher = Dispatcher(self.local_expert_indices, config, groups)

    def forward(
        self, hidden_states: Tensor, *, pairs: Pairs | None = None, **unused: object
    ) -> tuple[Tensor, None]:
        """What the experts make of ``[S, B, H]``.

        Args:
            pairs: is shown the gate's weights ``[S, B, experts]`` and its choice, and says which
                count instead: what is not chosen is neither sent nor computed. Backward asks again
                where activations are computed again.
        """
        if self.recomputes and hidden_states.requires_grad:
            return recompute.again(self._output, hidden_states, pairs), None
        return self._output(hidden_states, pairs), None

    def _output(self, hidden_states: Tensor, pairs: Pairs | None) -> Tensor:
        tokens = hidden_states.flatten(0, -2)
        weights, chosen = self.router(tokens)
        if pairs is not None:
            shape = (*hidden_states.shape[:-1], weights.shape[-1])
            weights, chosen = pairs(weights.view(shape), chosen.view(shape))
            weights, chosen = weights.flatten(0, -2), chosen.flatten(0, -2)
        return self._over_ranks(tokens, weights, chosen).view_as(hidden_states)

    def _mix(self, tokens: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """What this tensor-parallel rank's channels make of tokens, ``[N, H]``, with weights and a
        choice ``[N, experts]``."""
        dispatcher = self.token_dispatcher
        sent, weights = dispatcher.dispatch_preprocess(tokens, chosen, weights)
        received, weights = dispatcher.token_dispatch(sent, weights)
        received, counts, weights = dispatcher.dispatch_postprocess(received, weights)
        output, bias = self.experts(received, counts, weights)
        assert bias is None, bias
        output = dispatcher.token_combine(dispatcher.combine_preprocess(output))
        return dispatcher.combine_postprocess(output)

    def _over_ranks(self, tokens: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """``_mix`` of all channels, added up by tensor-parallel ranks, which hold the same tokens,
        or with sequence parallelism each its own."""
        group = self.tp_group
        if group.size() == 1:
            return self._mix(tokens, weights, chosen)
        if self.config.sequence_parallel:
            gather = partial(gather_from_sequence_parallel_region, group=group)
            whole = self._mix(gather(tokens), gather(weights), gather(chosen.byte()).bool())
            return reduce_scatter_to_sequence_parallel_region(whole, group=group)
        copied = partial(copy_to_tensor_model_parallel_region, group=group)
        whole = self._mix(copied(tokens), _LaidOut.apply(copied(weights)), chosen)
        return reduce_from_tensor_model_parallel_region(whole, group=group)
