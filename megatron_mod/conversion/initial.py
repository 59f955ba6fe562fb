"""First weights of a model that is trained from scratch, drawn from a seed.

As Megatron-core draws them (``init_method_normal`` and ``scaled_init_method_normal`` of
``megatron/core/utils.py``): matrices and embeddings, gates of experts too, from a normal
distribution around zero whose standard deviation is ``initializer_range``, in the projections that
add to the residual stream divided by ``sqrt(2 * layers)``; norms are one, biases zero. A number
depends on the seed, the name of its tensor and its place in that alone, so that every topology
begins with the same model.
"""

from __future__ import annotations

import hashlib
import math
from contextlib import AbstractContextManager
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from megatron_mod.conversion.check import expected_shape
from megatron_mod.conversion.families.base import Family
from megatron_mod.conversion.mappings import to_hf
from megatron_mod.model.architecture import Architecture

BLOCK = 256  # rows that are drawn together
_INTO_RESIDUAL = ("linear_proj.weight", "linear_fc2.weight")


class InitialWeights(AbstractContextManager):
    """The tensors by Hugging Face's names, in float32; read as those of an ``HFReader``."""

    def __init__(
        self, family: Family, arch: Architecture, *, initializer_range: float, seed: int
    ) -> None:
        self.seed = seed
        self._range = initializer_range
        self._layers = arch.num_layers
        self._likes: dict[str, Tensor] = {}
        self._into_residual: set[str] = set()
        for row in family.table(arch):
            shape = expected_shape(arch, row.megatron)
            self._likes |= to_hf(row, torch.empty(shape, device="meta"))
            if row.megatron.endswith(_INTO_RESIDUAL):
                self._into_residual.update(row.hf)
        self._block = lru_cache(maxsize=4)(self._draw)  # a query group's parts are read in turn

    def names(self) -> set[str]:
        return set(self._likes)

    def file(self, name: str) -> Path:
        """What messages call the place a tensor comes from."""
        return Path("model.config")

    def like(self, name: str) -> Tensor:
        """A meta tensor of the tensor's shape and dtype."""
        return self._likes[name]

    def tensor(self, name: str) -> Tensor:
        return self.rows(name, 0, len(self._likes[name]))

    def rows(self, name: str, start: int, stop: int, *columns: slice) -> Tensor:
        """Rows ``start .. stop - 1`` of a tensor, and of these some columns."""
        stop = min(stop, len(self._likes[name]))
        blocks = range(start // BLOCK, -(-stop // BLOCK))
        first = blocks.start * BLOCK
        drawn = torch.cat([self._block(name, number) for number in blocks])
        asked = (slice(start - first, stop - first), *columns)
        return drawn[asked]

    def _draw(self, name: str, number: int) -> Tensor:
        rows, *width = self._likes[name].shape
        shape = (min(BLOCK, rows - number * BLOCK), *width)
        if name.endswith(".bias"):
            return torch.zeros(shape)
        if not width:
            return torch.ones(shape)
        scaled = math.sqrt(2 * self._layers) if name in self._into_residual else 1.0
        digest = hashlib.sha256(f"{self.seed} {name} {number}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
        return torch.randn(shape, generator=generator) * (self._range / scaled)

    def __exit__(self, *error: object) -> None:
        self._block.cache_clear()
