"""Folders that keep all experts of a layer in one tensor, read by the names of one tensor each."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from megatron_mod.conversion.check import refuse_difference
from megatron_mod.conversion.families.base import Family
from megatron_mod.conversion.hf_reader import HFReader, TensorReader
from megatron_mod.conversion.mappings import Part
from megatron_mod.model.architecture import Architecture


def open_weights(folder: str | Path, family: Family, arch: Architecture) -> TensorReader:
    """The tensors of a folder by the names in the family's table, whichever of both layouts of
    experts its files have.

    Raises:
        ValueError: as ``HFReader``; the folder has tensors of both layouts, or some of the fused
            one are missing or have a shape that config.json does not give them.
    """
    reader = HFReader(folder)
    parts = family.fused(arch)
    fused = {part.name for part in parts.values()}
    there = reader.names() & fused
    if not there:
        return reader
    try:
        if both := reader.names() & parts.keys():
            raise ValueError(
                f"{reader.file(min(there))}: {min(there)}: holds what {min(both)} holds too; leave "
                "the tensors of one layout out."
            )
        whose = family.architecture
        refuse_difference(fused - there, set(), what="tensors", whose=whose, folder=reader.folder)
        return FusedExperts(reader, parts)
    except BaseException:
        reader.__exit__(None, None, None)
        raise


class FusedExperts:
    """A ``TensorReader`` of a folder whose layers' experts are fused; only rows asked for are read.

    Args:
        reader: of the folder; closed with this.
        parts: where the tensors are that the folder does not have by their own names.
    """

    def __init__(self, reader: HFReader, parts: dict[str, Part]) -> None:
        self._reader = reader
        self._parts = parts
        self._fused = {part.name for part in parts.values()}
        self._check_shapes()

    def _check_shapes(self) -> None:
        """Refuse tensors with other experts or rows than their parts; columns are for those who
        know the parts' shapes."""
        sizes: dict[str, tuple[int, ...]] = {}
        for part in self._parts.values():
            size: tuple[int, ...] = (part.stop,)
            if part.expert is not None:
                size = (part.expert + 1, part.stop)
            sizes[part.name] = max(size, sizes.get(part.name, size))
        for name, size in sizes.items():
            shape = tuple(self._reader.like(name).shape)
            if len(shape) != len(size) + 1 or shape[:-1] != size:
                raise ValueError(
                    f"{self._reader.file(name)}: {name}: shape {shape} instead of "
                    f"({', '.join(map(str, size))}, columns); the tensors and config.json do not "
                    "belong together."
                )

    def names(self) -> set[str]:
        return self._reader.names() - self._fused | self._parts.keys()

    def file(self, name: str) -> Path:
        part = self._parts.get(name)
        return self._reader.file(part.name if part else name)

    def like(self, name: str) -> Tensor:
        part = self._parts.get(name)
        if part is None:
            return self._reader.like(name)
        like = self._reader.like(part.name)
        return torch.empty(
            (part.stop - part.start, like.shape[-1]), dtype=like.dtype, device="meta"
        )

    def tensor(self, name: str) -> Tensor:
        part = self._parts.get(name)
        if part is None:
            return self._reader.tensor(name)
        return self.rows(name, 0, part.stop - part.start)

    def rows(self, name: str, start: int, stop: int, *columns: slice) -> Tensor:
        part = self._parts.get(name)
        if part is None:
            return self._reader.rows(name, start, stop, *columns)
        first, last = part.start + start, min(part.start + stop, part.stop)
        if part.expert is None:
            return self._reader.rows(part.name, first, last, *columns)
        of_expert = (part.name, part.expert, part.expert + 1)
        return self._reader.rows(*of_expert, slice(first, last), *columns)[0]

    def __enter__(self) -> FusedExperts:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._reader.__exit__(kind, error, trace)
