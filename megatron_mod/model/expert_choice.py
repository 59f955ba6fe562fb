"""How a routed layer chooses which of the experts that a token is sent to compute it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from megatron_mod.model.layout import TokenLayout
from megatron_mod.routing.config import RoutingConfig
from megatron_mod.routing.expert_router import ExpertRouter, weighed
from megatron_mod.routing.scheme import EXPERT, Place


class ExpertChoice:
    """Mixed into the routed layer, whose router it asks.

    The router is asked when the layer is entered, and what it says is used once the model's gate
    has sent tokens to experts: a pair of token and expert is a unit if the gate made it.
    """

    if TYPE_CHECKING:  # the layer's
        routing: RoutingConfig
        router: Any
        pg_collection: Any
        training: bool
        index: int
        _window: int | None
        _mask: Any
        _require_equal_decisions: Any

    def _ask_experts(self, normed: Tensor, layout: TokenLayout) -> Tensor | None:
        """Logits ``[S, B, experts]`` of normed hidden states ``[S, B, H]``; ``None`` where experts
        are not routed, or not asked about."""
        if layout.step.dense or not self.routing.scheme.per_expert or self.router is None:
            return None
        return self.router(normed)

    def _choose_experts(
        self, logits: Tensor, layout: TokenLayout, weights: Tensor, sent: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What the gate's weights and its choice, ``[S, B, experts]``, become; see
        ``MixtureOfExperts.forward``. It may be asked twice, and takes note of nothing."""
        mask = self._mask(self._place, logits, sent & layout.valid[..., None], layout)
        if layout.step.check_decisions:
            self._require_equal_decisions(mask.detach().bool())
        if not (self.training and self.routing.training_compute == "dense"):
            sent = mask.detach().bool()
            mask = mask * sent  # what is not computed hears nothing of the others' weights
        return weighed(weights, mask, renormalize=self.routing.renormalize), sent

    def _note_experts(self, normed: Tensor, layout: TokenLayout) -> None:
        """Have the router take note of what was chosen, by what it read."""
        router: ExpertRouter = self.router
        made, sizes = layout.decisions[self._place], layout.sizes(self._window)
        router.note(made, sizes)
        if every := router.notes_every:
            places = layout.every(every, context_rank=self.pg_collection.cp.rank())
            tokens, valid = (grid.flatten(0, 1)[places] for grid in (normed, made.valid))
            router.note_inputs(tokens, valid, sizes.flatten(1)[:, places])

    @property
    def _place(self) -> Place:
        return Place(self.index, EXPERT)
