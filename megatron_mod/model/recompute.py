"""Activations that backward computes again instead of having them kept.

The layers do it themselves, through torch's checkpoint: Megatron's own finds a gradient only where
the input of what it wraps has one, and nothing below a frozen model's first router has, so that its
first layers would train nothing, without a word. A router decides outside of what is computed
again: it notes, waits for the device and talks to other ranks once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor
from torch.utils.checkpoint import checkpoint

T = TypeVar("T")

# What ``train.recompute`` sets in Megatron's configuration.
SETTINGS: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["mlp"]},
    # Of none of a stage's layers by Megatron's own checkpoint.
    "full": {
        "recompute_granularity": "full",
        "recompute_method": "block",
        "recompute_num_layers": 0,
    },
}


def whole_layers(config: TransformerConfig) -> bool:
    """Whether layers are to keep their input and nothing else.

    Raises:
        ValueError: Megatron would do it, around them.
    """
    if config.recompute_granularity != "full":
        return False
    if config.recompute_method != "block" or config.recompute_num_layers != 0:
        raise ValueError(
            f"recompute_method = {config.recompute_method!r} and recompute_num_layers = "
            f"{config.recompute_num_layers}: Megatron's checkpoint gives no gradient to a router "
            "above frozen layers and would ask each twice; set 'block' and 0: these layers do it "
            "themselves."
        )
    return True


def feed_forwards(config: TransformerConfig) -> bool:
    """Whether an MLP is to keep its input and nothing else."""
    return config.recompute_granularity == "selective" and "mlp" in config.recompute_modules


def again(function: Callable[..., T], *args: object, **kwargs: object) -> T:
    """``function``'s result, of which backward keeps the arguments and nothing else."""
    if not torch.is_grad_enabled():
        return function(*args, **kwargs)
    return checkpoint(partial(function, **kwargs), *args, use_reentrant=False)


class DenseTransformerLayer(TransformerLayer):
    """Megatron's layer, which may compute all of itself again."""

    def __init__(self, config: TransformerConfig, *args: object, **kwargs: object) -> None:
        super().__init__(config, *args, **kwargs)
        self.recomputes = whole_layers(config)

    def forward(
        self, hidden_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor | None]:
        """As Megatron's."""
        forward = super().forward
        if self.recomputes and hidden_states.requires_grad:
            return again(forward, hidden_states, *args, **kwargs)
        return forward(hidden_states, *args, **kwargs)
