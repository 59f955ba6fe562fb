"""Activations that backward computes again instead of having them kept.

The layers do it themselves, through torch's checkpoint: Megatron's own finds a gradient only where
the input of what it wraps has one, and nothing below a frozen model's first router has, so that its
first layers would train nothing, without a word. A router decides outside of what is computed
again: it notes, waits for the device and talks to other ranks once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, ClassVar, TypeVar

import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_mod.config.lora import LoraSettings
from megatron_mod.model.balance import Balance
from megatron_mod.model.layout import TokenLayout
from megatron_mod.model.lora import LayerAdapters
from megatron_mod.model.trainable import LORA

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
    return checkpoint(
        partial(function, **kwargs), *args, use_reentrant=False, context_fn=_same_random_numbers
    )


def _same_random_numbers() -> tuple[AbstractContextManager, AbstractContextManager]:
    """What is computed first, and again, with the same states of Megatron's random numbers; those
    of torch's own are torch's to repeat."""
    tracker = get_cuda_rng_tracker()
    before = tracker.get_states()

    @contextlib.contextmanager
    def again() -> Iterator[None]:
        now = tracker.get_states()
        tracker.set_states(dict(before))
        try:
            yield
        finally:
            tracker.set_states(now)

    return contextlib.nullcontext(), again()


class DenseTransformerLayer(TransformerLayer):
    """Megatron's layer, which may compute all of itself again, and have adapters."""

    adds: ClassVar[dict[str, str]] = {"lora": LORA}

    def __init__(
        self,
        config: TransformerConfig,
        *args: object,
        lora: LoraSettings | None = None,
        **kwargs: object,
    ) -> None:
        super().__init__(config, *args, **kwargs)
        self.recomputes = whole_layers(config)
        self.recomputes_mlp = feed_forwards(config)
        if isinstance(self.mlp, MoELayer):  # of which Megatron would recompute nothing
            self.mlp.recomputes = self.recomputes_mlp
        self.lora = None if lora is None else LayerAdapters(self, lora)

    def forward(
        self, hidden_states: Tensor, *args: object, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """As Megatron's."""
        forward = self._forward
        trains = self.lora is not None and self.lora.trains
        if self.recomputes and (trains or hidden_states.requires_grad):
            return again(forward, hidden_states, *args, **kwargs)
        if self.recomputes_mlp and trains and torch.is_grad_enabled():
            # Megatron's own checkpoint of an MLP trains nothing in it unless its input asks for a
            # gradient.
            hidden_states = _asking(hidden_states)
        return forward(hidden_states, *args, **kwargs)

    def _forward(
        self,
        hidden_states: Tensor,
        *args: object,
        packed_seq_params: TokenLayout | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if isinstance(self.mlp, MoELayer):
            parts = self.pg_collection.tp if self.config.sequence_parallel else None
            self.mlp.balance = Balance.of(packed_seq_params, sequence_group=parts)
        return super().forward(hidden_states, *args, packed_seq_params=packed_seq_params, **kwargs)


def _asking(hidden_states: Tensor) -> Tensor:
    """The same, with a gradient wanted."""
    return hidden_states if hidden_states.requires_grad else hidden_states.detach().requires_grad_()
