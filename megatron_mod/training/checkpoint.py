"""Saves what training changes (routers, optimizer, run state) and reads it back."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, tensor_parallel
from megatron.core.dist_checkpointing import ShardedObject, ShardedTensor
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor

from megatron_mod.conversion import checkpoint as layout
from megatron_mod.conversion.load import load_base as load_base
from megatron_mod.conversion.routers import AVERAGE, ROUTER
from megatron_mod.conversion.state import save_state
from megatron_mod.model.builder import ModelChunks
from megatron_mod.parallel import device
from megatron_mod.parallel.agree import on_first_rank
from megatron_mod.routing.capacity import CapacityController
from megatron_mod.training.average import RouterAverage
from megatron_mod.training.faults import FaultCounter, require_finite
from megatron_mod.training.metrics import Metrics
from megatron_mod.training.optimizer_state import OptimizerState


@dataclass
class RunState:
    """Everything that steps change. ``models``: this rank's chunks."""

    models: ModelChunks
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    controller: CapacityController
    average: RouterAverage
    metrics: Metrics
    faults: FaultCounter


def save_step(folder: Path, state: RunState, *, step: int, manifest: dict) -> None:
    """Fill a step's folder, which exists and is empty; called by all ranks."""
    require_finite(step, [router.weight for router in state.average.routers.values()])
    optimizer = OptimizerState(state.optimizer, state.models, loading=False)
    steps = optimizer.steps()
    routers = _routers(state.models)
    content = {
        "model": routers,
        "average": _average(routers, state.average, state.average.mean),
        "optimizer": optimizer.tensors() if steps else {},
        "random": _random_state(_read_random()),
        "common": {
            "step": step,
            "optimizer_steps": steps,
            "scheduler_steps": state.scheduler.num_steps,
            "averaged_steps": state.average.count,
            "controller": state.controller.state_dict(),
            "metrics": state.metrics.state_dict(),
            "faults": state.faults.state_dict(),
        },
    }
    target = folder / layout.STATE
    on_first_rank(target.mkdir)
    save_state(content, target)
    averaged = manifest["averaged"] and state.average.count > 0
    values = {"kind": "routers", "step": step, **manifest, "averaged": averaged}
    on_first_rank(lambda: layout.write_manifest(folder, values))


def load_step(folder: Path, state: RunState, *, same_topology: bool) -> int:
    """Put a step's folder, already verified, into the run; returns the step. All ranks.

    Random states belong to ranks and are read only if every rank is what it was.
    """
    target = str(folder / layout.STATE)
    common = dist_checkpointing.load_common_state_dict(target)["common"]
    routers = _routers(state.models)
    optimizer = OptimizerState(state.optimizer, state.models, loading=True)
    wanted = {"model": routers}
    if common["averaged_steps"]:
        empty = {layer: torch.empty_like(r.weight) for layer, r in state.average.routers.items()}
        wanted["average"] = _average(routers, state.average, empty)
    if common["optimizer_steps"]:
        wanted["optimizer"] = optimizer.tensors()
    if same_topology:
        wanted["random"] = _random_state(None)
    loaded = dist_checkpointing.load(wanted, target)

    by_layer = {_layer_of(key): tensor for key, tensor in loaded.get("model", {}).items()}
    for layer, router in state.average.routers.items():
        router.weight.data.copy_(by_layer[layer])
    if common["optimizer_steps"]:
        tensors = {**loaded.get("optimizer", {}), **loaded.get("model", {})}
        optimizer.load(tensors, steps=common["optimizer_steps"])
    state.scheduler.step(increment=common["scheduler_steps"] - state.scheduler.num_steps)
    state.average.count = common["averaged_steps"]
    state.average.mean = {_layer_of(key): t for key, t in loaded.get("average", {}).items()}
    state.controller.load_state_dict(common["controller"])
    state.metrics.load_state_dict(common["metrics"])
    state.faults.load_state_dict(common["faults"])
    if same_topology:
        _write_random(loaded["random"])
    return common["step"]


def _routers(models: ModelChunks) -> dict[str, ShardedTensor]:
    """This rank's routers by their keys in a checkpoint."""
    found = {}
    for model in models:
        for value in model.sharded_state_dict().values():
            if value.key.endswith(ROUTER):
                found[value.key] = value
    return found


def _average(
    routers: dict[str, ShardedTensor], average: RouterAverage, data: dict[int, Tensor]
) -> dict[str, ShardedTensor]:
    return {
        AVERAGE + key: replace(value, key=AVERAGE + key, data=data[_layer_of(key)])
        for key, value in routers.items()
        if _layer_of(key) in data
    }


def _layer_of(key: str) -> int:
    return int(re.search(r"decoder\.layers\.(\d+)\.", key)[1])


def _random_state(data: object) -> ShardedObject:
    return ShardedObject("random", data, (dist.get_world_size(),), (dist.get_rank(),))


def _read_random() -> dict:
    tracker = tensor_parallel.get_cuda_rng_tracker().get_states()
    found = {"torch": torch.get_rng_state(), "megatron": dict(tracker)}
    return {**found, "cuda": torch.cuda.get_rng_state()} if device.HAS_GPU else found


def _write_random(states: dict) -> None:
    tensor_parallel.get_cuda_rng_tracker().set_states(states["megatron"])
    torch.set_rng_state(states["torch"])
    if device.HAS_GPU:
        torch.cuda.set_rng_state(states["cuda"])


def frozen_digests(model: torch.nn.Module) -> dict[str, str]:
    """A digest of every frozen parameter of this rank, to the last bit."""
    return {
        name: hashlib.blake2b(
            parameter.detach().cpu().contiguous().view(torch.uint8).numpy(), digest_size=16
        ).hexdigest()
        for name, parameter in model.named_parameters()
        if not parameter.requires_grad
    }


def count_changed(before: dict[str, str], after: dict[str, str]) -> int:
    """Frozen parameters, over all ranks, whose digest changed."""
    changed = torch.tensor(sum(before[name] != after[name] for name in before))
    changed = changed.to(device.device())
    dist.all_reduce(changed)
    return int(changed)


def write_json(path: Path, values: dict) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
