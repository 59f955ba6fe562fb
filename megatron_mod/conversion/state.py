"""Reading and writing Megatron distributed checkpoints without helper processes or spare copies."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import IO

import torch
import torch.distributed.checkpoint as dcp
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.strategies.common import TorchCommonLoadStrategy
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.dist_checkpointing.validation import StrictHandling
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import MetadataIndex, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from megatron_mod.conversion.checkpoint import CONTENT
from megatron_mod.conversion.checksums import digest_of
from megatron_mod.conversion.state_index import (
    IndexReader,
    check_backend,
    read_index,
    require_tensors,
)
from megatron_mod.folders import ChunkedFile, causes


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
        dcp.save(
            mcore_to_pyt_state_dict(state, False),
            # torch keeps every tensor of a file until the file is written: one tensor, one file.
            storage_writer=_Writer(checkpoint_dir, single_file_per_rank=not self.read),
            planner=_ReadingPlanner(self.read),
        )


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


def save_state(
    state: dict, folder: Path, *, read: Mapping[str, Callable[[], Tensor]] | None = None
) -> None:
    """Write a (sharded) state as a distributed checkpoint in a folder that exists; all ranks."""
    dist_checkpointing.save(
        state, str(folder), sharded_strategy=InProcessSave(read), validate_access_integrity=False
    )


def load_state(
    wanted: dict,
    folder: Path,
    *,
    strict: StrictHandling = StrictHandling.ASSUME_OK_UNEXPECTED,
    parts: bool = False,
) -> dict:
    """Read tensors of a distributed checkpoint into a (sharded) state; called by all ranks alike.

    What the checkpoint keeps beside its tensors are pickles, and stay unread.

    Args:
        parts: the ranks together do not read every part of each tensor.

    Raises:
        ValueError: as ``read_index``, and a tensor that is damaged or has another shape.
        CheckpointingException: names that ``strict`` does not allow.
    """
    check_backend(folder)
    read_index(folder)  # before Megatron reads it, which would run what is in there
    try:
        return dist_checkpointing.load(
            wanted,
            str(folder),
            common_strategy=_NoCommonState(),
            strict=strict,
            validate_access_integrity=not parts,
        )
    except CheckpointException as error:
        raise _unreadable(folder, error) from error


class _NoCommonState(TorchCommonLoadStrategy):
    def load_common(self, checkpoint_dir: str | Path) -> dict:
        return {}


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
