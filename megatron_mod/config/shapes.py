"""Published models' ``config.json``, as far as it says their shape, by the names that options take.

Importing this loads nothing. Each is that of the repository named, at Hugging Face.
"""

from __future__ import annotations

from typing import Any

_LLAMA3 = {
    "model_type": "llama", "vocab_size": 128256, "rope_theta": 500000.0, "rms_norm_eps": 1e-5,
    "num_key_value_heads": 8,
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "llama3-8b": {  # meta-llama/Meta-Llama-3-8B
        **_LLAMA3, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "max_position_embeddings": 8192,
    },
    "llama3-70b": {  # meta-llama/Meta-Llama-3-70B
        **_LLAMA3, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
        "num_attention_heads": 64, "max_position_embeddings": 8192,
    },
    "llama3-405b": {  # meta-llama/Llama-3.1-405B
        **_LLAMA3, "hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126,
        "num_attention_heads": 128, "max_position_embeddings": 131072,
        "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "mistral-7b": {  # mistralai/Mistral-7B-v0.3; v0.1 has a window and 32000 in its vocabulary
        "model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "vocab_size": 32768, "max_position_embeddings": 32768, "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-5, "sliding_window": None,
    },
    "qwen2.5-7b": {  # Qwen/Qwen2.5-7B-Instruct; the base reads 131072 positions
        "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944,
        "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
        "vocab_size": 152064, "max_position_embeddings": 32768, "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-6,
    },
    "mixtral-8x7b": {  # mistralai/Mixtral-8x7B-v0.1 and -Instruct-v0.1
        "model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "vocab_size": 32000, "max_position_embeddings": 32768, "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-5, "sliding_window": None, "num_local_experts": 8,
        "num_experts_per_tok": 2, "router_aux_loss_coef": 0.02,
    },
    "qwen3-30b-a3b": {  # Qwen/Qwen3-30B-A3B; the base reads 32768 positions
        "model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144,
        "moe_intermediate_size": 768, "num_hidden_layers": 48, "num_attention_heads": 32,
        "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151936,
        "max_position_embeddings": 40960, "rope_theta": 1000000.0, "rms_norm_eps": 1e-6,
        "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True,
        "router_aux_loss_coef": 0.001,
    },
    "olmoe-1b-7b": {  # allenai/OLMoE-1B-7B-0924 and -Instruct
        "model_type": "olmoe", "hidden_size": 2048, "intermediate_size": 1024,
        "num_hidden_layers": 16, "num_attention_heads": 16, "num_key_value_heads": 16,
        "vocab_size": 50304, "max_position_embeddings": 4096, "rope_theta": 10000.0,
        "rms_norm_eps": 1e-5, "num_experts": 64, "num_experts_per_tok": 8,
        "norm_topk_prob": False, "router_aux_loss_coef": 0.01,
    },
    "smollm2-135m": {  # HuggingFaceTB/SmolLM2-135M-Instruct
        "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
        "vocab_size": 49152, "max_position_embeddings": 8192, "rope_theta": 100000.0,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
    },
    "tiny": {  # nobody's
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128,
        "max_position_embeddings": 256, "rope_theta": 10000.0, "rms_norm_eps": 1e-5,
    },
}  # fmt: skip
