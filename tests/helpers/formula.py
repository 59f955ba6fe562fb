"""``y = x + m * F(x) + (1 - m) * S`` on Hugging Face's own dense models; nothing of ours in it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from tests.helpers import experts

Routers: TypeAlias = dict[tuple[int, str], Tensor]
STAND_IN = ("stand_in.down.weight", "stand_in.up.weight", "stand_in.up.bias")
# A granularity with each treatment of keys and values it can have.
SCHEMES = {
    "attn_sequence": {"granularity": "attn_sequence"},
    "mlp_sequence": {"granularity": "mlp_sequence"},
    "block_sequence": {"granularity": "block_sequence"},
    "attn_token_all": {"granularity": "attn_token", "keys_values": "all"},
    "attn_token_selected": {"granularity": "attn_token", "keys_values": "selected"},
    "mlp_token": {"granularity": "mlp_token"},
    "block_token_all": {"granularity": "block_token", "keys_values": "all"},
    "block_token_selected": {"granularity": "block_token", "keys_values": "selected"},
    "parts_sequence": {"granularity": "attn_sequence+mlp_sequence"},
    "parts_token_selected": {"granularity": "attn_token+mlp_token", "keys_values": "selected"},
}

# The same of routers on experts, which mixtures alone can have.
EXPERT_SCHEMES = {
    "expert_token": {"granularity": "expert_token"},
    "expert_token_renormalized": {"granularity": "expert_token", "renormalize": True},
}


def targets_of(granularity: str) -> list[str]:
    """What its routers decide about."""
    return [part.split("_")[0] for part in granularity.split("+")]


def places(layers: Sequence[int], granularity: str) -> list[tuple[int, str]]:
    """Of the routers, by which everything that belongs to one is known here."""
    return [(layer, target) for layer in layers for target in targets_of(granularity)]


def by_place(values: dict | None, granularity: str) -> dict | None:
    """The same by place; where a layer has one router, tests may say just the layer."""
    (target, *_) = targets_of(granularity)
    return values and {(k, target) if isinstance(k, int) else k: v for k, v in values.items()}


def name_of(name: str, target: str, granularity: str) -> str:
    """Of a tensor that a target has in an export, ``router.bias`` or ``router.attn.bias``."""
    if "+" not in granularity:
        return name
    module, rest = name.split(".", 1)
    return f"{module}.{target}.{rest}"


def forward(
    model,
    ids: Sequence[int],
    routers: Routers,
    *,
    granularity: str,
    keys_values: str | None = None,
    masks: Routers | None = None,
    borders: dict[tuple[int, str], float] | None = None,
    more: dict[int, dict[str, Tensor]] | None = None,
    renormalize: bool = False,
) -> tuple[Tensor, Routers, Routers]:
    """One sequence through a dense model (``eager`` attention) with routers ``[1, H]`` (of experts
    ``[E, H]``), by place, or by layer where it has one router; so is what is returned.

    Returns logits ``[T, vocab]``, each router's mask (``[T]``; of a sequence, all alike)
    and its logits (``[T]``; of a sequence ``[1]``); of experts both are ``[T * k]``, of the pairs
    that the gate makes, token by token. ``masks`` fixes decisions; ``borders`` are
    the logits from which on a unit is kept (0 without). ``more``: routed layers' other tensors
    by their names in an export: a bias of the router, and what ``S`` is made of (nothing without).
    """
    targets, unit = targets_of(granularity), granularity.split("_")[-1]
    by_layer = any(isinstance(key, int) for key in routers)
    routers, masks, borders = (by_place(d, granularity) for d in (routers, masks, borders))
    ids = torch.tensor([list(ids)])
    hidden = model.model.embed_tokens(ids)
    slots = torch.arange(ids.shape[1])
    rotary = model.model.rotary_emb(hidden, slots[None])
    made, logits = {}, {}
    for index, layer in enumerate(model.model.layers):
        normed = layer.input_layernorm(hidden)
        kept = {}
        added = (more or {}).get(index, {})
        for target in targets:
            place = index, target
            if place not in routers:
                continue
            found = (normed[0].double() @ routers[place].double().t()).float()
            found = found + added.get(name_of("router.bias", target, granularity), 0.0)
            if target == "expert":
                asked = found
                continue
            found = found.squeeze(-1)
            logits[place] = found.mean(0, keepdim=True) if unit == "sequence" else found
            border = borders[place] if borders else 0.0
            kept[target] = made[place] = (
                masks[place][: ids.shape[1]] if masks
                else (logits[place] >= border).float().expand(ids.shape[1])
            )  # fmt: skip
        attends = kept.get("attn", kept.get("block", torch.ones(ids.shape[1])))
        visible = slots[:, None] >= slots
        if window := _window(model.config, index):
            visible &= slots[:, None] - slots < window
        if keys_values == "selected":
            visible &= attends.bool() | torch.eye(ids.shape[1], dtype=torch.bool)
        mask = torch.where(visible, 0.0, torch.finfo(torch.float32).min)[None, None]
        attended = layer.self_attn(normed, position_embeddings=rotary, attention_mask=mask)[0]

        def choose(target: str, update: Tensor, read: Tensor, kept=kept, added=added) -> Tensor:
            if target not in kept:
                return update
            own = {
                name: added[its]
                for name in STAND_IN
                if (its := name_of(name, target, granularity)) in added
            }
            mask = kept[target][:, None]
            return mask * update + (1 - mask) * stand_in(own, read)

        if "block" in targets:
            update = attended + _mlp(layer, hidden + attended)
            hidden = hidden + choose("block", update, normed)
        else:
            hidden = hidden + choose("attn", attended, normed)
            read = layer.post_attention_layernorm(hidden)
            if (place := (index, "expert")) in routers:
                block = experts.block_of(layer)
                assigned = experts.gate(block, read[0])[1]
                logits[place] = asked[assigned]
                border = borders[place] if borders else 0.0
                made[place] = masks[place] if masks else (logits[place] >= border).float()
                mask = torch.zeros_like(asked).masked_scatter(assigned, made[place])
                hidden = hidden + experts.mixture(block, read[0], mask, renormalize=renormalize)
                continue
            hidden = hidden + choose("mlp", feed_forward(layer, read), read)
    if by_layer:
        made, logits = ({k: v for (k, _), v in found.items()} for found in (made, logits))
    return model.lm_head(model.model.norm(hidden))[0], made, logits


def _mlp(layer, hidden: Tensor) -> Tensor:
    return feed_forward(layer, layer.post_attention_layernorm(hidden))


def feed_forward(layer, read: Tensor) -> Tensor:
    """What a layer's MLP or mixture gives, ``[..., H]`` of ``[..., H]``."""
    found = experts.block_of(layer)(read)
    return found[0] if isinstance(found, tuple) else found


def stand_in(added: dict[str, Tensor], read: Tensor) -> Tensor | float:
    """``B A x + b`` of what it reads, in the place of what is skipped; nothing without."""
    if "stand_in.up.bias" not in added:
        return 0.0
    product = added["stand_in.up.weight"].double() @ added["stand_in.down.weight"].double()
    return (read.double() @ product.t()).float() + added["stand_in.up.bias"]


def _window(config, index: int) -> int | None:
    kinds = getattr(config, "layer_types", None)
    sliding = kinds[index] == "sliding_attention" if kinds else True
    return getattr(config, "sliding_window", None) if sliding else None


@torch.no_grad()
def greedy(dense, prompt: Sequence[int], routers: dict, *, new: int, **scheme) -> list[int]:
    """``new`` tokens, each from the whole text: a sequence's decision is its prompt's, a token's
    its own."""
    text, masks = list(prompt), None
    if scheme["granularity"].endswith("sequence"):
        _, made, _ = forward(dense, prompt, routers, **scheme)
        masks = {place: mask[:1].expand(len(prompt) + new) for place, mask in made.items()}
    for _ in range(new):
        logits, _, _ = forward(dense, text, routers, masks=masks, **scheme)
        text.append(int(logits[-1].argmax()))
    return text[-new:]


@torch.no_grad()
def mixed_routers(
    dense, prompts: Sequence, layers: Sequence[int], generator: torch.Generator, **scheme
) -> Routers:
    """Routers, one by one, that keep some of the prompts' units, skip some, none by a hair.

    ``scheme``: further arguments of ``forward``.
    """
    routers: Routers = {}
    for place in places(layers, scheme["granularity"]):
        while place not in routers:
            rows = experts.count(dense) if place[1] == "expert" else 1
            weight = torch.randn(rows, dense.config.hidden_size, generator=generator)
            trial = {**routers, place: weight}
            decided = [forward(dense, p, trial, **scheme) for p in prompts]
            kept = torch.cat([masks[place] for _, masks, _ in decided]).mean()
            margin = min(float(logits[place].abs().min()) for _, _, logits in decided)
            if 0.25 < kept < 0.75 and margin > 1e-3:
                routers = trial
    return routers


def bias_and_stand_in(
    hidden_size: int, rank: int, generator: torch.Generator, granularity: str = "attn_token"
) -> dict[str, Tensor]:
    """A routed layer's other tensors, by their names in it, of a size that matters."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    found = {}
    for target in targets_of(granularity):
        own = {
            "router.bias": normal(1),
            "stand_in.down.weight": normal(rank, hidden_size) / hidden_size**0.5,
            "stand_in.up.weight": normal(hidden_size, rank) / rank**0.5,
            "stand_in.up.bias": normal(hidden_size),
        }
        found |= {name_of(name, target, granularity): value for name, value in own.items()}
    return found


def save_model(folder: Path, family: str = "llama", *, seed: int = 0, **changes) -> Path:
    """Save a random 4-layer model of a family whose layers matter."""
    import transformers

    name = "".join(part.capitalize() for part in family.split("_"))
    settings = {
        "vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
        "tie_word_embeddings": False, "initializer_range": 0.2, "bos_token_id": 1,
        "eos_token_id": 2, "pad_token_id": 0, "head_dim": 8,
    }  # fmt: skip
    torch.manual_seed(seed)
    config = getattr(transformers, f"{name}Config")(**{**settings, **changes})
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    for parameter in model.parameters():  # norms and biases too: ones would hide a swapped one
        if parameter.dim() == 1:
            parameter.data.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    return folder


def load_dense(folder: Path):
    """The dense model in fp32 with eager attention, which takes the formula's masks."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
