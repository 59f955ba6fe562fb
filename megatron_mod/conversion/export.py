"""What an exported folder holds beside its tensors, written for Transformers 4.57 and 5.x."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import get_args

from megatron_mod.conversion.config_types import (
    BOOLEAN,
    COUNT,
    NUMBER,
    TEXT,
    Kind,
    check_fields,
    is_list,
    is_share,
    is_whole,
)
from megatron_mod.conversion.families.base import rope_theta_of
from megatron_mod.hf import FILES, MODULE, routed_name
from megatron_mod.routing.config import AUTO, RoutingConfig
from megatron_mod.routing.scheme import Causal


def portable_config(hf_config: dict) -> dict:
    """``config.json`` with rotary settings, dtype and number of experts under both releases' names,
    and without the code of the folder it came from, which stays there."""
    config = {name: value for name, value in hf_config.items() if name != "auto_map"}
    rope = config.get("rope_parameters")
    scaling = config.get("rope_scaling")
    base = rope_theta_of(config)
    if rope is None:
        rope = {**(scaling or {"rope_type": "default"}), "rope_theta": base}
    if scaling is None and rope.get("rope_type", "default") != "default":
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    config.update(rope_theta=base, rope_parameters=rope, rope_scaling=scaling)
    dtype = config.get("dtype") or config.get("torch_dtype")
    if dtype:
        config.update(dtype=dtype, torch_dtype=dtype)
    if experts := config.get("num_experts") or config.get("num_local_experts"):
        config.update(num_experts=experts, num_local_experts=experts)
    return config


def make_portable(folder: Path) -> None:
    """Rewrite the folder's config and tokenizer settings so that both releases read them."""
    config = folder / "config.json"
    _write(config, portable_config(json.loads(config.read_text(encoding="utf-8"))))
    tokenizer = folder / "tokenizer_config.json"
    if tokenizer.is_file():
        settings = json.loads(tokenizer.read_text(encoding="utf-8"))
        if settings.get("tokenizer_class") == "TokenizersBackend":  # 5.x's name, unknown to 4.57
            settings["tokenizer_class"] = "PreTrainedTokenizerFast"
            _write(tokenizer, settings)


def add_routing(folder: Path, routing: RoutingConfig) -> None:
    """Turn the folder's config into that of a routed model and add its code.

    The model type is one of our own, so that opening the folder without ``trust_remote_code`` is an
    error and not silently the dense model. Transformers chooses a tokenizer by it too, so the
    folder's is made one that needs no choice. Gates' logits, of which a training makes its
    load-balancing loss, are given to who asks for them, whatever the folder said.
    """
    from megatron_mod.data.tokenizer import make_plain  # imports transformers

    make_plain(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    family = config["model_type"]
    name = routed_name(family)
    config.update(
        model_type=f"mod_{family}",
        architectures=[f"{name}ForCausalLM"],
        auto_map={
            "AutoConfig": f"{MODULE}.{name}Config",
            "AutoModel": f"{MODULE}.{name}Model",
            "AutoModelForCausalLM": f"{MODULE}.{name}ForCausalLM",
        },
        routing=routing.to_dict(),
    )
    if config.get("output_router_logits"):
        config["output_router_logits"] = False
    _write(path, config)
    for file in FILES:
        shutil.copyfile(file, folder / file.name)


def dense_config(config: dict) -> dict:
    """The ``config.json`` of the model that an export was made from; a dense one as it is."""
    if "routing" not in config:
        return config
    family = str(config.get("model_type")).removeprefix("mod_")
    kept = {k: v for k, v in config.items() if k not in ("routing", "auto_map")}
    architectures = [name.removeprefix("MoD") for name in config.get("architectures") or ()]
    return {**kept, "model_type": family, "architectures": architectures}


_NUMBERS = Kind("a number from 0 to 1, or a list of them", lambda v: is_share(v) or _are_shares(v))
ROUTING = {
    "granularity": TEXT,
    "layers": Kind("a list of layers' indices", lambda v: is_list(v, is_whole)),
    "capacity": Kind("a list of numbers from 0 to 1", lambda v: _are_shares(v)),
    "scope": TEXT,
    "capacity_loss_weight": Kind("a number or 'auto'", lambda v: v == AUTO or NUMBER.accepts(v)),
    "capacity_warmup_fraction": NUMBER,
    "threshold": _NUMBERS,
    "pooling": TEXT,
    "keys_values": TEXT,
    "training_compute": TEXT,
    "work": Kind(
        "a number from 0 to 1, or a list of two that ascend",
        lambda v: is_share(v) or _is_range(v),
    ),
    "budget": Kind("a number from 0 to 1", is_share),
    "selection": Kind("'threshold' or 'top_k'", lambda v: v in ("threshold", "top_k")),
    "causal": Kind(
        "'auxiliary_loss', 'predictor' or null", lambda v: v is None or v in get_args(Causal)
    ),
    "causal_loss_weight": Kind("a number, or null", lambda v: v is None or NUMBER.accepts(v)),
    "predictor_size": Kind(
        "a whole number above 0, or null", lambda v: v is None or COUNT.accepts(v)
    ),
    "bias": BOOLEAN,
    "stand_in_rank": Kind(
        "a whole number above 0, or null", lambda v: v is None or COUNT.accepts(v)
    ),
    "renormalize": BOOLEAN,
    "num_noop_experts": Kind(
        "a whole number above 0, or null", lambda v: v is None or COUNT.accepts(v)
    ),
}


def routing_of(config: dict, path: Path) -> RoutingConfig | None:
    """The routers of an export, from its ``config.json`` at ``path``; ``None`` of a dense model.

    Raises:
        ValueError: a ``routing`` entry that ``add_routing`` did not write.
    """
    if "routing" not in config:
        return None
    values = config["routing"]
    needed = ("granularity", "layers", "capacity")
    if not isinstance(values, dict) or any(values.get(name) is None for name in needed):
        raise ValueError(f"{path}: routing: must be an object with {', '.join(needed)}.")
    if unknown := sorted(set(values) - set(ROUTING)):
        raise ValueError(f"{path}: routing: {unknown[0]} is unknown.")
    check_fields(values, ROUTING, path, within="routing.")
    try:
        routing = RoutingConfig.from_dict(values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    layers = routing.layers
    routers = len(routing.places)
    if len(routing.capacity) != routers or len(routing.thresholds) != routers:
        raise ValueError(
            f"{path}: routing: capacity and a threshold that is a list must have one number for "
            f"each of the {routers} routers."
        )
    is_top_k, has_predictor = routing.selection == "top_k", routing.causal == "predictor"
    for name, has, needs in (
        ("causal", routing.causal, is_top_k),
        ("predictor_size", routing.predictor_size, has_predictor),
    ):
        if (has is not None) != needs:
            raise ValueError(
                f"{path}: routing.{name} = {has!r}: does not go with selection "
                f"{routing.selection!r} and causal {routing.causal!r}."
            )
    low, high = routing.budgets or (0.0, 1.0)
    if routing.budget is not None and not low <= routing.budget <= high:
        raise ValueError(
            f"{path}: routing.budget = {routing.budget}: must be from {low} to {high}, the budgets "
            "that the routers serve (routing.work)."
        )
    if list(layers) != sorted(set(layers)) or (layers and layers[0] < 0):
        raise ValueError(f"{path}: routing.layers = {list(layers)}: must be ascending indices.")
    return routing


def _is_range(value: object) -> bool:
    if not isinstance(value, list | tuple) or not _are_shares(value):
        return False
    return len(value) == 2 and value[0] < value[1]


def _are_shares(value: object) -> bool:
    return is_list(value, is_share)


def _write(path: Path, values: dict) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
