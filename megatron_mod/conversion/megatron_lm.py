"""Distributed checkpoints that Megatron-LM and Megatron-Bridge wrote.

Both name parameters as Megatron-core does. They differ from ours in the folder (one per iteration),
in layers that may be stacked in one tensor, and in a vocabulary padded to their own multiple.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from torch import Tensor

from megatron_mod.checkpoint.distributed import StateReader, load_state

_TRACKER = "latest_checkpointed_iteration.txt"
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")


def find_iteration(path: Path) -> Path | None:
    """The distributed checkpoint in a folder of theirs (its newest iteration), or ``None``.

    Raises:
        ValueError: their file that names the newest names none.
    """
    tracker = path / _TRACKER
    if tracker.is_file():
        name = tracker.read_bytes().strip()
        if not re.fullmatch(rb"[0-9]{1,9}|release", name):
            raise ValueError(f"{tracker}: holds {name[:40]!r} and no iteration's number.")
        path = path / (f"iter_{int(name):07d}" if name.isdigit() else name.decode())
    return path if (path / "metadata.json").is_file() and (path / ".metadata").is_file() else None


def has_stacked_layers(state: Path) -> bool:
    """Whether each parameter of all layers is one tensor with the layers as its first dim."""
    names = StateReader(state).names()
    return any(n.startswith("decoder.layers.") and not _LAYER.match(n) for n in names)


class LayerReader:
    """Reads parameters by the names our tables use, one layer at a time (one process)."""

    def __init__(self, state: Path, *, vocab_size: int) -> None:
        self.state = state
        self.vocab_size = vocab_size
        self._reader = StateReader(state)

    def names(self) -> set[str]:
        """Every parameter of the model, under our names."""
        found = set()
        for name in self._reader.names():
            if "optimizer" in name.split(".")[:2] or name.endswith("_extra_state"):
                continue
            if name.startswith("decoder.layers.") and not _LAYER.match(name):
                count = self._reader.like(name).shape[0]
                rest = name.removeprefix("decoder.layers.")
                found |= {f"decoder.layers.{index}.{rest}" for index in range(count)}
            else:
                found.add(name)
        return found

    def like(self, name: str) -> Tensor:
        """A meta tensor of a parameter's shape and dtype, without padding."""
        if name in self._reader.names():
            return self._unpadded(name, self._reader.like(name))
        return self._reader.like(_LAYER.sub("decoder.layers.", name))[0]

    def tensor(self, name: str) -> Tensor:
        if name in self._reader.names():
            return self._unpadded(name, self._reader.tensor(name))
        stacked = _LAYER.sub("decoder.layers.", name)
        layers, *shape = (like := self._reader.like(stacked)).shape
        index = int(_LAYER.match(name).group(1))
        layer = torch.empty((1, *shape), dtype=like.dtype)
        state = {"layer": ShardedTensor.from_rank_offsets(stacked, layer, (0, index, layers))}
        return load_state(state, self.state)["layer"][0]

    def _unpadded(self, name: str, tensor: Tensor) -> Tensor:
        is_vocabulary = name in ("embedding.word_embeddings.weight", "output_layer.weight")
        return tensor[: self.vocab_size] if is_vocabulary else tensor
