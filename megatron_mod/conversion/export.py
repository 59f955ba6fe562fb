"""What an exported folder holds beside its tensors, written for Transformers 4.57 and 5.x."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from megatron_mod.hf import __file__ as _hf_package
from megatron_mod.routing.config import RoutingConfig


def portable_config(hf_config: dict) -> dict:
    """``config.json`` with rotary settings and dtype under both releases' names."""
    config = dict(hf_config)
    rope = config.get("rope_parameters")
    scaling = config.get("rope_scaling")
    base = (rope or {}).get("rope_theta") or config.get("rope_theta") or 10000.0
    if rope is None:
        rope = {**(scaling or {"rope_type": "default"}), "rope_theta": base}
    if scaling is None and rope.get("rope_type", "default") != "default":
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    config.update(rope_theta=base, rope_parameters=rope, rope_scaling=scaling)
    dtype = config.get("dtype") or config.get("torch_dtype")
    if dtype:
        config.update(dtype=dtype, torch_dtype=dtype)
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
    """Turn the folder's config into that of a routed model and add the modelling file.

    The model type is one of our own, so that opening the folder without
    ``trust_remote_code`` is an error and not silently the dense model.
    """
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    family = config["model_type"]
    module, name = "modeling_mod", f"MoD{family.capitalize()}"
    config.update(
        model_type=f"mod_{family}",
        architectures=[f"{name}ForCausalLM"],
        auto_map={
            "AutoConfig": f"{module}.{name}Config",
            "AutoModel": f"{module}.{name}Model",
            "AutoModelForCausalLM": f"{module}.{name}ForCausalLM",
        },
        routing=routing.to_dict(),
    )
    _write(path, config)
    shutil.copyfile(Path(_hf_package).with_name(f"{module}.py"), folder / f"{module}.py")


def dense_config(config: dict) -> dict:
    """The ``config.json`` of the model that an export was made from; a dense one as it is."""
    if "routing" not in config:
        return config
    family = config["model_type"].removeprefix("mod_")
    kept = {k: v for k, v in config.items() if k not in ("routing", "auto_map")}
    architectures = [name.removeprefix("MoD") for name in config["architectures"]]
    return {**kept, "model_type": family, "architectures": architectures}


def _write(path: Path, values: dict) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
