"""Tiny random models and texts, made on the spot."""

from __future__ import annotations

from pathlib import Path

import torch

LLAMAS = {
    "tied": {"tie_word_embeddings": True},
    "untied": {"tie_word_embeddings": False},
    "grouped_queries": {"num_key_value_heads": 2},
    "odd_vocabulary": {
        "vocab_size": 131,
        "tie_word_embeddings": True,
        "num_key_value_heads": 2,
    },
    "odd_vocabulary_untied": {"vocab_size": 131},
    "llama3_rope": {
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        }
    },
}  # fmt: skip

EXPERTS = 4  # of each layer of the mixtures below, two of them for each token
_MIXTURES = {
    "mixtral": {"num_local_experts": EXPERTS, "num_key_value_heads": 2, "intermediate_size": 24},
    "qwen3_moe": {
        "num_experts": EXPERTS, "norm_topk_prob": True, "moe_intermediate_size": 24,
        "num_key_value_heads": 2, "head_dim": 16,
    },
    "olmoe": {"num_experts": EXPERTS, "num_key_value_heads": 2, "intermediate_size": 24},
}  # fmt: skip
MIXTURES = {n: (n, {"num_experts_per_tok": 2, **c}) for n, c in _MIXTURES.items()}

# Each family's own features: (model type, changes to the settings below).
FAMILIES = {
    "mistral": ("mistral", {"num_key_value_heads": 2, "sliding_window": 5}),
    "mistral_no_window": ("mistral", {"sliding_window": None, "head_dim": 16}),
    "qwen2": ("qwen2", {"num_key_value_heads": 2}),
    "qwen2_tied": ("qwen2", {"tie_word_embeddings": True, "vocab_size": 131}),
    "qwen3": ("qwen3", {"num_key_value_heads": 2, "head_dim": 16}),
    **MIXTURES,
    "mixtral_window": ("mixtral", {**MIXTURES["mixtral"][1], "sliding_window": 5}),
    "qwen3_moe_not_normalized": (
        "qwen3_moe",
        {**MIXTURES["qwen3_moe"][1], "norm_topk_prob": False},
    ),
}


def save_llama(folder: Path, **changes) -> Path:
    """Save a random 4-layer Llama; see ``save_model``."""
    return save_model(folder, "llama", **changes)


def save_model(
    folder: Path, kind: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes
) -> Path:
    """Save a random 4-layer model of a Hugging Face model type, whose layers matter (weights
    larger than the usual init)."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {
        "vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 128,
        "tie_word_embeddings": False, "initializer_range": 0.2, "bos_token_id": 1,
        "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    torch.manual_seed(seed)
    config = AutoConfig.for_model(kind, **{**settings, **changes})
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    for parameter in model.parameters():  # norms and biases too: ones would hide a swapped norm
        if parameter.dim() == 1:
            parameter.data.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    return folder


def save_tokenizer(folder: Path) -> Path:
    """Save a byte-level tokenizer with an end-of-text token and no chat template beside a model."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    fast.save_pretrained(folder)
    return folder


VOCAB = 259  # of save_tokenizer
