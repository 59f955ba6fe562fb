"""Reads a Hugging Face model folder: its config.json and, lazily, its safetensors."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_mod.conversion.hf_writer import DTYPE_NAMES

# Everything a user needs beside the weights to run the model: copied along as it is.
COMPANION_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip

_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


def read_config(folder: str | Path) -> dict:
    """The folder's ``config.json``.

    Raises:
        ValueError: no such folder, an empty one, one without ``config.json``, or a broken file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; give a local Hugging Face model folder.")
    if not any(folder.iterdir()):
        raise ValueError(f"{folder}: the folder is empty; give a local Hugging Face model folder.")
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder}: has no config.json, so it is no Hugging Face model folder.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: must hold a JSON object.")
    return config


class HFReader:
    """The tensors of a folder by name. A context manager; files stay open, memory-mapped."""

    def __init__(self, folder: str | Path) -> None:
        """Index the folder's safetensors.

        Raises:
            ValueError: no safetensors (pickled ``.bin`` files are not read), a shard that the
                index names but is not there, or a file that is cut short.
        """
        self.folder = Path(folder)
        self._files = ExitStack()
        self._handles = {}
        self._where: dict[str, str] = {}
        for name in self._shard_names():
            path = self.folder / name
            if not path.is_file():
                raise ValueError(f"{path}: named by model.safetensors.index.json, but missing.")
            try:
                handle = self._files.enter_context(safe_open(path, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{path}: not a whole safetensors file: {error}") from error
            self._handles[name] = handle
            self._where.update(dict.fromkeys(handle.keys(), name))

    def _shard_names(self) -> list[str]:
        index = self.folder / "model.safetensors.index.json"
        if index.is_file():
            try:
                weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            except (ValueError, KeyError) as error:
                raise ValueError(f"{index}: is no index of safetensors: {error!r}") from error
            return sorted(set(weight_map.values()))
        names = sorted(path.name for path in self.folder.glob("*.safetensors"))
        if not names:
            pickled = sorted(path.name for path in self.folder.glob("*.bin"))
            hint = (
                f" ({pickled[0]} is a pickle, which is not read; save the model with "
                "safe_serialization=True)"
                if pickled
                else ""
            )
            raise ValueError(f"{self.folder}: holds no safetensors{hint}.")
        return names

    def names(self) -> set[str]:
        return set(self._where)

    def tensor(self, name: str) -> Tensor:
        return self._handles[self._where[name]].get_tensor(name)

    def rows(self, name: str, start: int, stop: int, *columns: slice) -> Tensor:
        """Rows ``start .. stop - 1`` of a tensor, and of these some columns; no more is read."""
        return self._slice(name)[(slice(start, stop), *columns)]

    def like(self, name: str) -> Tensor:
        """A meta tensor of the tensor's shape and dtype.

        Raises:
            ValueError: a dtype models are not stored in (a quantised one, for example).
        """
        part = self._slice(name)
        dtype = _DTYPES.get(part.get_dtype())
        if dtype is None:
            raise ValueError(
                f"{self.folder}: {name}: dtype {part.get_dtype()} is not supported; it must be one "
                f"of {', '.join(_DTYPES)}."
            )
        return torch.empty(part.get_shape(), dtype=dtype, device="meta")

    def _slice(self, name: str):
        return self._handles[self._where[name]].get_slice(name)

    def __enter__(self) -> HFReader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._files.close()
