"""OLMoE of Transformers 4.57, which hands nothing on to its layers that it does not know."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .layer_mod import RoutingCall


class OldOlmoeModel:
    """Mixed in before its model."""

    def forward(self, *, routing: RoutingCall, **kwargs: Any) -> Any:
        for layer in self.layers:
            layer.routing = routing
        return super().forward(**kwargs)


class OldOlmoeLayer:
    """Mixed in before its routed layer."""

    returns_tuple = True

    def forward(self, hidden_states: Tensor, **context: Any) -> tuple[Tensor]:
        del context["output_router_logits"]  # which its attention does not take
        return (super().forward(hidden_states, routing=self.routing, **context),)


class OldOlmoeCausalLM:
    """Mixed in before its language model, whose ``__call__`` takes what ``forward`` does not: of
    that, generation reads the signature."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        own = {name: kwargs.pop(name) for name in ("routing_mask", "borders") if name in kwargs}
        hook = self.model.register_forward_pre_hook(
            lambda _, args, kwargs: (args, {**kwargs, **own}), with_kwargs=True
        )
        try:
            return super().__call__(*args, **kwargs)
        finally:
            hook.remove()
