"""All that is asked of a machine, in order."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import megatron_mod
from megatron_mod.doctor.collective import try_collective
from megatron_mod.doctor.findings import Findings
from megatron_mod.doctor.machine import machine
from megatron_mod.doctor.versions import INSTALL, versions

ROOT = Path(megatron_mod.__file__).resolve().parents[1]
SECONDS = 300  # for importing everything
RANKS_ON_CPU = 2
NVIDIA_APEX = "NVIDIA's is built from its own repository, and Transformer Engine does without it"


def diagnose() -> dict:
    """Versions, machine, what a training would use, and whether ranks can talk: what ``--json``
    writes. ``can_train`` is whether ``problems`` is empty."""
    findings = Findings()
    found: dict = {"versions": versions(findings), "machine": machine(findings)}
    environment = _environment()
    probed = _probe(environment, findings)
    torch = probed.get("torch")
    found["torch"] = torch
    found["uses"] = probed.get("uses")
    found["collective"] = None
    if torch:
        _check_gpus(found["machine"], torch, findings)
        ranks = len(torch["gpus"]) or RANKS_ON_CPU
        found["collective"] = collective = try_collective(ranks, environment)
        if not collective["works"]:
            findings.problem(
                f"an all-reduce of {ranks} rank(s) on this machine fails: {collective['error']}",
                "see which of the environment's settings are meant for another machine, and "
                "whether the host's own name can be resolved",
            )
    if reason := probed.get("apex"):
        version = found["versions"]["apex"]["version"] or "of unknown version"
        remedy = f"pip uninstall apex ({NVIDIA_APEX})"
        findings.warn(f"apex {version} is not used: {reason}", remedy)
    return {"can_train": not findings.problems, "folder": str(ROOT), **found, **vars(findings)}


def _environment() -> dict[str, str]:
    """For processes that find this package where this one did, and are no ranks of another job."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


def _probe(environment: dict[str, str], findings: Findings) -> dict:
    """What ``probe.py`` found, by step."""
    ended = ""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "found")
        command = [sys.executable, "-m", "megatron_mod.doctor.probe", str(file)]
        try:
            done = subprocess.run(command, env=environment, capture_output=True, timeout=SECONDS)
            ended = f"ends Python with status {done.returncode} (negative: a signal's number)"
        except subprocess.TimeoutExpired:
            ended = f"has not ended after {SECONDS} seconds"
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    told = {line["step"]: line for line in map(json.loads, lines)}
    if not told:
        findings.problem(f"a process of {sys.executable} {ended}", INSTALL)
    known: set[str] = set()
    for step, line in told.items():
        what = "asking what a training uses" if step == "uses" else f"importing {step}"
        if "found" in line:
            continue
        if "error" not in line:
            findings.problem(f"{what} {ended}", "install it again, built for what is here")
        elif step == "transformer_engine":
            findings.warn(
                f"{what} fails, so it is not used: {line['error']}",
                "install the release that was built for this torch and its CUDA, or uninstall it",
            )
        elif line["error"] not in known:  # once, not from all that import it
            findings.problem(f"{what} fails: {line['error']}", INSTALL)
        known.add(line.get("error", ""))
    return {step: line.get("found") for step, line in told.items()}


def _check_gpus(seen: dict, torch: dict, findings: Findings) -> None:
    """Why torch does not use the GPUs that the driver lists, if so."""
    for text in torch["warnings"]:
        findings.warn(f"torch says: {text}", "see PyTorch's installation page")
    if torch["uses_gpus"] or not seen["gpus"]:
        return
    gpus = f"this machine has {len(seen['gpus'])} GPU(s), which are not used"
    visible = seen["environment"].get("CUDA_VISIBLE_DEVICES")
    if torch["cuda"] is None:
        findings.warn(
            f"{gpus}: torch is built for the CPU",
            "install a torch that is built for CUDA, as PyTorch's installation page says",
        )
    elif visible is not None:
        findings.warn(f"{gpus}: CUDA_VISIBLE_DEVICES={visible}", "unset it")
    else:
        findings.warn(
            f"{gpus}: torch is built for CUDA {torch['cuda']}, the driver is {seen['driver']}",
            "install a newer driver, or a torch that is built for an older CUDA",
        )
