"""What is installed, on which device, and what is missing; exit status 1 if something is."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import platform
import sys
from pathlib import Path

NEEDED = (
    "torch", "numpy", "transformers", "safetensors", "tokenizers", "megatron.core", "psutil",
    "jsonargparse", "docstring_parser", "yaml", "rich", "tqdm", "filelock", "jinja2", "xxhash",
    "datasets", "pytest",
)  # fmt: skip
WANTED = ("transformer_engine.pytorch", "flash_attn", "xdist", "matplotlib", "lm_eval")
NAMES = {"megatron.core": "megatron-core", "transformer_engine.pytorch": "transformer_engine"}


def diagnose() -> dict:
    """Versions, the device, and ``problems``: what keeps the rest from running."""
    found: dict = {
        "python": platform.python_version(),
        "versions": {},
        "missing": {},
        "problems": [],
    }
    from megatron_mod import parallel  # noqa: F401  (readies torch for Megatron)

    for name in (*NEEDED, *WANTED):
        try:
            importlib.import_module(name)
            found["versions"][name] = _version(NAMES.get(name, name))
        except Exception as error:  # libraries of another build fail with anything
            found["missing"][name] = f"{type(error).__name__}: {error}"[:500]
            if name in NEEDED:
                found["problems"].append(f"{name} does not import: {found['missing'][name]}")
    import torch

    found["cuda"] = torch.version.cuda
    if not torch.cuda.is_available():
        kind = "a build for the CPU" if torch.version.cuda is None else f"CUDA {torch.version.cuda}"
        found["problems"].append(f"torch {torch.__version__} ({kind}) finds no CUDA device")
        return found
    properties = torch.cuda.get_device_properties(0)
    found.update(
        device=properties.name,
        devices=torch.cuda.device_count(),
        memory_gb=round(properties.total_memory / 1e9, 1),
        capability=[properties.major, properties.minor],
        cudnn=torch.backends.cudnn.version(),
        nccl=".".join(map(str, torch.cuda.nccl.version())),
    )
    return found


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def main(path: str) -> int:
    found = diagnose()
    engine = found["versions"].get("transformer_engine.pytorch")
    found["summary"] = (
        f"{found.get('device', 'no GPU')}, torch {found['versions'].get('torch')}, megatron-core "
        f"{found['versions'].get('megatron.core')}, Transformer Engine {engine or 'missing'}"
    )
    Path(path).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for problem in found["problems"]:
        print(problem)
    return 1 if found["problems"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
