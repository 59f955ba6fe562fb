"""How a routed layer's gate chooses among experts that return nothing too (integrated MoDE)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron_mod.model.layout import TokenLayout
from megatron_mod.routing.decision import Decisions
from megatron_mod.routing.noop_gate import NoopGate
from megatron_mod.routing.scheme import EXPERT, Place


class NoopChoice:
    """Mixed into the routed layer; a unit is a pair of a valid token and an expert of either kind
    that the gate sends it to."""

    if TYPE_CHECKING:  # the layer's
        noop_gate: NoopGate | None
        config: Any
        index: int
        _window: int | None

    def _leave_noops(
        self, layout: TokenLayout, weights: Tensor, sent: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Of a gate's weights and its choice ``[S, B, E + n]`` those about the ``E`` experts that
        compute something; as ``MixtureOfExperts.forward`` asks."""
        experts = self.config.num_moe_experts
        computes = torch.arange(sent.shape[-1], device=sent.device) < experts
        valid = sent & layout.valid[..., None]
        # Of which no threshold is asked: the sign says what computes something.
        logits = torch.where(computes, 1.0, -1.0).expand_as(weights)
        place = Place(self.index, EXPERT)
        layout.decisions[place] = Decisions(logits, (valid & computes).float(), valid)
        return weights[..., :experts], sent[..., :experts]

    def _note_noops(self, layout: TokenLayout) -> None:
        """Have the gate's no-ops take note of what was chosen."""
        assert self.noop_gate is not None
        made = layout.decisions[Place(self.index, EXPERT)]
        self.noop_gate.note(made, layout.sizes(self._window))
