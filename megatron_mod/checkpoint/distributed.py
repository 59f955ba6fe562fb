"""Reading and writing Megatron distributed checkpoints without helper processes or spare copies."""

from __future__ import annotations

from megatron_mod import parallel  # noqa: F401  (readies torch for Megatron)

# isort: split
import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import IO

import torch
import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import merge, nested_values
from megatron.core.dist_checkpointing.mapping import apply_factory_merges
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess, save_preprocess
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreLoadPlanner,
    MCoreSavePlanner,
    _replace_sharded_keys_with_state_dict_keys,
    _replace_state_dict_keys_with_sharded_keys,
    _unwrap_pyt_sharded_tensor,
    mcore_to_pyt_state_dict,
)
from megatron.core.dist_checkpointing.utils import extract_sharded_base
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import MetadataIndex, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from megatron_mod.checkpoint.checksums import digest_of
from megatron_mod.checkpoint.folders import ChunkedFile, causes
from megatron_mod.checkpoint.index import (
    IndexReader,
    require_tensors,
)
from megatron_mod.checkpoint.manifest import CONTENT
from megatron_mod.parallel.agree import on_first_rank


def save_state(
    state: dict, folder: Path, *, read: Mapping[str, Callable[[], Tensor]] | None = None
) -> None:
    """Write a (sharded) state of tensors as a distributed checkpoint, in Megatron's format, in a
    folder that exists; called by all ranks alike.

    Megatron's own way copies everything aside first and leaves the writing to processes it starts,
    which outlive a killed job; and it keeps pickled objects beside the tensors.

    Args:
        read: makes a tensor, by key, when its turn to be written has come; the state then holds a
            meta tensor in its place.
    """
    tensors, others = save_preprocess(state, False)
    assert not list(nested_values(others)), others
    by_key, *_ = _replace_state_dict_keys_with_sharded_keys(tensors, True)
    dcp.save(
        mcore_to_pyt_state_dict(by_key, False),
        # torch keeps every tensor of a file until the file is written: one tensor, one file.
        storage_writer=_Writer(folder, single_file_per_rank=not read),
        planner=_ReadingPlanner(read or {}),
    )
    on_first_rank(lambda: _complete(folder))


def _complete(folder: Path) -> None:
    """What Megatron expects of its format: its description, and a common state, here empty."""
    save_config(CheckpointingConfig("torch_dist"), str(folder))
    with ChunkedFile(folder / COMMON_STATE_FNAME) as file:
        torch.save({}, file)


class _Writer(dcp.FileSystemWriter):
    """Writes the same files for the same state, and says what the disk said."""

    def __init__(self, folder: str | Path, *, single_file_per_rank: bool) -> None:
        super().__init__(folder, single_file_per_rank=single_file_per_rank, thread_count=1)
        self.fs = _ChunkedFiles()

    def storage_meta(self) -> StorageMeta:
        return StorageMeta()  # torch's: the folder's name and a random number

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            # torch's archive writer raises its own error over the file's, and nothing but the
            # error that is raised reaches the other ranks.
            refused = [cause for cause in causes(error) if isinstance(cause, OSError)]
            raise refused[0] if refused else error from None


class _ChunkedFiles(FileSystem):
    @contextlib.contextmanager
    def create_stream(self, path: str | Path, mode: str) -> Iterator[IO[bytes]]:
        with ChunkedFile(path) if mode == "wb" else open(path, mode) as stream:
            yield stream


class _ReadingPlanner(MCoreSavePlanner):
    def __init__(self, read: Mapping[str, Callable[[], Tensor]]) -> None:
        super().__init__(flatten_state_dict=False)
        self.read = read

    def lookup_object(self, index: MetadataIndex) -> object:
        read = self.read.get(index.fqn)
        return read() if read else super().lookup_object(index)


def load_state(wanted: dict, folder: Path) -> dict:
    """Read tensors of a distributed checkpoint into a (sharded) state; called by all ranks alike.

    It may hold more. What it keeps beside its tensors are pickles, and stay unread: Megatron's own
    way loads them.

    Raises:
        ValueError: as ``read_index``, and a tensor that is missing, damaged or of another shape.
    """
    reader = IndexReader(folder)
    state, local, factories = load_preprocess(wanted)
    tensors, others = extract_sharded_base(state)
    assert not list(nested_values(others)), others
    _check_shapes(reader, folder, tensors)
    padded = {t.key: t for t in nested_values(tensors) if t.allow_shape_mismatch}
    planner = MCoreLoadPlanner(
        flatten_state_dict=False,
        flatten_sharded_tensors=False,
        allow_shape_mismatch_sharded_tensors=padded,
    )
    by_key, places, names = _replace_state_dict_keys_with_sharded_keys(tensors)
    found = mcore_to_pyt_state_dict(by_key, True)
    try:
        dcp.load(found, storage_reader=reader, planner=planner)
    except CheckpointException as error:
        raise _unreadable(folder, error) from error
    found = {key: _unwrap_pyt_sharded_tensor(tensor) for key, tensor in found.items()}
    loaded = _replace_sharded_keys_with_state_dict_keys(found, places, names)
    return apply_factory_merges(merge(local, loaded), factories)


def _check_shapes(reader: IndexReader, folder: Path, tensors: dict) -> None:
    held = reader.read_metadata().state_dict_metadata
    for tensor in nested_values(tensors):
        shape = tuple(getattr(held.get(tensor.key), "size", ()))
        if tensor.key not in held:
            raise ValueError(f"{folder}: has no {tensor.key}.")
        if shape != tensor.global_shape and not tensor.allow_shape_mismatch:
            raise ValueError(
                f"{folder}: {tensor.key} has shape {shape} where {tuple(tensor.global_shape)} is "
                "needed."
            )


def _unreadable(folder: Path, error: CheckpointException) -> ValueError:
    require_tensors(folder)  # torch does not say which file it was that it could not read
    (rank, (cause, _)), *_ = sorted(error.failures.items())
    return ValueError(f"{folder}: cannot be read (rank {rank}): {cause!r}")


def save_tensors(
    tensors: Mapping[str, Tensor],
    folder: Path,
    *,
    read: Mapping[str, Callable[[], Tensor]] | None = None,
) -> None:
    """Write whole tensors as a distributed checkpoint any topology can load (one process), and
    beside them ``CONTENT``, which is the same wherever and however the same tensors are stored."""
    folder.mkdir()
    content: dict[str, dict] = {}

    def noted(name: str, make: Callable[[], Tensor]) -> Tensor:
        tensor = make()
        content[name] = {
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "shape": list(tensor.shape),
            "xxh3_128": digest_of(tensor),
        }
        return tensor

    sharded = {k: ShardedTensor.from_rank_offsets(k, t.contiguous()) for k, t in tensors.items()}
    if read is None:
        for name, tensor in tensors.items():
            noted(name, lambda tensor=tensor: tensor)
    else:
        read = {name: partial(noted, name, make) for name, make in read.items()}
    save_state(sharded, folder, read=read)
    text = json.dumps(dict(sorted(content.items())), indent=1) + "\n"
    (folder / CONTENT).write_text(text, encoding="utf-8")


class StateReader:
    """The tensors of a distributed checkpoint, whole, one at a time (one process)."""

    def __init__(self, folder: Path) -> None:
        """Read what the checkpoint holds; raises as ``read_index``."""
        self.folder = folder
        self._reader = IndexReader(folder)
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._tensors = {
            key: entry
            for key, entry in self._reader.read_metadata().state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }

    def names(self) -> set[str]:
        return set(self._tensors)

    def like(self, name: str) -> Tensor:
        """A meta tensor of the tensor's shape and dtype."""
        entry = self._tensors[name]
        return torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")

    def tensor(self, name: str) -> Tensor:
        """The tensor, in memory that the next call takes again: fresh memory costs more time
        than the copy into it.

        Raises:
            ValueError: it is damaged.
        """
        like = self.like(name)
        if like.nbytes > len(self._memory):
            self._memory = torch.empty(like.nbytes, dtype=torch.uint8)
        target = self._memory[: like.nbytes].view(like.dtype).view(like.shape)
        try:
            dcp.load({name: target}, storage_reader=self._reader)
        except CheckpointException as error:
            raise _unreadable(self.folder, error) from error
        return target


def load_tensors(folder: Path, keep: str = "") -> dict[str, Tensor]:
    """Every tensor of a distributed checkpoint whose key contains ``keep``, whole."""
    reader = StateReader(folder)
    return {name: reader.tensor(name).clone() for name in sorted(reader.names()) if keep in name}
