"""A base's parameters in a distributed checkpoint, by the names that our tables use."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from megatron_mod.checkpoint.distributed import StateReader
from megatron_mod.checkpoint.manifest import read_manifest
from megatron_mod.conversion.megatron_lm import LayerReader
from megatron_mod.conversion.source import Base
from megatron_mod.conversion.step_tensors import is_added
from megatron_mod.model.trainable import AVERAGE

_BESIDE = ("optimizer.", AVERAGE, "random.")  # what a step holds beside the model


class ParameterReader(Protocol):
    """Reads whole parameters, one at a time (one process)."""

    def names(self) -> set[str]: ...

    def like(self, name: str) -> Tensor:
        """A meta tensor of a parameter's shape and dtype, without padding."""
        ...

    def tensor(self, name: str) -> Tensor: ...


def reader_of(base: Base) -> ParameterReader:
    """Of a base that is a distributed checkpoint."""
    if base.kind == "megatron_lm":
        return LayerReader(base.state, vocab_size=base.arch.vocab_size)
    return StepReader(base) if base.kind == "step" else StateReader(base.state)


class StepReader(LayerReader):
    """Of a training of the whole model: what it averaged is read as the mean, in the parameter's
    own dtype."""

    def __init__(self, base: Base) -> None:
        super().__init__(base.state, vocab_size=base.arch.vocab_size)
        self.averaged = averaged_names(base)

    def names(self) -> set[str]:
        return {
            name for name in super().names() if not name.startswith(_BESIDE) and not is_added(name)
        }

    def tensor(self, name: str) -> Tensor:
        if name not in self.averaged:
            return super().tensor(name)
        mean = self._unpadded(name, self._reader.tensor(AVERAGE + name))
        return mean.to(self.like(name).dtype)


def averaged_names(base: Base) -> set[str]:
    """The parameters of a base whose mean is taken; of one that is no step there are none."""
    if base.kind != "step" or not read_manifest(base.path)["averaged"]:
        return set()
    held = StateReader(base.state).names()
    return {name.removeprefix(AVERAGE) for name in held if name.startswith(AVERAGE)}
