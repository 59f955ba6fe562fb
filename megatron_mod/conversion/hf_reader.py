"""Reads a Hugging Face model folder: its config.json and, lazily, its safetensors."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_mod.checkpoint.companions import member, read_json
from megatron_mod.config.model_folder import adapter_problem
from megatron_mod.conversion.config_types import check_types
from megatron_mod.conversion.finite import require_finite
from megatron_mod.conversion.hf_writer import DTYPE_NAMES

if TYPE_CHECKING:
    from typing_extensions import Self

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"

_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


def read_config(folder: str | Path) -> dict:
    """The folder's ``config.json``.

    Raises:
        ValueError: no such folder, an empty one, one without ``config.json``, one with an adapter
            in it, a broken file, or a field of the wrong type.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; give a local Hugging Face model folder.")
    if not any(folder.iterdir()):
        raise ValueError(f"{folder}: the folder is empty; give a local Hugging Face model folder.")
    if problem := adapter_problem(folder):
        raise ValueError(f"{folder}: {problem}.")
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: has no config.json, so it is no Hugging Face model folder.")
    return read_config_file(folder / "config.json")


def read_config_file(path: Path) -> dict:
    """A ``config.json``, whatever its name.

    Raises:
        ValueError: a broken file, or a field of the wrong type.
    """
    config = read_json(path.parent, path.name)
    check_types(config, path)
    return config


class TensorReader(Protocol):
    """Tensors by Hugging Face's names, wherever they come from. A context manager."""

    def names(self) -> set[str]: ...

    def file(self, name: str) -> Path:
        """What messages say a tensor comes from."""
        ...

    def like(self, name: str) -> Tensor:
        """A meta tensor of the tensor's shape and dtype."""
        ...

    def tensor(self, name: str) -> Tensor: ...

    def rows(self, name: str, start: int, stop: int, *columns: slice) -> Tensor:
        """Rows ``start .. stop - 1`` of a tensor, and of these some columns."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


class HFReader:
    """The tensors of a folder by name. A context manager; files stay open, memory-mapped.

    What it reads is finite, or a ``ValueError`` names tensor and file.
    """

    def __init__(self, folder: str | Path, *, file: str | None = None) -> None:
        """Index the folder's safetensors: those of its model, or one ``file`` that is there.

        Raises:
            ValueError: no safetensors (pickled ``.bin`` files are not read), a shard that the
                index names but is not there, a file that is cut short, or one tensor twice.
        """
        self.folder = Path(folder)
        self._files = ExitStack()
        self._handles = {}
        self._where: dict[str, str] = {}
        try:
            for name in [file] if file else self._shard_names():
                self._open(name)
        except BaseException:
            self._files.close()
            raise

    def _open(self, name: str) -> None:
        path = member(self.folder, name)
        if not path.is_file():
            raise ValueError(f"{path}: named by {INDEX}, but missing.")
        try:
            handle = self._files.enter_context(safe_open(path, framework="pt"))
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: not a whole safetensors file: {error}") from error
        self._handles[name] = handle
        for key in handle.keys():  # noqa: SIM118 (no dict)
            if key in self._where:
                raise ValueError(
                    f"{path}: {key} is in {self._where[key]} too; leave one of them out."
                )
            self._where[key] = name

    def _shard_names(self) -> list[str]:
        if (self.folder / INDEX).is_file():
            weight_map = read_json(self.folder, INDEX).get("weight_map")
            if not isinstance(weight_map, dict) or not all(
                isinstance(name, str) for name in weight_map.values()
            ):
                raise ValueError(
                    f"{self.folder / INDEX}: is no index of safetensors: weight_map must say which "
                    "file each tensor is in."
                )
            names = sorted(set(weight_map.values()))
            if (self.folder / WHOLE).is_file() and names != [WHOLE]:
                raise ValueError(
                    f"{self.folder}: holds {WHOLE} and {INDEX}, which names other files; remove "
                    "the one that is not the model."
                )
            return names
        if (self.folder / WHOLE).is_file():
            return [WHOLE]
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

    def file(self, name: str) -> Path:
        """The file a tensor is in; the folder for a name that is in none."""
        return self.folder / self._where.get(name, "")

    def tensor(self, name: str) -> Tensor:
        return self._finite(name, self._handles[self._where[name]].get_tensor(name))

    def rows(self, name: str, start: int, stop: int, *columns: slice) -> Tensor:
        """Rows ``start .. stop - 1`` of a tensor, and of these some columns; no more is read."""
        return self._finite(name, self._slice(name)[(slice(start, stop), *columns)])

    def like(self, name: str) -> Tensor:
        """A meta tensor of the tensor's shape and dtype.

        Raises:
            ValueError: a dtype models are not stored in (a quantised one, for example).
        """
        part = self._slice(name)
        dtype = _DTYPES.get(part.get_dtype())
        if dtype is None:
            raise ValueError(
                f"{self.file(name)}: {name}: dtype {part.get_dtype()} is not supported; it must be "
                f"one of {', '.join(_DTYPES)}."
            )
        return torch.empty(part.get_shape(), dtype=dtype, device="meta")

    def _finite(self, name: str, tensor: Tensor) -> Tensor:
        require_finite(tensor, name, where=self.file(name))
        return tensor

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
