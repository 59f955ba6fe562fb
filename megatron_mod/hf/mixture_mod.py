"""Layers that are mixtures of experts: of the pairs of token and expert, only what is asked for.

The experts are modules of their own, as Transformers 4.57 has them and as checkpoints name their
tensors; later releases hold a layer's in one tensor each, which such a folder does not have.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from .configuration_mod import RoutedConfig
from .layer_mod import RoutedLayer, Router, RoutingCall


@dataclass(frozen=True)
class MixtureNames:
    """What a family's checkpoints call a layer's mixture, and an expert's gate, up and down
    projections; ``size``: the configuration's entry for an expert's channels."""

    mixture: str = "mlp"
    projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    size: str = "intermediate_size"


class Expert(nn.Module):
    """A gated MLP."""

    def __init__(self, config: RoutedConfig, names: MixtureNames) -> None:
        super().__init__()
        hidden, size = config.hidden_size, getattr(config, names.size)
        self.names, self.activation = names.projections, ACT2FN[config.hidden_act]
        gate, up, down = self.names
        self.add_module(gate, nn.Linear(hidden, size, bias=False))
        self.add_module(up, nn.Linear(hidden, size, bias=False))
        self.add_module(down, nn.Linear(size, hidden, bias=False))

    def forward(self, hidden_states: Tensor) -> Tensor:
        """``[N, H]`` to the same."""
        gate, up, down = (getattr(self, name) for name in self.names)
        return down(self.activation(gate(hidden_states)) * up(hidden_states))


class Mixture(nn.Module):
    """``y = sum over the chosen experts e of g_e * F_e(x)``, with the family's own gate."""

    def __init__(self, config: RoutedConfig, names: MixtureNames) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.normalizes = getattr(config, "norm_topk_prob", True)  # Mixtral always does
        self.gate = nn.Linear(config.hidden_size, config.experts, bias=False)
        self.experts = nn.ModuleList(Expert(config, names) for _ in range(config.experts))

    def forward(self, hidden_states: Tensor) -> Tensor:
        """``[..., H]`` to the same."""
        tokens = hidden_states.flatten(0, -2)
        return self.compute(tokens, *self.choose(tokens)).view_as(hidden_states)

    def choose(self, tokens: Tensor, noop_gate: nn.Module | None = None) -> tuple[Tensor, Tensor]:
        """The experts of each of the tokens ``[N, H]`` and their weights, both ``[N, top_k]``;
        from the number of experts on, what ``noop_gate`` has rows for."""
        logits = self.gate(tokens)
        if noop_gate is not None:
            logits = torch.cat([logits, noop_gate(tokens)], -1)
        weights, experts = logits.softmax(-1, dtype=torch.float).topk(self.top_k, dim=-1)
        if self.normalizes:
            weights = weights / weights.sum(-1, keepdim=True)
        return experts, weights

    def compute(
        self, tokens: Tensor, experts: Tensor, weights: Tensor, keep: Tensor | None = None
    ) -> Tensor:
        """``[N, H]``: for each of the tokens ``[N, H]`` the sum over its experts; of the pairs
        ``[N, top_k]`` those to ``keep`` alone (None: all) are gathered and computed."""
        others = len(self.experts)  # where pairs end up that no expert computes
        owner = experts if keep is None else experts.masked_fill(~keep, others)
        owner = owner.flatten()
        order = owner.argsort(stable=True)
        counts = owner.new_zeros(others + 1).scatter_add_(0, owner, torch.ones_like(owner))
        *numbers, _ = counts.tolist()  # for which alone the host waits
        rows, weights = order // self.top_k, weights.to(tokens.dtype).flatten()[order, None]
        update, first = torch.zeros_like(tokens), 0
        for expert, count in zip(self.experts, numbers, strict=True):
            if count:
                own = slice(first, first + count)
                update.index_add_(0, rows[own], weights[own] * expert(tokens[rows[own]]))
                first += count
        return update


class RoutedMixtureLayer(RoutedLayer):
    """Mixed into the decoder layer of a family of mixtures, whose experts it makes its own."""

    names: MixtureNames
    input_layernorm: nn.Module  # the family's, as what follows
    self_attn: nn.Module
    post_attention_layernorm: nn.Module

    def __init__(self, config: RoutedConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        for name in ("mlp", "block_sparse_moe"):  # Mixtral's by the release
            if hasattr(self, name):
                delattr(self, name)
        setattr(self, self.names.mixture, Mixture(config, self.names))
        self.by_expert = layer_idx in config.routing["layers"] and "expert" in config.targets
        self.renormalize = config.routing.get("renormalize", False)
        noops = config.routing.get("num_noop_experts") if self.by_expert else None
        self.noop_gate = nn.Linear(config.hidden_size, noops, bias=False) if noops else None
        self.choices = config.experts + (noops or 0)

    def _make_router(self, config: RoutedConfig) -> Router | None:
        if "expert" not in config.targets:
            return super()._make_router(config)
        if config.routing.get("num_noop_experts"):
            return None
        bias = config.routing.get("bias", False)
        return Router(config.hidden_size, bias, experts=config.experts)

    @property
    def mixture(self) -> Mixture:
        return getattr(self, self.names.mixture)

    def forward(self, hidden_states: Tensor, *, routing: RoutingCall, **context: Any) -> Tensor:
        """``[B, S, H]`` to the same; ``context`` is what the family's layer takes."""
        if self.by_expert:
            return self._by_expert(hidden_states, routing, context)
        return super().forward(hidden_states, routing=routing, **context)

    def _unrouted(self, hidden_states: Tensor, context: dict[str, Any]) -> Tensor:
        normed = self.input_layernorm(hidden_states)
        return self._mlp(hidden_states + self.self_attn(hidden_states=normed, **context)[0])

    def _mlp_update(self, hidden_states: Tensor) -> Tensor:
        return self.mixture(self.post_attention_layernorm(hidden_states))

    def _by_expert(
        self, hidden_states: Tensor, routing: RoutingCall, context: dict[str, Any]
    ) -> Tensor:
        batch, length, _ = hidden_states.shape
        normed = self.input_layernorm(hidden_states)
        hidden_states = hidden_states + self.self_attn(hidden_states=normed, **context)[0]
        tokens = self.post_attention_layernorm(hidden_states).flatten(0, 1)
        experts, weights = self.mixture.choose(tokens, self.noop_gate)
        pairs = experts.view(batch, length, -1)
        valid = routing.valid(length)
        valid = torch.ones_like(pairs[..., 0], dtype=torch.bool) if valid is None else valid
        if self.router is None:
            keep = (pairs < len(self.mixture.experts)) & valid[..., None]
        else:
            logits = self.router(normed).gather(-1, pairs)
            keep = self._tokens_to_keep("expert", logits, routing)
        routing.decisions[self.layer_idx, "expert"] = keep
        counted = torch.stack([valid[..., None].expand_as(keep), keep]).flatten(1).long()
        routing.experts[self.layer_idx] = counted.new_zeros(2, self.choices).scatter_add_(
            1, experts.flatten().expand_as(counted), counted
        )
        keep = keep.view_as(experts)
        if self.renormalize:
            left = (weights * keep).sum(-1, keepdim=True)
            weights = weights * torch.where(left > 0, weights.sum(-1, keepdim=True) / left, 1.0)
        update = self.mixture.compute(tokens, experts, weights, keep)
        return hidden_states + update.view_as(hidden_states)


class GateLogits:
    """Mixed into a model of mixtures before ``RoutedModel``: what its gates said, when asked."""

    config: RoutedConfig
    layers: Iterable[RoutedMixtureLayer]

    def forward(self, *args: Any, output_router_logits: bool | None = None, **kwargs: Any) -> Any:
        """As the model's; ``output_router_logits`` as the families mean it."""
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        with self._gates(output_router_logits) as found:
            kwargs["output_router_logits"] = False  # they would be the family's modules'
            output = super().forward(*args, **kwargs)  # type: ignore[misc]
        if output_router_logits and isinstance(output, tuple):
            return *output, tuple(found)
        if output_router_logits:
            output["router_logits"] = tuple(found)
        return output

    @contextmanager
    def _gates(self, wanted: bool) -> Iterator[list[Tensor]]:
        """Collects the gates' logits ``[B * S, E]``, layer by layer, of a call in the block.

        Raises:
            ValueError: not every token comes to every gate, or gates have more rows than experts.
        """
        found: list[Tensor] = []
        if wanted:
            self._refuse_router_logits()
        hooks = [
            layer.mixture.gate.register_forward_hook(lambda _, __, logits: found.append(logits))
            for layer in self.layers
            if wanted
        ]
        try:
            yield found
        finally:
            for hook in hooks:
                hook.remove()

    def _refuse_router_logits(self) -> None:
        routing = self.config.routing
        if not routing["layers"]:
            return
        reason = None
        if {"mlp", "block"}.intersection(self.config.targets):
            reason = f"with granularity {routing['granularity']!r} what is skipped meets no gate"
        elif routing.get("num_noop_experts"):
            reason = "the gates of routed layers choose among no-op experts too"
        if reason:
            raise ValueError(
                f"output_router_logits: {reason}, so that the family's load-balancing loss has no "
                "meaning; pass output_router_logits=False."
            )
