"""Routers whose decisions no rounding changes: their logits lie far from the border."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_mod.conversion.routers import Added
from megatron_mod.data.chat import Sample
from megatron_mod.routing.config import ROUTER, RoutingConfig
from tests.helpers import training_formula

MARGIN = 0.5  # of the logits at least, which are about 1.5 to 2.5
RIDGE = 1e-3


def parted(hf, samples: Sequence[Sample], routing: RoutingConfig, seed: int) -> Added:
    """What the layers have beside dense ones, so that about half the units of each are kept.

    ``hf``: the dense model in float64, with more channels than the samples have tokens: a router is
    solved to give each of them its logit, layer by layer.
    """
    generator = torch.Generator().manual_seed(seed)
    added: Added = {}
    for layer in routing.layers:
        own = {
            name: 0.1 * torch.randn(shape, generator=generator, dtype=torch.float64)
            for name, shape in routing.added_shapes(hf.config.hidden_size, num_experts=1).items()
        }
        states = seen_by(hf, samples, routing, added, layer)
        products = states @ states.t()
        products += RIDGE * products.diagonal().mean() * torch.eye(len(states), dtype=torch.float64)
        for target in routing.scheme.targets:
            router = routing.name_of(ROUTER, target)
            bias = own.get(f"{router}.bias", 0.0)
            size = 1.5 + torch.rand(len(states), generator=generator, dtype=torch.float64)
            kept = wanted(samples, generator, per_sequence=routing.scheme.per_sequence)
            logits = torch.where(kept, size, -size) - bias
            weight = (states.t() @ torch.linalg.solve(products, logits))[None].float()
            own[f"{router}.weight"] = weight
            found = states @ weight[0].double() + bias
            assert found[kept].min() > MARGIN
            assert found[~kept].max() < -MARGIN
        added[layer] = {name: tensor.float() for name, tensor in own.items()}
    return added


def wanted(samples: Sequence[Sample], generator: torch.Generator, *, per_sequence: bool) -> Tensor:
    """Which tokens are to be kept, bool, sample after sample."""
    if not per_sequence:
        count = sum(len(sample.ids) for sample in samples)
        return torch.randint(2, (count,), generator=generator).bool()
    order = torch.randperm(len(samples), generator=generator) % 2 == 0
    return torch.cat([kept.expand(len(s.ids)) for kept, s in zip(order, samples, strict=True)])


@torch.no_grad()
def seen_by(
    hf, samples: Sequence[Sample], routing: RoutingConfig, added: Added, layer: int
) -> Tensor:
    """What a layer's router reads of all tokens ``[N, H]``, given those below it."""
    rules = {k: v for k, v in vars(routing).items()
             if k in training_formula.Scheme.__dataclass_fields__}  # fmt: skip
    scheme = training_formula.Scheme(**{**rules, "layers": tuple(added)})
    double = {k: {name: t.double() for name, t in own.items()} for k, own in added.items()}
    states: list[Tensor] = []
    norm = hf.model.layers[layer].input_layernorm
    hook = norm.register_forward_hook(lambda _, __, normed: states.append(normed))
    for sample in samples:
        training_formula.forward(hf, sample.ids, sample.prompt_length, double, scheme)
    hook.remove()
    return torch.cat(states)
