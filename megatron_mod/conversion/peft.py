"""LoRA adapters in the format of Hugging Face's PEFT: ``adapter_config.json`` and
``adapter_model.safetensors``.

What it can say and ours cannot is refused by its field: no adapter is carried but exactly.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn, TypeAlias

from safetensors.torch import save_file
from torch import Tensor

from megatron_mod.checkpoint.companions import read_json
from megatron_mod.checkpoint.export_checksums import as_written, write_checksums
from megatron_mod.config.lora import ALL_LINEAR, TARGETS, LoraSettings
from megatron_mod.config.model_folder import ADAPTER
from megatron_mod.conversion.check import refuse_difference
from megatron_mod.conversion.config_types import (
    BOOLEAN,
    COUNT,
    POSITIVE,
    TEXT,
    Kind,
    check_fields,
    is_list,
    is_share,
    is_text,
    is_whole,
)
from megatron_mod.conversion.hf_reader import HFReader
from megatron_mod.model.architecture import Architecture

Adapters: TypeAlias = dict[int, dict[str, Tensor]]
"""By layer, and by their names in it (``LoraSettings.shapes``), whole and in fp32."""

WEIGHTS = "adapter_model.safetensors"
_MODULE = "model.layers.{}.{}"
_WITHIN = {
    target: f"{'mlp' if linear.startswith('linear_fc') else 'self_attn'}.{target}"
    for target, linear in TARGETS.items()
}
_OTHERS = ("model.embed_tokens", "lm_head")  # that PEFT can adapt
_KEY = "base_model.model.{}.lora_{}.weight"
_NAMED = re.compile(r"(.+\.lora_[AB])\.[^.]+(\.weight)")  # with the adapter's name: "default"

_NAMES = Kind("a string or a list of strings", lambda v: is_text(v) or is_list(v, is_text))
_FIELDS = {
    "peft_type": TEXT,
    "task_type": TEXT,
    "r": COUNT,
    "lora_alpha": POSITIVE,
    "lora_dropout": Kind("a number from 0 to below 1", lambda v: is_share(v) and v != 1),
    "use_rslora": BOOLEAN,
    "bias": TEXT,
    "target_modules": _NAMES,
    "exclude_modules": _NAMES,
    "layers_to_transform": Kind(
        "a layer's index, or a list of them", lambda v: is_whole(v) or is_list(v, is_whole)
    ),
    "layers_pattern": _NAMES,
    "init_lora_weights": Kind("true, false or a string", lambda v: isinstance(v, (bool, str))),
}
_OF_NO_WEIGHT = {  # where it came from, and how it began or ran
    "base_model_name_or_path", "revision", "peft_version", "auto_mapping", "inference_mode",
    "runtime_config", "megatron_core", "qalora_group_size", "loftq_config", "eva_config",
    "corda_config", "lora_ga_config", "ensure_weight_tying",
}  # fmt: skip
# What leaves the frozen weights as they are; all others (PiSSA, OLoRA, ...) take from them what
# the adapter begins with.
_BEGINNINGS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
_ONE_FOR_ALL = "modules differ in it, and a training has one for all"
_WHY = {
    "use_dora": "DoRA's magnitudes scale the frozen weights",
    "lora_bias": "its B has a bias",
    "fan_in_fan_out": "its weights are those of transposed linears, which no supported model has",
    "modules_to_save": "it replaces whole modules of the model",
    "trainable_token_indices": "it changes the embedding",
    "rank_pattern": _ONE_FOR_ALL,
    "alpha_pattern": _ONE_FOR_ALL,
    "target_parameters": "it changes parameters that are no linear's",
    "megatron_config": "it is one of Megatron's own layers, not of Hugging Face's projections",
}
_MERGE = "merge the adapter into its model with PEFT (merge_and_unload) and use that"


def read_peft(folder: str | Path, arch: Architecture) -> tuple[LoraSettings, Adapters]:
    """The settings and adapters of a PEFT folder, for a model of this shape.

    With ``use_rslora`` PEFT scales by ``alpha / sqrt(r)``: ``alpha`` is then ``sqrt(r)`` times its
    own.

    Raises:
        ValueError: no such folder, files that are damaged or lead out of it, a field or value that
            is not built, and tensors that are not exactly those of its settings and this model.
    """
    folder = Path(folder)
    if not (folder / ADAPTER).is_file():
        raise ValueError(
            f"{folder}: has no {ADAPTER}; give the folder that PEFT's save_pretrained wrote."
        )
    with as_written(folder):
        config = _read_config(folder)
        settings = _settings(config, folder / ADAPTER, arch)
        return settings, _read_tensors(folder, settings, arch)


def write_peft(
    folder: str | Path, settings: LoraSettings, adapters: Adapters, *, base: str | Path
) -> None:
    """Write a folder, which must not exist, that PEFT loads on its model, with checksums.

    Args:
        base: where that model is, as the folder shall say.
    """
    folder = Path(folder)
    folder.mkdir()
    alpha = settings.alpha
    config = {
        "alpha_pattern": {},
        "base_model_name_or_path": str(base),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": list(settings.layers),
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": settings.dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": settings.rank,
        "rank_pattern": {},
        "target_modules": list(settings.targets),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }
    (folder / ADAPTER).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tensors = {
        key: adapters[layer][name].contiguous() for key, layer, name in _tensor_names(settings)
    }
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    write_checksums(folder)


def module_name(layer: int, target: str) -> str:
    """A projection by its name in Hugging Face's models."""
    return _MODULE.format(layer, _WITHIN[target])


def _tensor_names(settings: LoraSettings) -> Iterator[tuple[str, int, str]]:
    """Each tensor's name in the file, its layer, and its name there."""
    for layer in settings.layers:
        for target in settings.targets:
            for matrix in "ab":
                key = _KEY.format(module_name(layer, target), matrix.upper())
                yield key, layer, f"{target}.{matrix}"


def _read_config(folder: Path) -> dict:
    config, path = read_json(folder, ADAPTER), folder / ADAPTER
    check_fields(config, _FIELDS, path)
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ValueError(f"{path}: peft_type = {kind!r}: only 'LORA' is read; {_MERGE}.")
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        raise ValueError(
            f"{path}: task_type = {config['task_type']!r}: is no adapter of a causal language "
            "model ('CAUSAL_LM'), which is what trains here; give one that is."
        )
    if config.get("bias") not in (None, "none"):
        raise ValueError(
            f"{path}: bias = {config['bias']!r}: it changes the model's biases, which are frozen "
            f"here; {_MERGE}."
        )
    if config.get("init_lora_weights") not in _BEGINNINGS:
        raise ValueError(
            f"{path}: init_lora_weights = {config['init_lora_weights']!r}: took a part of the "
            "frozen weights into the adapter, which does not fit the model without that; save it "
            "with path_initial_model_for_weight_conversion (PEFT's save_pretrained)."
        )
    for name, value in config.items():
        if name in _FIELDS or name in _OF_NO_WEIGHT or not value:
            continue
        why = _WHY.get(name, "is not known here, and may change what the adapter computes")
        raise ValueError(f"{path}: {name} = {value!r}: {why}; {_MERGE}.")
    return config


def _settings(config: dict, path: Path, arch: Architecture) -> LoraSettings:
    for name in ("r", "lora_alpha", "target_modules"):
        if config.get(name) is None:
            raise ValueError(f"{path}: {name} is missing; save the adapter with PEFT again.")
    targets = _targets(config, path, arch)
    layers = sorted(targets)
    fields = ("target_modules", "exclude_modules", "layers_to_transform")
    asked = ", ".join(f"{name} = {config[name]!r}" for name in fields if config.get(name))
    if not layers:
        raise ValueError(
            f"{path}: {asked or 'target_modules = []'}: these are no projections of this model; "
            "the adapter belongs to another one."
        )
    if differing := [layer for layer in layers if targets[layer] != targets[layers[0]]]:
        raise ValueError(
            f"{path}: {asked}: adapts "
            f"{', '.join(targets[layers[0]])} in layer {layers[0]} and "
            f"{', '.join(targets[differing[0]])} in layer {differing[0]}; the projections must be "
            f"the same in all layers that have adapters; {_MERGE}."
        )
    rank, alpha = config["r"], float(config["lora_alpha"])
    return LoraSettings(
        rank=rank,
        alpha=alpha * math.sqrt(rank) if config.get("use_rslora") else alpha,
        dropout=float(config.get("lora_dropout") or 0.0),
        targets=targets[layers[0]],
        layers=tuple(layers),
    )


def _targets(config: dict, path: Path, arch: Architecture) -> dict[int, tuple[str, ...]]:
    """Each adapted layer's projections, found as PEFT finds its modules by their names."""
    asked = _matcher(config, "target_modules", path)
    excluded = _matcher(config, "exclude_modules", path)
    chosen = _layers(config, path, arch)
    if others := [name for name in _OTHERS if asked(name) and not excluded(name)]:
        raise ValueError(
            f"{path}: target_modules = {config['target_modules']!r}: adapts {' and '.join(others)},"
            f" and only layers' projections ({', '.join(arch.projections)}) have adapters here; "
            f"{_MERGE}."
        )
    modules = {
        layer: {target: module_name(layer, target) for target in arch.projections}
        for layer in range(arch.num_layers)
    }
    names = config["target_modules"] if isinstance(config["target_modules"], list) else ()
    every = [name for own in modules.values() for name in own.values()]
    if unknown := [name for name in names if not any(map(_ends_with(name), every))]:
        raise ValueError(
            f"{path}: target_modules: {', '.join(map(repr, unknown))} is no projection of this "
            f"model's {arch.num_layers} layers ({', '.join(arch.projections)}); take it out, or "
            "the adapter belongs to another model."
        )
    found = {
        layer: tuple(t for t, name in modules[layer].items() if asked(name) and not excluded(name))
        for layer in chosen
    }
    return {layer: targets for layer, targets in found.items() if targets}


def _layers(config: dict, path: Path, arch: Architecture) -> list[int]:
    listed, pattern = config.get("layers_to_transform"), config.get("layers_pattern")
    if listed is None or listed == []:
        return list(range(arch.num_layers))
    if isinstance(config["target_modules"], str):
        raise ValueError(
            f"{path}: layers_to_transform = {listed}: goes with a list of target_modules only, and "
            f"these are {config['target_modules']!r}; take one of the two out."
        )
    if pattern and "layers" not in ([pattern] if isinstance(pattern, str) else pattern):
        raise ValueError(
            f"{path}: layers_pattern = {pattern!r}: the layers of these models are 'layers'; the "
            "adapter belongs to another one."
        )
    listed = [listed] if is_whole(listed) else listed
    if outside := sorted(layer for layer in listed if not 0 <= layer < arch.num_layers):
        raise ValueError(
            f"{path}: layers_to_transform = {listed}: this model has layers 0 to "
            f"{arch.num_layers - 1}, not {outside}; the adapter belongs to another one."
        )
    return sorted(set(listed))


def _matcher(config: dict, field: str, path: Path) -> Callable[[str], bool]:
    """Whether PEFT finds a module by a field: a regular expression for its whole name, or names, of
    which each is its whole or its last parts."""
    value = config.get(field)
    if not value:
        return lambda name: False
    if isinstance(value, str):
        if value == ALL_LINEAR:
            return lambda name: name not in _OTHERS
        try:
            pattern = re.compile(value)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(
                f"{path}: {field} = {value!r}: is no regular expression: {error}."
            ) from error
        return lambda name: pattern.fullmatch(name) is not None
    return _ends_with(*value)


def _ends_with(*endings: str) -> Callable[[str], bool]:
    """Whether one of these is a module's whole name, or the last parts of it."""
    dotted = tuple(f".{ending}" for ending in endings)
    return lambda name: f".{name}".endswith(dotted)


def _read_tensors(folder: Path, settings: LoraSettings, arch: Architecture) -> Adapters:
    if not (folder / WEIGHTS).exists():
        pickled = sorted(path.name for path in folder.glob("*.bin"))
        hint = f" {pickled[0]} is a pickle, which is not read:" if pickled else ""
        raise ValueError(
            f"{folder}: has no {WEIGHTS};{hint} save the adapter with safe_serialization=True."
        )
    shapes = settings.shapes(arch.projections)
    adapters: Adapters = {layer: {} for layer in settings.layers}
    with HFReader(folder, file=WEIGHTS) as reader:
        held: dict[str, str] = {}
        for name in sorted(reader.names()):
            key = _NAMED.sub(r"\1\2", name)
            if key in held:
                _refuse(reader, name, f"is {held[key]} again; leave one of them out")
            held[key] = name
        wanted = list(_tensor_names(settings))
        refuse_difference(
            {key for key, _, _ in wanted} - held.keys(),
            {held[key] for key in held.keys() - {key for key, _, _ in wanted}},
            what="tensors",
            whose=f"the adapters that {ADAPTER} and the model ask for",
            folder=folder,
        )
        for key, layer, name in wanted:
            like = reader.like(held[key])
            if tuple(like.shape) != shapes[name]:
                _refuse(
                    reader,
                    held[key],
                    f"shape {tuple(like.shape)} instead of {shapes[name]}, by r = {settings.rank} "
                    "and this model; the adapter belongs to another one",
                )
            adapters[layer][name] = reader.tensor(held[key]).float().clone()
    return adapters


def _refuse(reader: HFReader, name: str, problem: str) -> NoReturn:
    raise ValueError(f"{reader.file(name)}: {name}: {problem}.")
