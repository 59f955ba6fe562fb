"""How far down a backward pass goes: to the first layer with something that trains, and in it to
the lowest of that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from megatron_mod.config.lora import TARGETS, LoraSettings
from megatron_mod.routing.config import RoutingConfig

# Places in a layer, in the order in which they are computed: what is below it, its linears, a
# router's mask on its attention, and one on what comes out of it.
BELOW, QKV, PROJ, MASK, FC1, FC2, END = -1, 0, 1, 2, 3, 4, 5
PLACES = {"linear_qkv": QKV, "linear_proj": PROJ, "linear_fc1": FC1, "linear_fc2": FC2}


@dataclass(frozen=True)
class Reach:
    """Of a training of ``parts`` (``train.trainable``) of a model with such routers and adapters.

    ``recompute``: see ``model/recompute.py``.
    """

    routing: RoutingConfig
    lora: LoraSettings | None = None
    parts: Sequence[str] = ("routers",)
    recompute: str = "none"

    @property
    def trains_base(self) -> bool:
        """Whether weights train, embeddings too: the pass then goes below the first layer."""
        return "base" in self.parts

    @cached_property
    def first(self) -> int:
        """The first layer with something that trains, or one below all of them that does."""
        return -1 if self.trains_base else min((*self._routed, *self._adapted))

    def adapts(self, layer: int) -> bool:
        """Whether a layer has adapters that train."""
        return layer in self._adapted

    def routes(self, layer: int) -> bool:
        """Whether a layer has a router that trains."""
        return layer in self._routed

    def down_to(self, layer: int) -> int | None:
        """The place in a layer to which the backward pass goes, ``BELOW`` where it goes on to the
        layer before; ``None``: it does not come to this one."""
        if layer != self.first:
            return BELOW if layer > self.first else None
        is_dense = layer not in self.routing.layers
        if self.recompute == "selective" and self.adapts(layer) and is_dense:
            return BELOW  # Megatron's own checkpoint of an MLP asks for it
        found = []
        if self.routes(layer):
            found.append(self._mask)
        if self.adapts(layer) and self.lora is not None:
            found += [PLACES[TARGETS[target]] for target in self.lora.targets]
        return min(found)

    def computes_mlp_again(self, layer: int) -> bool:
        """Whether it does so by itself, with ``selective``."""
        down_to = self.down_to(layer)
        if self.recompute != "selective" or down_to is None:
            return False
        by_expert = self.routes(layer) and self.routing.scheme.per_expert
        return down_to < FC1 or self.adapts(layer) or by_expert

    @property
    def _mask(self) -> int:
        """Where a router's mask enters; an expert's weighs what its second linear reads."""
        scheme = self.routing.scheme
        if scheme.per_expert:
            return FC1
        return MASK if "attn" in scheme.targets else END

    @property
    def _routed(self) -> tuple[int, ...]:
        return self.routing.layers if "routers" in self.parts else ()

    @property
    def _adapted(self) -> tuple[int, ...]:
        return self.lora.layers if self.lora is not None and "lora" in self.parts else ()
