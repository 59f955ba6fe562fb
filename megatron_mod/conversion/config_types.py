"""The types of config.json's fields, checked before anything computes with them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from megatron_mod.conversion.families import FAMILIES


class Kind(NamedTuple):
    """What a field may hold."""

    text: str
    accepts: Callable[[object], bool]


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def is_share(value: object) -> bool:
    return is_number(value) and 0 <= value <= 1


def is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_list(value: object, accepts: Callable[[object], bool]) -> bool:
    return isinstance(value, (list, tuple)) and all(map(accepts, value))


def is_text(value: object) -> bool:
    return isinstance(value, str)


COUNT = Kind("a whole number above 0", lambda value: is_whole(value) and value > 0)
NUMBER = Kind("a number", is_number)
POSITIVE = Kind("a number above 0", lambda value: is_number(value) and value > 0)
BOOLEAN = Kind("true or false", lambda value: isinstance(value, bool))
TEXT = Kind("a string", is_text)
TEXTS = Kind("a list of strings", lambda value: is_list(value, is_text))
OBJECT = Kind("a JSON object", lambda value: isinstance(value, dict))
TOKENS = Kind(
    "a token's number, or a list of them", lambda value: is_whole(value) or is_list(value, is_whole)
)
DTYPE = Kind(
    "the name of a torch dtype, such as 'bfloat16'",
    lambda value: is_text(value) and isinstance(getattr(torch, value, None), torch.dtype),
)

MODEL = {"model_type": TEXT, "architectures": TEXTS, "auto_map": OBJECT}
# Of the families we build; elsewhere some of these are lists.
DECODER = {
    "num_hidden_layers": COUNT,
    "hidden_size": COUNT,
    "intermediate_size": COUNT,
    "num_attention_heads": COUNT,
    "num_key_value_heads": COUNT,
    "head_dim": COUNT,
    "vocab_size": COUNT,
    "max_position_embeddings": COUNT,
    "sliding_window": COUNT,
    "max_window_layers": Kind("a whole number", is_whole),
    "pretraining_tp": COUNT,
    "rms_norm_eps": POSITIVE,
    "rope_theta": POSITIVE,
    "initializer_range": NUMBER,
    "attention_dropout": NUMBER,
    "partial_rotary_factor": NUMBER,
    "rope_scaling": OBJECT,
    "rope_parameters": OBJECT,
    "quantization_config": OBJECT,
    "tie_word_embeddings": BOOLEAN,
    "attention_bias": BOOLEAN,
    "mlp_bias": BOOLEAN,
    "use_cache": BOOLEAN,
    "use_sliding_window": BOOLEAN,
    "hidden_act": TEXT,
    "layer_types": TEXTS,
    "bos_token_id": TOKENS,
    "eos_token_id": TOKENS,
    "pad_token_id": TOKENS,
    "dtype": DTYPE,
    "torch_dtype": DTYPE,
}
# Of those whose layers are mixtures; others do not know them.
MIXTURE = {
    "num_experts": COUNT,
    "num_local_experts": COUNT,
    "num_experts_per_tok": COUNT,
    "moe_intermediate_size": COUNT,
    "decoder_sparse_step": COUNT,
    "mlp_only_layers": Kind("a list of layers' indices", lambda value: is_list(value, is_whole)),
    "norm_topk_prob": BOOLEAN,
    "output_router_logits": BOOLEAN,
    "router_aux_loss_coef": NUMBER,
    "router_jitter_noise": NUMBER,
    "clip_qkv": NUMBER,
}
ROPE = {
    "rope_type": TEXT,
    "type": TEXT,
    "rope_theta": POSITIVE,
    "factor": POSITIVE,
    "low_freq_factor": NUMBER,
    "high_freq_factor": NUMBER,
    "partial_rotary_factor": NUMBER,
    "original_max_position_embeddings": COUNT,
}


def check_types(config: Mapping[str, object], path: Path) -> None:
    """Refuse a ``config.json`` with a field of the wrong type; null is a field that is not there.

    Raises:
        ValueError: naming file, field, value and what it must be.
    """
    check_fields(config, MODEL, path)
    if str(config.get("model_type")).removeprefix("mod_") not in FAMILIES:
        return
    check_fields(config, DECODER | MIXTURE, path)
    for name in ("rope_parameters", "rope_scaling"):
        check_fields(config.get(name) or {}, ROPE, path, within=f"{name}.")


def check_fields(
    values: Mapping[str, object], kinds: Mapping[str, Kind], path: Path, *, within: str = ""
) -> None:
    """Refuse an object with a field of the wrong type, as ``check_types`` does."""
    for name, kind in kinds.items():
        value = values.get(name)
        if value is not None and not kind.accepts(value):
            raise ValueError(f"{path}: {within}{name} = {value!r}: must be {kind.text}.")
