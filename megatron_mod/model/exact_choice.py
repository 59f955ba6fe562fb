"""How a routed layer chooses a number of tokens of each document exactly (Mixture-of-Depths)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from megatron_mod.model.layout import TokenLayout
from megatron_mod.routing.auxiliary import choice_loss
from megatron_mod.routing.config import RoutingConfig
from megatron_mod.routing.decision import Decisions
from megatron_mod.routing.exact import draw_lots, top_k
from megatron_mod.routing.scheme import Place
from megatron_mod.routing.selection import Everything, Selection


class ExactChoice:
    """Mixed into the routed layer, whose routers and predictors it asks."""

    if TYPE_CHECKING:  # the layer's
        routing: RoutingConfig
        router: torch.nn.Module
        predictor: torch.nn.Module | None
        pg_collection: Any
        index: int
        _window: int | None
        _own: Any
        _select: Any
        _require_equal_decisions: Any
        logit_border: Any

    def _choose_exactly(
        self, normed: Tensor, layout: TokenLayout, auxiliary: list[Tensor]
    ) -> dict[str, Selection | Everything]:
        """As ``_choose``, of a share of each document's tokens, or by the causal rule; a choice
        multiplies its update by the routers' logits."""
        kept, factors = {}, {}
        for target in self.routing.scheme.targets:
            place, router = Place(self.index, target), self._own(self.router, target)
            factors[target] = router(normed)
            causal = self._causal_logits(place, normed, factors[target], layout)
            is_lot = self.routing.selection == "random"
            chosen = self._exact_choice(place, causal if is_lot else factors[target], layout)
            allowed = (causal >= self._causal_border(place, layout)) & layout.valid
            if layout.step.causal:
                kept[target] = allowed
            else:
                kept[target] = chosen
                if self._learns_choice(place) and causal.requires_grad:
                    loss = choice_loss(causal, chosen, layout.valid)
                    router.causal_loss += loss.detach()
                    auxiliary.append(loss * layout.step.causal_loss_share)
            router.agreed += ((allowed == chosen) & layout.valid).sum()
            made = Decisions(causal.detach(), kept[target].float(), layout.valid)
            layout.decisions[place] = made
            router.note(made, layout.sizes(self._window))
            if layout.step.check_decisions:
                self._require_equal_decisions(kept[target])
        return self._select(kept, factors, layout, known=self._exact_counts(layout))

    def _exact_counts(self, layout: TokenLayout) -> list[list[int]] | None:
        """How many tokens of each document every target keeps, ``[targets][documents]``; ``None``:
        the host does not know."""
        if layout.step.causal or self.pg_collection.cp.size() > 1:
            return None
        return [
            [math.floor(self._share(place, layout) * length + 0.5) for length in layout.lengths]
            for place in self.routing.scheme.places(self.index)
        ]

    def _share(self, place: Place, layout: TokenLayout) -> float:
        """Of a document's tokens, kept by an exact selection."""
        return layout.step.capacities.get(place, self.routing.capacity_of(place))

    def _exact_choice(self, place: Place, scores: Tensor, layout: TokenLayout) -> Tensor:
        """bool ``[S, B]``: the share of each document's tokens with the largest scores."""
        cp = self.pg_collection.cp
        parts: tuple[Tensor, ...] = (
            scores.detach(), layout.document, layout.positions, layout.valid
        )  # fmt: skip
        if cp.size() > 1:  # documents are whole on all ranks together
            parts = tuple(_gathered(part.contiguous(), cp) for part in parts)
        chosen = top_k(
            *parts,
            num_documents=layout.num_documents,
            capacity=self._share(place, layout),
        )
        return chosen.chunk(cp.size())[cp.rank()]

    def _causal_logits(
        self, place: Place, normed: Tensor, logits: Tensor, layout: TokenLayout
    ) -> Tensor:
        """What the causal rule decides by, fp32 ``[S, B]``: logits, or lots."""
        if self.routing.selection == "random":
            return draw_lots(layout.positions, lot=layout.step.lot, layer=self.index)
        if self.predictor is None:
            return logits
        return self._own(self.predictor, place.target)(normed)

    def _learns_choice(self, place: Place) -> bool:
        """Whether what the causal rule decides by is trained on what is chosen."""
        if self.routing.causal is None:
            return False
        teachable = self.router if self.predictor is None else self.predictor
        return any(p.requires_grad for p in self._own(teachable, place.target).parameters())

    def _causal_border(self, place: Place, layout: TokenLayout) -> float:
        """From which on the causal rule keeps a token."""
        if self.routing.selection == "random":
            return 1.0 - self.routing.capacity_of(place)
        return self.logit_border(place, layout)


def _gathered(part: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
    """Context-parallel ranks' parts ``[S, B]``, one after another."""
    if part.dtype == torch.bool:
        return gather_from_sequence_parallel_region(part.byte(), group=group).bool()
    return gather_from_sequence_parallel_region(part, group=group)
