"""The machine as its system and its driver show it, and settings that act on the ranks."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import subprocess
from collections.abc import Mapping
from pathlib import Path

from megatron_mod.doctor.findings import Findings

# Variables that libraries obey, and that a shell's start-up file or a container may have set.
OBEYED = (
    "NCCL_", "TORCH_NCCL_", "GLOO_", "TORCH_DISTRIBUTED_", "NVTE_", "CUDA_VISIBLE_DEVICES",
    "CUDA_DEVICE_MAX_CONNECTIONS", "CUDA_LAUNCH_BLOCKING", "PYTORCH_CUDA_ALLOC_CONF", "LD_PRELOAD",
    "OMP_NUM_THREADS", "MKL_NUM_THREADS", "MASTER_ADDR", "MASTER_PORT",
)  # fmt: skip
SHARED_MEMORY = Path("/dev/shm")
LEAST_SHARED_MEMORY = 2**28  # bytes; nccl takes tens of megabytes for each pair of ranks


def machine(findings: Findings, environment: Mapping[str, str] = os.environ) -> dict:
    """Processor, memory, driver, GPUs as the driver lists them, and the environment's settings."""
    shared = shutil.disk_usage(SHARED_MEMORY) if SHARED_MEMORY.is_dir() else None
    driver, gpus = _driver()
    cores = _cores()
    settings = {k: v for k, v in sorted(environment.items()) if k.startswith(OBEYED)}
    if shared and shared.free < LEAST_SHARED_MEMORY:
        findings.warn(
            f"{SHARED_MEMORY} has {shared.free / 2**20:.0f} MiB left, through which the ranks of a "
            "machine talk",
            "give a container more (docker run --shm-size=8g), or empty it",
        )
    _check(settings, cores, findings)
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cores": cores,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "shared_memory_bytes": shared and shared.total,
        "driver": driver,
        "gpus": gpus,
        "environment": settings,
    }


def _check(settings: Mapping[str, str], cores: int, findings: Findings) -> None:
    threads = settings.get("OMP_NUM_THREADS", "")
    if threads.isdigit() and int(threads) > cores:
        findings.warn(
            f"OMP_NUM_THREADS={threads}: every rank starts so many threads on {cores} core(s)",
            "set it to the cores of a rank, or unset it: torchrun makes it 1",
        )
    here = {name for _, name in socket.if_nameindex()}
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        wanted = settings.get(variable)
        if wanted and not _names_one(wanted, here, prefixes=variable.startswith("NCCL")):
            findings.warn(
                f"{variable}={wanted}: this machine has no such network interface, only "
                f"{', '.join(sorted(here))}",
                f"set it to one of them, or unset {variable}",
            )
    if settings.get("CUDA_LAUNCH_BLOCKING") == "1":
        findings.warn("CUDA_LAUNCH_BLOCKING=1: the host waits for every kernel", "unset it")


def _names_one(wanted: str, here: set[str], *, prefixes: bool) -> bool:
    """Whether a list of network interfaces has one of these; nccl's are prefixes, after ``=`` whole
    names and after ``^`` what is left out."""
    if prefixes and wanted.startswith("^"):
        return True
    names = wanted.removeprefix("=").split(",") if prefixes else wanted.split(",")
    if prefixes and not wanted.startswith("="):
        return any(interface.startswith(tuple(names)) for interface in here)
    return not here.isdisjoint(names)


def _cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _driver() -> tuple[str | None, list[str]]:
    """NVIDIA's driver and the GPUs it lists, if any."""
    query = ["nvidia-smi", "--query-gpu=driver_version,name", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None, []
    rows = [line.split(", ", 1) for line in done.stdout.splitlines()] if not done.returncode else []
    return (rows[0][0], [row[-1] for row in rows]) if rows else (None, [])
