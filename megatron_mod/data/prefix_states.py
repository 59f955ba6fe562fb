"""Hidden states of samples on disk, computed once and read from a memory-mapped file.

An entry is a folder named after everything that the states depend on::

    CACHE/KEY/states       of all tokens of a source's samples, in their order: [tokens, H] in the
                           model's dtype; a sparse file, with holes where nothing is computed yet
    CACHE/KEY/checksums    uint64 of each sample, XXH3 of its states; 0: not computed yet
    CACHE/KEY/entry.json   what the key was made of

A sample's checksum is written after its states and compared whenever they are read, so nothing else
need be said of what a killed job, a lost page or a damaged disk has left.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import xxhash
from torch import Tensor

from megatron_mod.checkpoint.folders import write_durably, writing
from megatron_mod.data.cache import key_name

FORMAT = 1  # of an entry's files; part of every key
STATES, CHECKSUMS, ENTRY = "states", "checksums", "entry.json"


class StatesEntry:
    """The hidden states of one source's samples, which are counted from 0 in their order there.

    Args:
        cache: the folder that entries are in.
        key: what the states depend on (JSON values).
        lengths: tokens of each sample, int64.
        width: numbers a token, ``H``.
    """

    def __init__(
        self, cache: Path, key: dict, lengths: np.ndarray, *, width: int, dtype: torch.dtype
    ) -> None:
        self.key = {"format": FORMAT, **key}
        self.path = cache / key_name(self.key)
        self.lengths, self.width, self.dtype = lengths, width, dtype
        self._ends = np.cumsum(lengths) * width * dtype.itemsize

    def nbytes(self, samples: np.ndarray) -> int:
        """Bytes that the states of these samples take."""
        return int(self.lengths[samples].sum()) * self.width * self.dtype.itemsize

    def noted(self, samples: np.ndarray) -> np.ndarray:
        """Which of these samples have a checksum, bool."""
        return self._checksums()[samples] > 0

    def whole(self, samples: np.ndarray) -> np.ndarray:
        """Which of these samples' states are what was written, bool; reads them."""
        content, checksums = self._content(), self._checksums()
        if content is None:
            return np.zeros(len(samples), dtype=bool)
        return np.array([_digest(content[self._span(i)], i) == checksums[i] for i in samples], bool)

    def read(self, sample: int) -> Tensor | None:
        """The states ``[tokens, H]`` of a sample; ``None``: they are not what was written."""
        content = self._open_content
        if content is None:
            return None
        states = np.array(content[self._span(sample)])
        if _digest(states, sample) != self._open_checksums[sample]:
            return None
        return torch.from_numpy(states).view(self.dtype).view(-1, self.width)

    def make(self) -> None:
        """Make the folder and its files, or give them their size again; what they hold stays.

        Raises:
            ValueError: they cannot be written.
        """
        sizes = {STATES: int(self._ends[-1]), CHECKSUMS: 8 * len(self.lengths)}
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            for name, size in sizes.items():
                with (self.path / name).open("ab") as file:
                    file.truncate(size)
        write_durably(self.path / ENTRY, json.dumps(self.key, indent=2) + "\n")

    @contextlib.contextmanager
    def filled(self) -> Iterator[Callable[[int, Tensor], None]]:
        """For the block, what writes the states ``[tokens, H]`` of a sample; durable at its end.

        Others may write other samples meanwhile.

        Raises:
            ValueError: the files, which are made, cannot be written.
        """
        with contextlib.ExitStack() as stack:
            with writing(self.path):
                states, checksums = (
                    stack.enter_context((self.path / name).open("r+b"))
                    for name in (STATES, CHECKSUMS)
                )

            def write(sample: int, tensor: Tensor) -> None:
                content = tensor.contiguous().view(torch.uint8).numpy().reshape(-1)
                span = self._span(sample)
                assert tensor.dtype == self.dtype
                assert len(content) == span.stop - span.start, "states of another sample"
                with writing(self.path):
                    _put(states, span.start, content)
                    _put(checksums, 8 * sample, _digest(content, sample).to_bytes(8, "little"))

            yield write
            with writing(self.path):
                os.fsync(states.fileno())
                os.fsync(checksums.fileno())

    def _span(self, sample: int) -> slice:
        end = int(self._ends[sample])
        return slice(end - int(self.lengths[sample]) * self.width * self.dtype.itemsize, end)

    def _content(self) -> np.ndarray | None:
        path, size = self.path / STATES, int(self._ends[-1])
        if not path.is_file() or path.stat().st_size != size:
            return None
        return np.memmap(path, dtype=np.uint8, mode="r", shape=(size,))

    def _checksums(self) -> np.ndarray:
        path = self.path / CHECKSUMS
        if path.is_file() and path.stat().st_size == 8 * len(self.lengths):
            return np.fromfile(path, dtype="<u8")
        return np.zeros(len(self.lengths), dtype="<u8")

    @cached_property
    def _open_content(self) -> np.ndarray | None:
        return self._content()

    @cached_property
    def _open_checksums(self) -> np.ndarray:
        return self._checksums()


class SampleStates:
    """The hidden states of a source's samples by record number.

    Args:
        numbers: the record number of each sample of the entry, ascending.
    """

    def __init__(self, entry: StatesEntry, numbers: np.ndarray) -> None:
        self.entry, self.numbers = entry, numbers

    def places(self, numbers: np.ndarray) -> np.ndarray:
        """Which samples of the entry have these record numbers, int64."""
        return np.searchsorted(self.numbers, numbers)

    def read(self, number: int, *, source: str) -> Tensor:
        """The states ``[tokens, H]`` of a record; ``source`` is what messages call it.

        Raises:
            ValueError: they are not what was written.
        """
        states = self.entry.read(int(self.places(np.array(number))))
        if states is None:
            raise ValueError(
                f"{self.entry.path}: the hidden states of {source} are not what was written "
                "(checksum); run the same command again, which computes them anew."
            )
        return states


def _digest(content: np.ndarray, sample: int) -> int:
    """Never 0; of a sample's own, so that those of another one in its place are none."""
    return xxhash.xxh3_64_intdigest(content.data, seed=sample) or 1


def _put(file, offset: int, content: object) -> None:
    file.seek(offset)
    file.write(content)
    file.flush()
