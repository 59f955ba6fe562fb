"""The mixture of experts that stands in a layer where other models have one MLP."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar, TypeAlias

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
from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_mod.model import recompute
from megatron_mod.model.balance import Balance, imbalance, noted_beside
from megatron_mod.parallel.topology import process_groups
from megatron_mod.routing.noop_gate import NoopGate

# Which pairs of tokens and experts count, and how much, ``[..., experts]``: from the gate's weights
# and its choice, a bool, to others.
Pairs: TypeAlias = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Gate(TopKRouter):
    """The model's own choice of experts for each token, which Megatron calls a router: it belongs
    to the base, as the experts do, and has nothing to do with the routers that this package adds.

    Its logits are in the model's dtype and all that follows on them in float32, as Hugging Face's
    models have it.

    ``balance`` is what its load-balancing loss has come to in training, unsaved: the loss times
    the tokens that it is of, and these tokens. Of ranks that have copies of the tokens each notes
    a part, so that all ranks' together are the whole.
    """

    def __init__(
        self, config: TransformerConfig, pg_collection: Groups | None = None, **more: Any
    ) -> None:
        super().__init__(config, pg_collection, **more)
        shared = config.sequence_parallel  # the tokens, by tensor-parallel ranks too
        self.token_group = self.tp_cp_group if shared else self.cp_group
        self.copies = 1 if shared else self.tp_group.size()
        self.register_buffer("balance", torch.zeros(2, dtype=torch.float32), persistent=False)

    def gating(self, input: Tensor, noops: NoopGate | None = None) -> Tensor:
        """Logits ``[..., experts]`` of ``[..., H]``, followed by those of no-ops, if there are."""
        logits = F.linear(input, self.weight)
        if noops is not None:
            logits = torch.cat((logits, noops(input)), -1)
        return logits.float()

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Weights and choice ``[N, E]`` of as many logits, by Megatron's rule."""
        return topk_routing_with_score_function(
            logits, self.topk, use_pre_softmax=self.config.moe_router_pre_softmax
        )

    def balanced(
        self, output: Tensor, logits: Tensor, chosen: Tensor, balance: Balance | None
    ) -> Tensor:
        """The output, behind which there is the load-balancing loss of a choice ``[N, E]``, if it
        is asked for and the gate trains."""
        trains = self.training and self.weight.requires_grad and torch.is_grad_enabled()
        if balance is None or not trains:
            return output
        valid = None if balance.valid is None else balance.valid.flatten()
        loss, tokens = imbalance(logits, chosen, valid, top_k=self.topk, group=self.token_group)
        found = torch.stack((loss.detach(), tokens / self.token_group.size())) / self.copies
        return noted_beside(output, loss, share=balance.share, found=found, noted=self.balance)


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

    On a CPU it finds its numbers where it looks for them. ``sends_fewer``: whether the next tokens
    may go to fewer experts than the gate chooses, so that their number has to be counted.
    """

    sends_fewer = False

    def __init__(self, experts: Sequence[int], config: TransformerConfig, groups: Groups) -> None:
        own = copy.copy(groups)
        own.expt_tp, own.tp_ep = None, groups.ep
        super().__init__(len(experts), list(experts), config=config, pg_collection=own)

    def preprocess(self, routing_map: Tensor) -> Tensor:
        """As Megatron's, which makes arrays of what it brings from a GPU to the host, and of
        nothing that is there already."""
        counts = super().preprocess(routing_map)
        if self.sends_fewer:  # as Megatron's does where it drops tokens
            self.num_out_tokens = routing_map.sum()
            self._maybe_update_cuda_sync_point("before_permutation_1")
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
    balance: Balance | None = None  # of the next call, where Megatron's layer makes it

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
        self,
        hidden_states: Tensor,
        *,
        pairs: Pairs | None = None,
        noops: NoopGate | None = None,
        balance: Balance | None = None,
        **unused: object,
    ) -> tuple[Tensor, None]:
        """What the experts make of ``[S, B, H]``.

        Args:
            pairs: is shown the gate's weights ``[S, B, experts]`` and its choice, and says which
                count instead: what is not chosen is neither sent nor computed. Backward asks again
                where activations are computed again.
            noops: experts that return nothing, among which the gate chooses too; ``pairs`` is shown
                them behind the others, and leaves them out.
            balance: of the gate's load-balancing loss, if it trains; without, ``self.balance``.
        """
        balance = balance or self.balance
        if self.recomputes and hidden_states.requires_grad:
            return recompute.again(self._output, hidden_states, pairs, noops, balance), None
        return self._output(hidden_states, pairs, noops, balance), None

    def _output(
        self,
        hidden_states: Tensor,
        pairs: Pairs | None,
        noops: NoopGate | None,
        balance: Balance | None,
    ) -> Tensor:
        tokens, gate = hidden_states.flatten(0, -2), self.router
        logits = gate.gating(tokens, noops)
        weights, chosen = gate.routing(logits)
        made = chosen
        self.token_dispatcher.sends_fewer = pairs is not None
        if pairs is not None:
            shape = (*hidden_states.shape[:-1], weights.shape[-1])
            weights, chosen = pairs(weights.view(shape), chosen.view(shape))
            weights, chosen = weights.flatten(0, -2), chosen.flatten(0, -2)
        output = self._over_ranks(tokens, weights, chosen)
        return gate.balanced(output, logits, made, balance).view_as(hidden_states)

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
