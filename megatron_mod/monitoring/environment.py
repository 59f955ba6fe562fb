"""``environment.json``: what it takes to repeat a run, for each time that it was started."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import megatron_mod
from megatron_mod.checkpoint.folders import write_durably
from megatron_mod.config.schema import Config
from megatron_mod.parallel import device

FILE = "environment.json"
PACKAGES = (
    "torch", "megatron-core", "transformers", "transformer-engine", "safetensors", "numpy",
    "tensorboard", "wandb",
)  # fmt: skip
# What is recorded of the environment: nothing else, as anything may hold a secret.
VARIABLES = (
    "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_MAX_CONNECTIONS", "CUDA_LAUNCH_BLOCKING",
    "CUBLAS_WORKSPACE_CONFIG", "NVIDIA_TF32_OVERRIDE", "OMP_NUM_THREADS", "MKL_NUM_THREADS",
    "PYTHONHASHSEED", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "LD_PRELOAD",
    "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TORCHELASTIC_RESTART_COUNT",
    "TORCHELASTIC_MAX_RESTARTS", "TORCH_NCCL_ASYNC_ERROR_HANDLING", "TORCH_DISTRIBUTED_DEBUG",
    "NCCL_DEBUG", "NCCL_ALGO", "NCCL_PROTO", "NCCL_IB_DISABLE", "NCCL_IB_HCA", "NCCL_P2P_DISABLE",
    "NCCL_SHM_DISABLE", "NCCL_SOCKET_IFNAME", "NCCL_NVLS_ENABLE", "GLOO_SOCKET_IFNAME",
    "NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN",
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO",
)  # fmt: skip
SLURM = (
    "SLURM_JOB_ID", "SLURM_JOB_NAME", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID",
    "SLURM_RESTART_COUNT", "SLURM_JOB_NODELIST", "SLURM_JOB_NUM_NODES", "SLURM_NTASKS",
    "SLURM_JOB_PARTITION", "SLURM_CLUSTER_NAME",
)  # fmt: skip
_ROOT = Path(megatron_mod.__file__).resolve().parents[1]
_SECONDS_FOR_GIT = 10


def read_starts(folder: Path) -> list[dict]:
    """Every start of the run in a folder; none where the file is missing or damaged."""
    try:
        found = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return found if isinstance(found, list) and all(isinstance(x, dict) for x in found) else []


def record_start(config: Config, *, after: int) -> None:
    """Add this start of a run, after so many steps, to its folder's file; called by all ranks.

    Raises:
        ValueError: it cannot be written.
    """
    mine = {
        "rank": dist.get_rank(),
        "host": socket.gethostname(),
        "device": device.describe(),
    }
    ranks: list = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, mine)
    if dist.get_rank():
        return
    folder = Path(config.checkpoint.save)
    start = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "after_step": after,
        "command": shlex.join(command()),
        "folder": os.getcwd(),
        "git": git(_ROOT),
        "versions": versions(),
        "ranks": ranks,
        "slurm": among(SLURM, os.environ),
        "environment": among(VARIABLES, os.environ),
        "configuration": dataclasses.asdict(config),
    }
    write_durably(folder / FILE, json.dumps([*read_starts(folder), start], indent=1) + "\n")


def command() -> list[str]:
    """What was typed: the command of torchrun, if that started this process, else our own."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        try:
            words = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().decode(errors="replace")
        except OSError:
            pass
        else:
            return words.rstrip("\0").split("\0")
    return [sys.executable, *sys.argv]


def versions() -> dict[str, str | None]:
    """Of Python, this package and the libraries whose code runs; ``None``: not installed."""
    found: dict[str, str | None] = {
        "python": platform.python_version(),
        megatron_mod.__name__: megatron_mod.__version__,
    }
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return {**found, "cuda": torch.version.cuda}


def git(folder: Path) -> dict[str, Any] | None:
    """The commit that is checked out in a folder, and whether nothing in it differs from that;
    ``None``: it is the top of no repository, or there is no git."""
    try:
        top, commit = _git(folder, "rev-parse", "--show-toplevel", "HEAD").split("\n")[:2]
        if Path(top).resolve() != folder:
            return None
        return {"commit": commit, "clean": not _git(folder, "status", "--porcelain")}
    except (OSError, subprocess.SubprocessError, ValueError):
        return None


def _git(folder: Path, *words: str) -> str:
    return subprocess.run(
        ["git", "-C", str(folder), *words],
        capture_output=True,
        text=True,
        check=True,
        timeout=_SECONDS_FOR_GIT,
    ).stdout


def among(names: tuple[str, ...], environment: Mapping[str, str]) -> dict[str, str]:
    """Those of the environment's variables that are set."""
    return {name: environment[name] for name in names if name in environment}
