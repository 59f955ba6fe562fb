"""Routers on disk: in our step folders, and in the folders of the published Router-Tuning code."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TypeAlias

import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_mod.checkpoint.distributed import save_tensors
from megatron_mod.checkpoint.export_checksums import as_written
from megatron_mod.checkpoint.manifest import (
    MANIFEST,
    STATE,
    read_manifest,
    resolve_step,
    verify_checkpoint,
    write_manifest,
)
from megatron_mod.conversion.config_types import (
    COUNT,
    NUMBER,
    OBJECT,
    TEXT,
    Kind,
    check_fields,
    is_list,
    is_share,
)
from megatron_mod.conversion.finite import cast
from megatron_mod.conversion.hf_reader import HFReader, read_config
from megatron_mod.conversion.lora import is_adapter
from megatron_mod.conversion.source import Source
from megatron_mod.conversion.step_tensors import read_layers, require_shapes
from megatron_mod.hf.thresholds_mod import threshold_at
from megatron_mod.model.architecture import Architecture
from megatron_mod.routing.config import AUTO, RoutingConfig, logit_border
from megatron_mod.routing.scheme import OF_ANY_MODEL, Scheme

Added: TypeAlias = dict[int, dict[str, Tensor]]
"""What routed layers have beside dense ones: tensors by layer and by their names in it, which are
the same in Megatron's layer and in Hugging Face's (``RoutingConfig.added_shapes``)."""

KEY = "decoder.layers.{}.{}"
HF_KEY = "model.layers.{}.{}"
ROUTER, BIAS = "router.weight", "router.bias"
PUBLISHED = tuple(name for name in OF_ANY_MODEL if "+" not in name)  # with one router a layer
ROUTERS, PREDICTORS = "router.", "predictor."  # what their names begin with, which stay fp32
OURS = "megatron_mod"  # the published config's field for settings it has none for


def read_routers(folder: str | Path, arch: Architecture) -> tuple[RoutingConfig, Added]:
    """Settings and what was added, from a run of ours, one of its steps, or a folder of the
    published code; called by all ranks alike.

    Raises:
        ValueError: not such a folder, or routers that do not fit the model.
    """
    step = resolve_step(folder)
    if (step / MANIFEST).is_file():
        routing = _routing_of(verify_checkpoint(step), folder)
        added = read_step(step, routing)
    else:
        with as_written(folder):
            routing, added = _read_published(Path(folder))
    _check_fit(Path(folder), routing, added, arch)
    return routing, added


def read_routing(folder: str | Path) -> RoutingConfig:
    """The settings alone, as ``read_routers`` reads them; called by one rank or many."""
    step = resolve_step(folder)
    if not (step / MANIFEST).is_file():
        return _read_published(Path(folder))[0]
    return _routing_of(read_manifest(step), folder)


def _routing_of(manifest: dict, folder: str | Path) -> RoutingConfig:
    if manifest["kind"] != "routers" or not manifest["routing"]["layers"]:
        raise ValueError(f"{folder}: holds no routers; give a training run or a published one.")
    return RoutingConfig.from_dict(manifest["routing"])


def read_source(source: Source) -> tuple[RoutingConfig, Added] | None:
    """Settings and what was added, of an opened run or base; ``None`` of a base without routers.

    Raises:
        ValueError: they are not finite, or do not fit each other or the model.
    """
    if source.routing is None:
        return None
    added = read_step(source.step, source.routing)
    _check_fit(source.step, source.routing, added, source.base.arch)
    return source.routing, added


def read_step(step: Path, routing: RoutingConfig) -> Added:
    """What was added, of a step folder; averaged if the training averaged it.

    Raises:
        ValueError: it is not what ``routing`` says, or not finite.
    """
    return read_layers(
        step,
        routing.layers,
        routing.added_names,
        key=KEY,
        what="routers",
        is_one=lambda key: not is_adapter(key),
    )


def hf_tensors(added: Added, dtype: torch.dtype) -> dict[str, Tensor]:
    """What was added by its names in an export of this dtype: routers and predictors stay fp32,
    stand-ins are computed in it.

    Raises:
        ValueError: a value is too large for the dtype.
    """
    tensors = {}
    for layer, own in added.items():
        for name, tensor in own.items():
            key = HF_KEY.format(layer, name)
            to = torch.float32 if name.startswith((ROUTERS, PREDICTORS)) else dtype
            tensors[key] = cast(tensor, to, key)
    return tensors


def write_step(
    folder: Path, routing: RoutingConfig, added: Added, *, base: str, fingerprint: str
) -> None:
    """Write routers alone as a step folder, which a base refers to and training can start from."""
    folder.mkdir()
    tensors = {KEY.format(k, name): v for k, own in added.items() for name, v in own.items()}
    save_tensors(tensors, folder / STATE)
    manifest = {
        "kind": "routers",
        "step": 0,
        "base": base,
        "base_fingerprint": fingerprint,
        "routing": routing.to_dict(),
    }
    write_manifest(folder, manifest)


def write_published(folder: Path, routing: RoutingConfig, added: Added, hf_config: dict) -> None:
    """Fill a folder as the published code saves routers: its config fields, and their weights.

    What it has no field for is in one of our own, which it does not read. A bias that is the same
    in all layers becomes part of the threshold.

    Raises:
        ValueError: thresholds or biases that differ, or stand-ins or an exact number of tokens,
            which the published code does not know.
    """
    if routing.is_exact:
        raise ValueError(
            f"--routers-only: router.selection = {routing.selection}: the published format has "
            "routers that decide by a threshold and multiply nothing; export the whole model."
        )
    if routing.scheme.per_expert:
        raise ValueError(
            f"--routers-only: router.granularity = {routing.granularity}: the published format has "
            "no routers on experts; export the whole model."
        )
    if routing.stand_in_rank:
        raise ValueError(
            "--routers-only: what is skipped has a stand-in, which the published format does not "
            "know; train with router.stand_in none, or export the whole model."
        )
    if len(routing.scheme.targets) > 1:
        raise ValueError(
            f"--routers-only: router.granularity = {routing.granularity}: the published format has "
            "one router a layer; export the whole model."
        )
    if routing.budgets:
        raise ValueError(
            "--routers-only: routers that serve a range of budgets (router.work) are not known to "
            "the published format; export the whole model."
        )
    thresholds = {
        logit_border(threshold) - float(added[layer].get(BIAS, 0.0))
        for layer, threshold in zip(routing.layers, routing.thresholds, strict=True)
    }
    if len(thresholds) > 1:
        what, remedy = "thresholds", "calibrate with --scope model"
        if routing.bias:
            what, remedy = "biases or thresholds", "train with router.bias false"
        raise ValueError(
            f"--routers-only: the layers' {what} differ, and the published format has one "
            f"threshold for all; {remedy}, or export the whole model."
        )
    weight = routing.capacity_loss_weight
    routed = [layer in routing.layers for layer in range(hf_config["num_hidden_layers"])]
    target = dict(zip(routing.layers, routing.capacity, strict=True))
    config = {
        **hf_config,
        "is_mod": routed,
        "granularity": routing.granularity,
        "threshold": threshold_at(thresholds.pop()) if routing.bias else routing.thresholds[0],
        "mod_capacity": [target.get(layer) for layer in range(len(routed))],
        "gradient_scale": None if weight == AUTO else weight,
        OURS: {name: getattr(routing, name) for name in _OURS},
    }
    text = json.dumps(config, indent=2) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
    weights = {layer: {ROUTER: own[ROUTER].contiguous()} for layer, own in added.items()}
    tensors = hf_tensors(weights, torch.float32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


_SHARE_OR_NULL = Kind("a number from 0 to 1", lambda v: v is None or is_share(v))
_PUBLISHED = {
    "is_mod": Kind(
        "a list of true and false, one for each layer",
        lambda v: is_list(v, lambda routed: routed in (0, 1)) and any(v),
    ),
    "num_hidden_layers": COUNT,
    "granularity": TEXT,
    "threshold": _SHARE_OR_NULL,
    "mod_capacity": Kind(
        "a number from 0 to 1, or one for each layer",
        lambda v: is_share(v) or is_list(v, _SHARE_OR_NULL.accepts),
    ),
    "gradient_scale": NUMBER,
    OURS: OBJECT,
}
_OURS = {
    "pooling": Kind("'prompt' or 'all'", lambda v: v in ("prompt", "all")),
    "keys_values": Kind("'all' or 'selected'", lambda v: v in ("all", "selected")),
    "scope": Kind("'layer' or 'model'", lambda v: v in ("layer", "model")),
    "capacity_warmup_fraction": Kind("a number from 0 to 1", is_share),
    "training_compute": TEXT,
}


def _read_published(folder: Path) -> tuple[RoutingConfig, Added]:
    config, path = read_config(folder), folder / "config.json"
    if config.get("is_mod") is None:
        raise ValueError(
            f"{path}: has no is_mod, so the folder holds no routers of the published code."
        )
    check_fields(config, _PUBLISHED, path)
    routed = config["is_mod"]
    layers = tuple(index for index, is_routed in enumerate(routed) if is_routed)
    if len(routed) != config.get("num_hidden_layers", len(routed)):
        raise ValueError(
            f"{path}: is_mod has {len(routed)} values for {config['num_hidden_layers']} layers."
        )
    granularity = str(config.get("granularity") or "attn_sequence").lower().replace("-", "_")
    if granularity in ("sequence", "token"):  # its first release routed nothing but attention
        granularity = f"attn_{granularity}"
    if granularity not in PUBLISHED:
        raise ValueError(
            f"{path}: granularity = {config['granularity']!r} is not supported; it must be one of "
            f"{', '.join(PUBLISHED)}."
        )
    target = config.get("mod_capacity")
    targets = target if isinstance(target, list) else [target] * len(routed)
    if len(targets) != len(routed):
        raise ValueError(
            f"{path}: mod_capacity has {len(targets)} values for {len(routed)} layers."
        )
    ours = config.get(OURS) or {}
    check_fields(ours, _OURS, path, within=f"{OURS}.")
    threshold = config.get("threshold")
    settings = {
        "scope": "layer",
        "pooling": "all" if Scheme.parse(granularity).per_sequence else None,
        **{name: ours[name] for name in _OURS if ours.get(name) is not None},
    }
    try:
        routing = RoutingConfig(
            granularity=granularity,
            layers=layers,
            capacity=tuple(targets[layer] or 1.0 for layer in layers),  # none is no target at all
            capacity_loss_weight=float(config.get("gradient_scale") or 0.0),
            threshold=0.5 if threshold is None else float(threshold),
            **settings,
        )
    except ValueError as error:
        raise ValueError(f"{path}: {OURS}: {error}") from error
    pattern = re.compile(r"model\.layers\.(\d+)\.((router|stand_in)\..+)")
    added: Added = {}
    with HFReader(folder) as reader:
        for key in sorted(reader.names()):
            if not (match := pattern.fullmatch(key)):
                continue  # the model's own, of which some releases of that code saved all
            if match[2] != ROUTER:
                raise ValueError(
                    f"{reader.file(key)}: {key}: the published format has no biases and no "
                    "stand-ins; give the run that they come from."
                )
            added[int(match[1])] = {ROUTER: reader.tensor(key).float().clone()}
    return routing, dict(sorted(added.items()))


def _check_fit(folder: Path, routing: RoutingConfig, added: Added, arch: Architecture) -> None:
    if set(added) != set(routing.layers):
        raise ValueError(
            f"{folder}: holds routers of layers {sorted(added)}, but its config routes layers "
            f"{list(routing.layers)}."
        )
    outside = [layer for layer in added if layer >= arch.num_layers]
    if outside or not added:
        raise ValueError(
            f"{folder}: routers of layers {outside or 'none'}; this model has layers 0 to "
            f"{arch.num_layers - 1}."
        )
    require_shapes(
        folder,
        added,
        routing.added_shapes(arch.hidden_size, num_experts=arch.num_experts),
        call=lambda name: f"the {'router' if name == ROUTER else name}",
    )
