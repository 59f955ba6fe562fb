"""The baseline a router must beat: what it routes removed for good from the least important
layers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from megatron_mod.data.chat import Sample


@contextlib.contextmanager
def without(model, layers: Iterable[int], *, target: str) -> Iterator[None]:
    """The block's dense Hugging Face model adds nothing for the ``target`` of ``layers``: their
    ``attn``, their ``mlp``, or the whole ``block``."""

    def zero(module: object, inputs: object, output: Tensor | tuple) -> Tensor | tuple:
        if isinstance(output, tuple):
            return (torch.zeros_like(output[0]), *output[1:])
        return torch.zeros_like(output)

    def unchanged(module: object, inputs: tuple, output: Tensor) -> Tensor:
        return inputs[0]

    def hook(layer: torch.nn.Module) -> object:
        if target == "block":
            return layer.register_forward_hook(unchanged)
        return (layer.self_attn if target == "attn" else layer.mlp).register_forward_hook(zero)

    hooks = [hook(model.model.layers[index]) for index in layers]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


def removed_layers(importance: dict[int, float], *, capacity: float) -> list[int]:
    """The least important layers to remove so that ``capacity`` of them stays (rounded)."""
    count = round((1.0 - capacity) * len(importance))
    return sorted(sorted(importance, key=importance.__getitem__)[:count])


@torch.no_grad()
def rank_layers(
    model,
    samples: Sequence[Sample],
    layers: Sequence[int],
    *,
    target: str,
    progress: Iterable[Sample] | None = None,
) -> dict[int, float]:
    """How much the loss (nats a token) grows when one layer's ``target`` is removed, for each.

    The layers below the first candidate are computed once per sample; each removal then
    starts from the hidden states in front of its layer.
    """
    grown = dict.fromkeys(layers, 0.0)
    tokens = 0
    for sample in progress or samples:
        ids = torch.tensor([sample.ids], device=model.device)
        targets = _label_positions(sample)
        inputs, context = _inputs_of_layers(model, ids)
        last = len(inputs) - 1
        dense = _loss_from(model, last, inputs[last], context, ids[0], targets)
        for index in layers:
            with without(model, [index], target=target):
                loss = _loss_from(model, index, inputs[index], context, ids[0], targets)
            grown[index] += loss - dense
        tokens += len(targets)
    return {index: value / tokens for index, value in grown.items()}


def _loss_from(
    model, start: int, hidden: Tensor, context: dict, ids: Tensor, targets: Tensor
) -> float:
    """Summed loss of the target positions, from hidden states ``[1, T, H]`` before a layer on."""
    for layer in model.model.layers[start:]:
        hidden = layer(hidden, **context)
    logits = model.lm_head(model.model.norm(hidden)[0, targets - 1])
    return float(cross_entropy(logits.float(), ids[targets], reduction="sum"))


def _inputs_of_layers(model, ids: Tensor) -> tuple[list[Tensor], dict]:
    """The hidden states in front of every layer, and the arguments all layers are called with."""
    inputs: list[Tensor] = []
    contexts: list[dict] = []

    def record(module: object, args: tuple, kwargs: dict) -> None:
        inputs.append(args[0])
        contexts.append(kwargs)

    hooks = [
        layer.register_forward_pre_hook(record, with_kwargs=True) for layer in model.model.layers
    ]
    try:
        model.model(ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return inputs, contexts[0]


def _label_positions(sample: Sample) -> Tensor:
    """Positions of the labelled tokens that have a token before them."""
    return torch.tensor([i for i, is_label in enumerate(sample.labelled) if is_label and i])
