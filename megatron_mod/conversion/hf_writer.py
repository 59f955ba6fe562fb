"""Writes Hugging Face safetensors, shard by shard."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


class HFWriter:
    """Collects tensors and flushes a shard whenever ``max_shard_bytes`` would be passed.

    Shards get their final names (``model-00001-of-00003.safetensors``, or
    ``model.safetensors`` if there is one) in ``close``.
    """

    def __init__(self, folder: str | Path, *, max_shard_bytes: int = 5 * 10**9) -> None:
        self.folder = Path(folder)
        self.max_shard_bytes = max_shard_bytes
        self._pending: dict[str, Tensor] = {}
        self._shards: list[list[str]] = []
        self._bytes = self._total = 0

    def add(self, name: str, tensor: Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._bytes + size > self.max_shard_bytes:
            self._flush()
        self._pending[name] = tensor.contiguous()
        self._bytes += size
        self._total += size

    def _temporary(self, index: int) -> Path:
        return self.folder / f"shard-{index}.safetensors"

    def _flush(self) -> None:
        save_file(self._pending, self._temporary(len(self._shards)), metadata={"format": "pt"})
        self._shards.append(list(self._pending))
        self._pending, self._bytes = {}, 0

    def close(self) -> None:
        """Write the last shard, name the shards and write their index."""
        self._flush()
        count = len(self._shards)
        if count == 1:
            self._temporary(0).rename(self.folder / "model.safetensors")
            return
        weight_map = {}
        for index, names in enumerate(self._shards):
            final = f"model-{index + 1:05d}-of-{count:05d}.safetensors"
            self._temporary(index).rename(self.folder / final)
            weight_map.update(dict.fromkeys(names, final))
        index = {"metadata": {"total_size": self._total}, "weight_map": weight_map}
        path = self.folder / "model.safetensors.index.json"
        path.write_text(json.dumps(index, indent=2), encoding="utf-8")
