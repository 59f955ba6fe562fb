"""Writes Hugging Face safetensors, tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from megatron_mod.checkpoint.folders import ChunkedFile

# The format's names of the dtypes models are stored in.
DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
MAX_SHARD_BYTES = 5 * 10**9


class _Entry(NamedTuple):
    like: Tensor
    read: Callable[[], Tensor]


class HFWriter:
    """Takes tensors, or their shapes and how to read them, and writes them all in ``close``.

    The safetensors library writes a file from tensors that are all in memory. The format (a length,
    a JSON header, the data) lets this one hold one tensor at a time instead.
    """

    def __init__(self, folder: str | Path, *, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
        self.folder = Path(folder)
        self.max_shard_bytes = max_shard_bytes
        self._entries: dict[str, _Entry] = {}

    def add(self, name: str, tensor: Tensor, read: Callable[[], Tensor] | None = None) -> None:
        """Have a tensor written.

        Args:
            tensor: the tensor; with ``read`` only one of its shape and dtype.
            read: gives the tensor when its turn has come.
        """
        self._entries[name] = _Entry(tensor, read or (lambda: tensor))

    def close(self) -> None:
        """Write the shards, none larger than ``max_shard_bytes`` but by a single tensor, and, if
        there are several, their index."""
        shards = self._shards()
        count = len(shards)
        weight_map = {}
        for number, names in enumerate(shards, start=1):
            file = f"model-{number:05d}-of-{count:05d}" if count > 1 else "model"
            with ChunkedFile(self.folder / f"{file}.safetensors") as out:
                self._write(out, names)
            weight_map.update(dict.fromkeys(names, f"{file}.safetensors"))
        if count > 1:
            total = sum(entry.like.nbytes for entry in self._entries.values())
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            path = self.folder / "model.safetensors.index.json"
            path.write_text(json.dumps(index, indent=2), encoding="utf-8")

    def _shards(self) -> list[list[str]]:
        shards: list[list[str]] = [[]]
        size = 0
        for name, (like, _) in self._entries.items():
            if shards[-1] and size + like.nbytes > self.max_shard_bytes:
                shards.append([])
                size = 0
            shards[-1].append(name)
            size += like.nbytes
        return shards

    def _write(self, out: BinaryIO, names: list[str]) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        position = 0
        for name in names:
            like = self._entries[name].like
            header[name] = {
                "dtype": DTYPE_NAMES[like.dtype],
                "shape": list(like.shape),
                "data_offsets": [position, position + like.nbytes],
            }
            position += like.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the data starts aligned
        out.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            like, read = self._entries[name]
            tensor = read()
            assert (tensor.shape, tensor.dtype) == (like.shape, like.dtype), name
            out.write(tensor.contiguous().view(-1).view(torch.uint8).numpy())
