"""``y = x + m * r * F(x)`` on Hugging Face's own dense models, and exports that have to equal it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from tests.helpers import formula
from tests.helpers.routed import save_export

SIZE = 6  # of predictors


@dataclass(frozen=True)
class Exact:
    """Routers that keep a share of a text's tokens exactly, and what decides causally.

    ``capacity``: of each routed layer; ``added``: its other tensors by their names in it.
    """

    target: str
    causal: str
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
            "causal_loss_weight": None if self.causal == "predictor" else 0.01,
            "capacity": tuple(self.capacity.values()),
            "threshold": self.threshold,
            "bias": self.bias,
        }


def draw(
    target: str, causal: str, capacity: dict[int, float], hidden_size: int = 32, **settings
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


def largest(logits: Tensor, capacity: float) -> Tensor:
    """bool ``[T]``: the ``floor(capacity * T + 0.5)`` largest, of equal ones the first."""
    wanted = math.floor(capacity * len(logits) + 0.5)
    order = sorted(range(len(logits)), key=lambda at: (-float(logits[at]), at))
    kept = torch.zeros(len(logits), dtype=torch.bool)
    kept[order[:wanted]] = True
    return kept


def causal_logits(added: dict[str, Tensor], normed: Tensor, router: Tensor) -> Tensor:
    """``[T]`` of what the causal rule decides by."""
    if "predictor.out.weight" not in added:
        return router
    hidden = normed @ added["predictor.hidden.weight"].t() + added["predictor.hidden.bias"]
    hidden = hidden * torch.sigmoid(hidden)
    return (hidden @ added["predictor.out.weight"].t() + added["predictor.out.bias"]).squeeze(-1)


@torch.no_grad()
def forward(
    model, ids: Sequence[int], exact: Exact, *, top_k: bool
) -> tuple[Tensor, dict[int, Tensor], dict[int, Tensor]]:
    """One text through a dense model (``eager`` attention): logits ``[T, vocab]``, what each routed
    layer kept, and what it would have kept by the other rule (bool ``[T]``)."""
    hidden = model.model.embed_tokens(torch.tensor([list(ids)]))
    slots = torch.arange(len(ids))
    rotary = model.model.rotary_emb(hidden, slots[None])
    border = math.log(exact.threshold / (1 - exact.threshold))
    made, other = {}, {}
    for index, layer in enumerate(model.model.layers):
        normed = layer.input_layernorm(hidden)
        factor, keep = torch.ones(len(ids)), torch.ones(len(ids), dtype=torch.bool)
        if added := exact.added.get(index):
            factor = (normed[0] @ added["router.weight"].t()).squeeze(-1)
            factor = factor + added.get("router.bias", 0.0)
            rules = (
                causal_logits(added, normed[0], factor) >= border,
                largest(factor, exact.capacity[index]),
            )
            keep = made[index] = rules[top_k]
            other[index] = rules[not top_k]
        multiplied = (keep * factor)[:, None]
        visible = slots[:, None] >= slots
        if exact.target != "mlp":
            visible &= keep | torch.eye(len(ids), dtype=torch.bool)
        mask = torch.where(visible, 0.0, torch.finfo(torch.float32).min)[None, None]
        update = layer.self_attn(normed, position_embeddings=rotary, attention_mask=mask)[0]
        if exact.target == "block":
            update = update + layer.mlp(layer.post_attention_layernorm(hidden + update))
            hidden = hidden + multiplied * update
            continue
        hidden = hidden + (multiplied * update if exact.target == "attn" else update)
        update = layer.mlp(layer.post_attention_layernorm(hidden))
        hidden = hidden + (multiplied * update if exact.target == "mlp" else update)
    return model.lm_head(model.model.norm(hidden))[0], made, other


def greedy(model, prompt: Sequence[int], exact: Exact, *, new: int, top_k: bool = False) -> list:
    """``new`` tokens, each from the whole text."""
    text = list(prompt)
    for _ in range(new):
        text.append(int(forward(model, text, exact, top_k=top_k)[0][-1].argmax()))
    return text[len(prompt) :]


