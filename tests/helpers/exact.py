"""Exports with routers that keep a number of tokens exactly, and what has to come out of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from tests.helpers import exact_formula
from tests.helpers.routed import save_export

SIZE = 6  # of predictors


@dataclass(frozen=True)
class Exact:
    """Routers that keep a share of a text's tokens exactly, and what decides causally.

    ``capacity``: of each routed layer; ``added``: its other tensors by their names in it.
    """

    target: str
    causal: str | None
    capacity: dict[int, float]
    threshold: float = 0.5
    bias: bool = False
    added: dict[int, dict[str, Tensor]] = field(default_factory=dict)

    def routing(self) -> dict:
        """Fields of the export's ``routing`` entry."""
        return {
            "granularity": f"{self.target}_token",
            "selection": "top_k",
            "causal": self.causal,
            "predictor_size": SIZE if self.causal == "predictor" else None,
            "causal_loss_weight": 0.01 if self.causal == "auxiliary_loss" else None,
            "capacity": tuple(self.capacity.values()),
            "threshold": self.threshold,
            "bias": self.bias,
        }


def draw(
    target: str, causal: str | None, capacity: dict[int, float], hidden_size: int = 32, **settings
) -> Exact:
    """Such with random weights, which differ in sign and size."""
    found = Exact(target, causal, capacity, **settings)
    generator = torch.Generator().manual_seed(11)
    shapes = {"router.weight": (1, hidden_size)}
    if found.bias:
        shapes["router.bias"] = (1,)
    if causal == "predictor":
        shapes |= {
            "predictor.hidden.weight": (SIZE, hidden_size),
            "predictor.hidden.bias": (SIZE,),
            "predictor.out.weight": (1, SIZE),
            "predictor.out.bias": (1,),
        }
    for layer in capacity:
        found.added[layer] = {
            name: torch.randn(*shape, generator=generator) * 0.5 for name, shape in shapes.items()
        }
    return found


def save(folder: Path, hf: Path, exact: Exact) -> Path:
    """The export of a dense folder with these."""
    routers = {layer: own["router.weight"] for layer, own in exact.added.items()}
    return save_export(folder, hf, routers, exact.added, **exact.routing())


@torch.no_grad()
def forward(
    model, ids: Sequence[int], exact: Exact, *, top_k: bool
) -> tuple[Tensor, dict[int, Tensor], dict[int, Tensor]]:
    """One text through a dense model (``eager`` attention): logits ``[T, vocab]``, what each routed
    layer kept, and what it would have kept by the other rule (bool ``[T]``)."""
    logits, decisions, _ = exact_formula.forward(
        model,
        ids,
        exact.added,
        granularity=f"{exact.target}_token",
        capacity=exact.capacity,
        causal=not top_k,
        border=math.log(exact.threshold / (1 - exact.threshold)),
    )
    rules = [
        {layer: made[rule] for layer, made in decisions.items()} for rule in (not top_k, top_k)
    ]
    return logits, *rules


def greedy(model, prompt: Sequence[int], exact: Exact, *, new: int, top_k: bool = False) -> list:
    """``new`` tokens, each from the whole text."""
    text = list(prompt)
    for _ in range(new):
        text.append(int(forward(model, text, exact, top_k=top_k)[0][-1].argmax()))
    return text[len(prompt) :]
