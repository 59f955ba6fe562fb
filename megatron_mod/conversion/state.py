"""Reading and writing Megatron distributed checkpoints without helper processes or spare copies."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO

import torch
import torch.distributed.checkpoint as dcp
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from megatron_mod.folders import ChunkedFile


class InProcessSave(TorchDistSaveShardedStrategy):
    """Megatron's checkpoint format, written by this process tensor by tensor.

    Megatron's own strategy copies everything aside first and leaves the writing to processes it
    starts, which outlive a killed job. ``read``, by key, makes a tensor when its turn to be written
    has come; the state then holds a meta tensor in its place.
    """

    def __init__(self, read: Mapping[str, Callable[[], Tensor]] | None = None) -> None:
        super().__init__("torch_dist", 1, thread_count=1)
        self.read = read or {}

    def save(self, sharded_state_dict: dict, checkpoint_dir: str | Path) -> None:
        state, *_ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, True)
        # torch keeps every tensor of a file until the file is written: one tensor, one file.
        single_file = not self.read
        writer = dcp.FileSystemWriter(
            checkpoint_dir, single_file_per_rank=single_file, thread_count=1
        )
        writer.fs = _ChunkedFiles()
        dcp.save(
            mcore_to_pyt_state_dict(state, False),
            storage_writer=writer,
            planner=_ReadingPlanner(self.read),
        )


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


def save_state(
    state: dict, folder: Path, *, read: Mapping[str, Callable[[], Tensor]] | None = None
) -> None:
    """Write a (sharded) state as a distributed checkpoint in a folder that exists; all ranks."""
    dist_checkpointing.save(
        state, str(folder), sharded_strategy=InProcessSave(read), validate_access_integrity=False
    )


def save_tensors(
    tensors: Mapping[str, Tensor],
    folder: Path,
    *,
    read: Mapping[str, Callable[[], Tensor]] | None = None,
) -> None:
    """Write whole tensors as a distributed checkpoint any topology can load (one process)."""
    folder.mkdir()
    sharded = {k: ShardedTensor.from_rank_offsets(k, t.contiguous()) for k, t in tensors.items()}
    save_state(sharded, folder, read=read)


class StateReader:
    """The tensors of a distributed checkpoint, whole, one at a time (one process)."""

    def __init__(self, folder: Path) -> None:
        """Read what the checkpoint holds.

        Raises:
            ValueError: not a distributed checkpoint.
        """
        self._reader = _CachingReader(folder)
        self._memory = torch.empty(0, dtype=torch.uint8)
        try:
            metadata = self._reader.read_metadata()
        except OSError as error:
            raise ValueError(f"{folder}: not a distributed checkpoint: {error}") from error
        self._tensors = {
            key: entry
            for key, entry in metadata.state_dict_metadata.items()
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
        than the copy into it."""
        like = self.like(name)
        if like.nbytes > len(self._memory):
            self._memory = torch.empty(like.nbytes, dtype=torch.uint8)
        target = self._memory[: like.nbytes].view(like.dtype).view(like.shape)
        dcp.load({name: target}, storage_reader=self._reader)
        return target


class _CachingReader(dcp.FileSystemReader):
    """Reads the metadata file once, however many loads follow."""

    _metadata: Metadata | None = None

    def read_metadata(self, *args: object, **kwargs: object) -> Metadata:
        if self._metadata is None:
            self._metadata = super().read_metadata(*args, **kwargs)
        return self._metadata


def load_tensors(folder: Path, keep: str = "") -> dict[str, Tensor]:
    """Every tensor of a distributed checkpoint whose key contains ``keep``, whole."""
    reader = StateReader(folder)
    return {name: reader.tensor(name).clone() for name in sorted(reader.names()) if keep in name}
