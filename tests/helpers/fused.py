"""Folders of mixtures with all experts of a layer in one tensor, as Transformers 5.x saves them
with ``save_original_format=False``."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.helpers.broken import WEIGHTS
from tests.helpers.tiny import EXPERTS

_EXPERT = re.compile(r"(model\.layers\.\d+)\.\w+\.experts\.0\.(?:gate_proj|w1)\.weight")
_OWN = {"mlp": ("gate_proj", "up_proj", "down_proj"), "block_sparse_moe": ("w1", "w3", "w2")}


def fuse(hf: Path, save: Path) -> Path:
    """Copy a folder of one of ``tiny.MIXTURES``, its experts fused."""
    shutil.copytree(hf, save)
    tensors = load_file(hf / WEIGHTS)
    for layer in [m[1] for m in map(_EXPERT.fullmatch, list(tensors)) if m]:
        block = next(b for b in _OWN if f"{layer}.{b}.gate.weight" in tensors)
        gate, up, down = (
            [tensors.pop(f"{layer}.{block}.experts.{e}.{own}.weight") for e in range(EXPERTS)]
            for own in _OWN[block]
        )
        both = [torch.cat(pair) for pair in zip(gate, up, strict=True)]
        tensors[f"{layer}.mlp.experts.gate_up_proj"] = torch.stack(both)
        tensors[f"{layer}.mlp.experts.down_proj"] = torch.stack(down)
        tensors[f"{layer}.mlp.gate.weight"] = tensors.pop(f"{layer}.{block}.gate.weight")
    save_file(tensors, save / WEIGHTS, metadata={"format": "pt"})
    return save
