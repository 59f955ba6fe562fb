"""Imports what a training imports, and asks it what it would use.

It is a process of its own, as a library that was built for another may end one without a word. Into
the file that is its argument it writes JSON objects, one a line: ``{"step": ...}`` when it begins
something, and the same with ``"found"`` or ``"error"`` when that has ended.
"""

from __future__ import annotations

import importlib
import json
import sys
import warnings
from collections.abc import Callable
from importlib.util import find_spec

ENGINE = "transformer_engine"


def _torch() -> dict:
    import torch

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
        gpus = [torch.cuda.get_device_properties(k) for k in range(torch.cuda.device_count())]
    return {
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if torch.version.cuda else None,
        "uses_gpus": available,
        "gpus": [
            {
                "name": gpu.name,
                "memory_bytes": gpu.total_memory,
                "capability": f"{gpu.major}.{gpu.minor}",
            }
            for gpu in (gpus if available else [])
        ],
        "warnings": [str(warning.message).splitlines()[0] for warning in said],
    }


def _transformers() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401


def _apex() -> str | None:
    """What is wrong with it."""
    from megatron_mod.parallel.optional import why_not_apex

    return why_not_apex()


def _megatron() -> None:
    importlib.import_module("megatron_mod.parallel")  # readies torch
    importlib.import_module("megatron.core.models.gpt")


def _trainer() -> None:
    importlib.import_module("megatron_mod.training.loop")


def _transformer_engine() -> None:
    if find_spec(ENGINE):
        importlib.import_module(f"{ENGINE}.pytorch")


def _uses() -> dict[str, dict]:
    from megatron_mod.model.specs import choose_implementation, why_not_transformer_engine
    from megatron_mod.parallel import device
    from megatron_mod.parallel.optional import why_not_apex
    from megatron_mod.training.kernels import kernels

    device.select()
    used = kernels(choose_implementation())
    no_engine = why_not_transformer_engine()
    no_fused = None
    if "(torch)" in used["optimizer"]:
        no_fused = no_engine
        if device.HAS_GPU:
            no_fused = f"{no_engine}; apex: {why_not_apex() or 'it is not installed'}"
    engine = "Transformer Engine's"
    better = {
        "attention": (engine, no_engine),
        "norms": (engine, no_engine),
        "optimizer": ("a fused Adam of Transformer Engine or apex", no_fused),
        "communication": ("nccl", None if device.HAS_GPU else "there is no GPU"),
    }
    found = {}
    for part, what in used.items():
        other, why = better[part]
        found[part] = {"what": what, "better": other if why else None, "why_not": why}
    return found


STEPS: dict[str, Callable[[], object]] = {
    "torch": _torch,
    "transformers": _transformers,
    "apex": _apex,
    "megatron.core": _megatron,
    ENGINE: _transformer_engine,
    "megatron_mod": _trainer,
    "uses": _uses,
}


def main() -> None:
    with open(sys.argv[1], "w", encoding="utf-8") as file:

        def write(**values: object) -> None:
            print(json.dumps(values), file=file, flush=True)

        for step, ask in STEPS.items():
            write(step=step)
            try:
                write(step=step, found=ask())
            except Exception as error:
                lines = str(error).strip().splitlines() or [""]
                write(step=step, error=f"{type(error).__name__}: {lines[0]}")


if __name__ == "__main__":
    main()
