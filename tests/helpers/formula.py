"""``y = x + m * F(x) + (1 - m) * S`` on Hugging Face's own dense models; nothing of ours in it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

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
}


def forward(
    model,
    ids: Sequence[int],
    routers: dict[int, Tensor],
    *,
    granularity: str,
    keys_values: str | None = None,
    masks: dict[int, Tensor] | None = None,
    borders: dict[int, float] | None = None,
    more: dict[int, dict[str, Tensor]] | None = None,
) -> tuple[Tensor, dict[int, Tensor], dict[int, Tensor]]:
    """One sequence through a dense model (``eager`` attention) with routers ``[1, H]``.

    Returns logits ``[T, vocab]``, each routed layer's mask (``[T]``; of a sequence, all alike)
    and its logits (``[T]``; of a sequence ``[1]``). ``masks`` fixes decisions; ``borders`` are
    the logits from which on a layer is kept (0 without). ``more``: routed layers' other tensors
    by their names in an export: a bias of the router, and what ``S`` is made of (nothing without).
    """
    target, unit = granularity.split("_")
    ids = torch.tensor([list(ids)])
    hidden = model.model.embed_tokens(ids)
    slots = torch.arange(ids.shape[1])
    rotary = model.model.rotary_emb(hidden, slots[None])
    made, logits = {}, {}
    for index, layer in enumerate(model.model.layers):
        normed = layer.input_layernorm(hidden)
        kept = torch.ones(ids.shape[1])
        added = (more or {}).get(index, {})
        if index in routers:
            found = (normed[0].double() @ routers[index].double().squeeze(0)).float()
            found = found + added.get("router.bias", 0.0)
            logits[index] = found.mean(0, keepdim=True) if unit == "sequence" else found
            border = borders[index] if borders else 0.0
            kept = made[index] = (
                masks[index][: ids.shape[1]] if masks
                else (logits[index] >= border).float().expand(ids.shape[1])
            )  # fmt: skip
        visible = slots[:, None] >= slots
        if window := _window(model.config, index):
            visible &= slots[:, None] - slots < window
        if keys_values == "selected":
            visible &= kept.bool() | torch.eye(ids.shape[1], dtype=torch.bool)
        mask = torch.where(visible, 0.0, torch.finfo(torch.float32).min)[None, None]
        attended = layer.self_attn(normed, position_embeddings=rotary, attention_mask=mask)[0]
        kept = kept[:, None]

        def choose(update: Tensor, read: Tensor, kept=kept, added=added) -> Tensor:
            return kept * update + (1 - kept) * stand_in(added, read)

        if target == "attn":
            hidden = hidden + choose(attended, normed)
            hidden = hidden + _mlp(layer, hidden)
        elif target == "mlp":
            hidden = hidden + attended
            read = layer.post_attention_layernorm(hidden)
            hidden = hidden + choose(layer.mlp(read), read)
        else:
            hidden = hidden + choose(attended + _mlp(layer, hidden + attended), normed)
    return model.lm_head(model.model.norm(hidden))[0], made, logits


def _mlp(layer, hidden: Tensor) -> Tensor:
    return layer.mlp(layer.post_attention_layernorm(hidden))


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
        masks = {layer: mask[:1].expand(len(prompt) + new) for layer, mask in made.items()}
    for _ in range(new):
        logits, _, _ = forward(dense, text, routers, masks=masks, **scheme)
        text.append(int(logits[-1].argmax()))
    return text[-new:]


@torch.no_grad()
def mixed_routers(
    dense, prompts: Sequence, layers: Sequence[int], generator: torch.Generator, **scheme
) -> dict[int, Tensor]:
    """Routers, layer by layer, that keep some of the prompts' units, skip some, none by a hair.

    ``scheme``: further arguments of ``forward``.
    """
    routers: dict[int, Tensor] = {}
    for layer in layers:
        while layer not in routers:
            weight = torch.randn(1, dense.config.hidden_size, generator=generator)
            trial = {**routers, layer: weight}
            decided = [forward(dense, p, trial, **scheme) for p in prompts]
            kept = torch.cat([masks[layer] for _, masks, _ in decided]).mean()
            margin = min(float(logits[layer].abs().min()) for _, _, logits in decided)
            if 0.25 < kept < 0.75 and margin > 1e-3:
                routers = trial
    return routers


def bias_and_stand_in(hidden_size: int, rank: int, generator: torch.Generator) -> dict[str, Tensor]:
    """A routed layer's other tensors, by their names in it, of a size that matters."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "router.bias": normal(1),
        "stand_in.down.weight": normal(rank, hidden_size) / hidden_size**0.5,
        "stand_in.up.weight": normal(hidden_size, rank) / rank**0.5,
        "stand_in.up.bias": normal(hidden_size),
    }


def save_model(folder: Path, family: str = "llama", *, seed: int = 0, **changes) -> Path:
    """Save a random 4-layer model of a family whose layers matter."""
    import transformers

    name = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}[family]
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
