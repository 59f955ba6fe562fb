"""The fused projection of queries, keys and values, which can compute some of them alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear, copy_to_tensor_model_parallel_region
from torch import Tensor, nn


@dataclass(frozen=True)
class Part:
    """The outputs ``first`` to ``end`` of each of ``groups`` equal groups."""

    groups: int
    first: int
    end: int

    def of_rows(self, values: Tensor) -> Tensor:
        """Those of a weight ``[groups * width, H]`` or bias ``[groups * width]``."""
        return values.unflatten(0, (self.groups, -1))[:, self.first : self.end].flatten(0, 1)

    def of_outputs(self, values: Tensor) -> Tensor:
        """Those of outputs ``[..., groups * width]``, as long again."""
        return values.unflatten(-1, (self.groups, -1))[..., self.first : self.end].flatten(-2)


class SeesParts:
    """A forward hook with keyword arguments, of which one may be a ``part``: it then gets the
    outputs of that part alone, and gives as many."""


class PartLinear(nn.Module):
    """Mixed into a column-parallel linear: with ``part`` it computes no other outputs."""

    weight: Tensor
    bias: Tensor | None
    padded_forward: Callable | None = None  # put in the place of forward (``fp8.pad_tokens``)

    def __init__(self, *args: object, tp_group, **kwargs: object) -> None:
        super().__init__(*args, tp_group=tp_group, **kwargs)
        self.part_group = tp_group

    def forward(
        self, hidden_states: Tensor, *args: object, part: Part | None = None, **kwargs: object
    ) -> tuple[Tensor, Tensor | None]:
        """As the linear's, or ``[S, B, H]`` to the part's ``[S, B, groups * (end - first)]``,
        bias included."""
        if part is None:
            return super().forward(hidden_states, *args, **kwargs)
        bias = self.bias
        if bias is not None:
            # Transformer Engine writes no bias as an empty one.
            bias = part.of_rows(bias) if bias.numel() else None
        hidden_states = copy_to_tensor_model_parallel_region(hidden_states, group=self.part_group)
        return F.linear(hidden_states, part.of_rows(self.weight), bias), None


class PartColumnParallelLinear(PartLinear, ColumnParallelLinear):
    """Megatron's."""


def project(linear: nn.Module, hidden_states: Tensor, part: Part) -> Tensor:
    """A part of a projection's outputs ``[S, B, groups * (end - first)]`` of ``[S, B, H]``.

    No more than the part is computed if ``linear`` can do so and nobody has put anything on it but
    hooks that can too, as ours of adapters (``SeesParts``). Otherwise (an adapter in its place,
    another hook or forward) it is called as Megatron does, so that what was added sees whole
    outputs, and the part is taken from them.
    """
    hooks = linear._forward_hooks.values()
    changed = not all(isinstance(hook, SeesParts) for hook in hooks)
    if forward := vars(linear).get("forward"):
        changed = changed or forward is not getattr(linear, "padded_forward", None)
    if isinstance(linear, PartLinear) and not changed:
        return linear(hidden_states, part=part)[0]
    return part.of_outputs(linear(hidden_states)[0])
