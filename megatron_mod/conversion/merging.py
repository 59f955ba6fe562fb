"""``W + alpha / rank * B A``: weights with their adapters in them, for what knows no adapters."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from megatron_mod.config.lora import LoraSettings
from megatron_mod.conversion.finite import require_finite
from megatron_mod.conversion.peft import Adapters, module_name

if TYPE_CHECKING:
    from megatron_mod.conversion.weights import Weight


def adapted_weights(settings: LoraSettings) -> dict[str, tuple[int, str]]:
    """The weights that have adapters, by Hugging Face's names; layer and projection of each."""
    return {
        f"{module_name(layer, target)}.weight": (layer, target)
        for layer in settings.layers
        for target in settings.targets
    }


def merged(weights: Iterable[Weight], settings: LoraSettings, adapters: Adapters) -> list[Weight]:
    """Weights of which the adapted ones are read as ``W + alpha / rank * B A``, in fp32 whatever
    dtype they are to be."""
    own = adapted_weights(settings)

    def read(weight: Weight) -> Tensor:
        layer, target = own[weight.name]
        whole = _added(weight.read(), adapters[layer], target, settings)
        require_finite(whole, weight.name, where="the adapters' sum with it")
        return whole

    return [w._replace(read=partial(read, w)) if w.name in own else w for w in weights]


@torch.no_grad()
def add_to(model: nn.Module, settings: LoraSettings, adapters: Adapters) -> None:
    """Add adapters to the weights of a Hugging Face model, in fp32 and then in their dtype."""
    for name, (layer, target) in adapted_weights(settings).items():
        weight = model.get_parameter(name)
        weight.copy_(_added(weight, adapters[layer], target, settings))


def _added(weight: Tensor, own: dict[str, Tensor], target: str, settings: LoraSettings) -> Tensor:
    a, b = (own[f"{target}.{matrix}"].to(weight.device) for matrix in "ab")
    return torch.addmm(weight.float(), b, a, alpha=settings.scale)
