"""Loads the frozen base and saves what training changes: routers, optimizer, schedule."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_mod.conversion import checkpoint as layout
from megatron_mod.conversion.load import load_base as load_base
from megatron_mod.model.builder import RoutedGPTModel
from megatron_mod.parallel import device
from megatron_mod.routing.config import RoutingConfig

ROUTER = "self_attention.router.weight"
NOT_IN_BASE = (ROUTER, "_extra_state")
# A distributed optimizer's state as any other topology, or a plain optimizer, can read it.
OPTIMIZER_FORMAT = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
}


def load_routers(model: RoutedGPTModel, step: str | Path) -> None:
    """Fill the routers from a step folder of a training run."""
    state = Path(step) / layout.STATE
    wanted = {k: v for k, v in model.sharded_state_dict().items() if k.endswith(ROUTER)}
    loaded = dist_checkpointing.load({"model": wanted}, str(state))["model"]
    model.load_state_dict(loaded, strict=False)


def save_step(
    run: str | Path,
    *,
    step: int,
    base: str | Path,
    routing: RoutingConfig,
    model: RoutedGPTModel,
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    state: dict,
) -> None:
    """Write ``RUN/step_<number>`` and point ``RUN/latest`` at it; called by all ranks.

    The folder is written under another name and renamed when it is whole.
    """
    folder = Path(run) / f"step_{step:08d}"
    partial = folder.with_name(f".{folder.name}.incomplete")
    target = partial / layout.STATE
    if dist.get_rank() == 0:
        target.mkdir(parents=True)
    dist.barrier()
    routers = {k: v for k, v in model.sharded_state_dict().items() if k.endswith(ROUTER)}
    content = {"model": routers, "scheduler": scheduler.state_dict(), "run": state}
    if not optimizer.is_stub_optimizer:
        content["optimizer"] = optimizer.sharded_state_dict(
            model.sharded_state_dict(), metadata=OPTIMIZER_FORMAT
        )
    dist_checkpointing.save(content, str(target), validate_access_integrity=False)
    if dist.get_rank() == 0:
        manifest = {
            "kind": "routers",
            "step": step,
            "base": str(Path(base).resolve()),
            "routing": routing.to_dict(),
        }
        layout.write_manifest(partial, manifest)
        partial.rename(folder)
        pointer = Path(run) / f".{layout.LATEST}.new"
        pointer.write_text(folder.name + "\n", encoding="utf-8")
        pointer.rename(Path(run) / layout.LATEST)
    dist.barrier()


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
