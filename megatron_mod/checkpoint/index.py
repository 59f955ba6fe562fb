"""The index of a distributed checkpoint (``.metadata``), read without running what it may hold.

The format keeps its index as a pickle, and a pickle calls what it names. Here it may name the
classes of an index and nothing else, and change no object but those it has made of them.
"""

from __future__ import annotations

import io
import json
import pickle
import re
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    StorageMeta,
    TensorStorageMetadata,
)

INDEX = ".metadata"
_BACKEND = "metadata.json"
_OBJECT = "/shard_"  # in the key of everything that Megatron stores as an object, and in no other's

_MADE = {
    "torch.distributed.checkpoint.metadata": (
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
        "TensorProperties", "TensorStorageMetadata",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo", "_StoragePrefix"),
    "torch.distributed.checkpoint.planner": (  # Megatron keeps the plan it was written by
        "BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem",
    ),
    # What releases of torch before 2.3 put in the place of the first.
    "torch.distributed._shard.sharded_tensor.metadata": ("TensorProperties",),
    "collections": ("OrderedDict",),
}  # fmt: skip
_CALLED = {
    "torch.distributed.checkpoint.metadata": ("_MEM_FORMAT_ENCODING",),
    "torch.distributed._shard.sharded_tensor.metadata": ("MEM_FORMAT_ENCODING",),
    "torch.distributed.checkpoint.planner": ("WriteItemType",),
    "torch": ("Size",),
    "torch.serialization": ("_get_layout",),  # by name, from a table
    **dict.fromkeys(("pathlib", "pathlib._local"), ("PosixPath", "WindowsPath")),
}


class _NotAllowed(Exception):
    """A global that no index needs."""


# The interpreted unpickler: the one in C cannot be told which objects a pickle may change.
class _Unpickler(pickle._Unpickler):
    dispatch: ClassVar[dict] = dict(pickle._Unpickler.dispatch)

    def find_class(self, module: str, name: str) -> object:
        allowed = name in (*_MADE.get(module, ()), *_CALLED.get(module, ()))
        if not allowed and module == "torch":
            allowed = isinstance(getattr(torch, name, None), torch.dtype)
        if not allowed:
            raise _NotAllowed(f"{module}.{name}")
        return super().find_class(module, name)

    def load_build(self) -> None:
        made = type(self.stack[-2])
        if made.__name__ not in _MADE.get(made.__module__, ()):
            raise _NotAllowed(f"a change of {self.stack[-2]!r}")
        super().load_build()

    dispatch[pickle.BUILD[0]] = load_build


def read_index(folder: Path) -> Metadata:
    """What a distributed checkpoint holds, and where.

    Raises:
        ValueError: not a distributed checkpoint, a damaged index, or one that names a global it
            does not need, a file of another folder, or a pickled object in a tensor's place.
    """
    path = folder / INDEX
    try:
        with path.open("rb") as file:
            index = _Unpickler(file).load()
    except OSError as error:
        raise ValueError(f"{folder}: not a distributed checkpoint: {error}") from error
    except _NotAllowed as error:
        raise ValueError(
            f"{path}: holds {error}, which could run code and has no place in the index of a "
            "checkpoint, so it is not loaded. Do not use this folder."
        ) from error
    except Exception as error:  # whatever a damaged pickle leads to
        raise ValueError(f"{path}: is damaged: {error!r}") from error
    if not _is_index(index):
        raise ValueError(f"{path}: is not the index of a distributed checkpoint.")
    for entry in index.storage_data.values():
        name = getattr(entry, "relative_path", None)
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError(f"{path}: names the file {name!r}, which is not one of its folder.")
    for key, entry in index.state_dict_metadata.items():
        if isinstance(entry, BytesStorageMetadata) and _OBJECT not in key:
            raise ValueError(
                f"{path}: {key} is stored as a pickled object, which could run code, and not as a "
                "tensor, so it is not loaded. Do not use this folder."
            )
    if index.storage_meta is None:
        index.storage_meta = StorageMeta()
    return index


def _is_index(value: object) -> bool:
    """Whether an unpickled value has the parts of an index; a damaged one may lack any."""
    entries, places = (
        getattr(value, name, None) for name in ("state_dict_metadata", "storage_data")
    )
    return (
        isinstance(value, Metadata)
        and isinstance(places, dict)
        and isinstance(entries, dict)
        and all(_is_tensor(e) or isinstance(e, BytesStorageMetadata) for e in entries.values())
    )


def _is_tensor(entry: object) -> bool:
    dtype = getattr(getattr(entry, "properties", None), "dtype", None)
    shape = getattr(entry, "size", None)
    return isinstance(dtype, torch.dtype) and isinstance(shape, torch.Size)


def _check_backend(folder: Path) -> None:
    """Refuse a distributed checkpoint of another kind than ``torch_dist``.

    Raises:
        ValueError: it is, or does not say.
    """
    path = folder / _BACKEND
    try:
        backend = json.loads(path.read_bytes())["sharded_backend"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: does not say how the checkpoint is stored: {error!r}") from error
    if backend != "torch_dist":
        raise ValueError(
            f"{path}: sharded_backend = {backend!r}: only torch_dist is read; save the checkpoint "
            "in that format (--ckpt-format torch_dist)."
        )


def require_tensors(folder: Path) -> None:
    """Refuse a distributed checkpoint in whose files something else lies where a tensor should.

    Raises:
        ValueError: the first such file is damaged, or a pickle that names more than tensors need.
    """
    index = read_index(folder)
    for place, entry in index.storage_data.items():
        if not isinstance(index.state_dict_metadata.get(place.fqn), TensorStorageMetadata):
            continue
        path = folder / entry.relative_path
        try:
            with path.open("rb") as file:
                file.seek(entry.offset)
                content = io.BytesIO(file.read(entry.length))
            if not isinstance(torch.load(content, map_location="cpu", weights_only=True), Tensor):
                raise pickle.UnpicklingError("no tensor")
        except pickle.UnpicklingError as error:
            named = re.search(r"GLOBAL ([\w.]+)", str(error))
            what = f"names {named[1]}" if named else "is none"
            raise ValueError(
                f"{path}: what is stored as {place.fqn} {what}: it could run code, or is damaged, "
                "and is not loaded. Do not use this folder."
            ) from error
        except Exception as error:  # whatever a damaged archive leads to
            raise ValueError(f"{path}: is damaged: {place.fqn} cannot be read: {error}") from error


class IndexReader(FileSystemReader):
    """Reads a distributed checkpoint by an index that has been checked, however many loads."""

    def __init__(self, folder: Path) -> None:
        """Raises as ``read_index``, and for another kind of distributed checkpoint."""
        super().__init__(folder)
        _check_backend(folder)
        self._index = read_index(folder)

    def read_metadata(self, *args: object, **kwargs: object) -> Metadata:
        return self._index
