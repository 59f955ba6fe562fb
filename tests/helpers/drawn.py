"""Settings of a training, drawn at random: of every section that decides what is computed."""

from __future__ import annotations

from random import Random

from tests.helpers import experts, tiny

# Families by name: a model type and what is said of it.
FAMILIES = {
    "llama": ("llama", {}),
    **{name: tiny.FAMILIES[name] for name in ("mistral", "qwen3")},
    **experts.FAMILIES,
}
EXPERT = "expert_token"
BY_TOKEN = ("attn_token", "mlp_token", "block_token")
GRANULARITIES = (
    *BY_TOKEN, "attn_sequence", "mlp_sequence", "block_sequence", "attn_token+mlp_token",
    "attn_sequence+mlp_sequence", EXPERT,
)  # fmt: skip

# Of each setting the values it may be given, or none at all.
EVERY = {
    "router.layers": ("all", "[1,2]", "[0,3]", "{deepest: 2}", "[3]", "[1,2,3]"),
    "data.packing": ("true", "false"),
    "train.loss": ("task", "distill", "both"),
    "train.recompute": ("selective", "full"),
    "train.frozen_prefix": ("recompute", "cache"),
    "optimizer.average_fraction": (0, 0.5),
}
BY_THRESHOLD = {
    "router.bias": ("true", "false"),
    "router.init": ("zeros", "importance"),
    "router.training_compute": ("dense", "sparse"),
    "router.threshold": (0.3, 0.7),
    "router.capacity_warmup_fraction": (0, 0.5),
}
OF_CAPACITY = {
    "router.capacity": (0.25, 0.5, 0.75, 1.0),
    "router.scope": ("layer", "model"),
    "router.capacity_loss_weight": ("auto", 0.3),
}
OF_WORK = {"router.work": (0.8, 0.9, "[0.7,0.95]", "[0.6,1.0]")}
OF_STAND_INS = {"router.stand_in": ("none", "linear"), "router.stand_in_rank": (2, 5)}
EXACT = {
    "router.selection": ("top_k", "random"),
    "router.capacity": (0.25, 0.5, 0.75),
    "router.causal": ("predictor", "auxiliary_loss"),
}
OF_ADAPTERS = {
    "lora.rank": (1, 3),
    "lora.layers": ("[1,2]", "{deepest: 2}"),
    "lora.targets": ("[q_proj,o_proj]", "all-linear", "[linear_qkv]"),
}
TRAINED = (
    "routers", "routers+stand_ins", "routers+lora", "routers+stand_ins+lora", "all",
)  # fmt: skip
NEEDED = ("router.layers", "router.work", "router.selection", "lora.rank")  # of their tables


def draw(random: Random) -> tuple[str, dict[str, object]]:
    """A family and settings, most of which a training accepts; ``None``: unset."""
    granularity = random.choice(GRANULARITIES)
    mixtures = tuple(experts.FAMILIES)
    family = random.choice(mixtures if granularity == EXPERT else tuple(FAMILIES))
    trained = random.choice(TRAINED)
    is_exact = granularity in BY_TOKEN and random.random() < 0.3
    tables = [EVERY]
    if is_exact:
        tables.append(EXACT)
    else:
        tables += [BY_THRESHOLD, random.choice([OF_CAPACITY, OF_WORK])]
        if granularity != EXPERT:
            tables.append(OF_STAND_INS)
        if granularity in ("attn_token", "block_token", "attn_token+mlp_token"):
            tables.append({"router.keys_values": ("all", "selected")})
        if granularity.endswith("sequence"):
            tables.append({"router.pooling": ("all", "prompt")})
    if "lora" in trained:
        tables.append(OF_ADAPTERS)
    settings: dict[str, object] = {"router.granularity": granularity, "train.trainable": trained}
    for name, values in (pair for table in tables for pair in table.items()):
        is_set = name in NEEDED or random.random() < 0.35
        settings[name] = random.choice(values) if is_set else None
    return family, settings
