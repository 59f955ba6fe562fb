"""The optimizer's state for a checkpoint that any topology can read, distributed optimizer or not.

What an optimizer keeps beside its moments is either rebuilt from the settings (learning rates,
decay) or the number of steps taken. Megatron's own state dictionaries take the moments and that
number together, ask every rank for both, and give all parameters one number between them. Here the
moments go by their keys and the number by itself, so that a rank may own any part of them, or none.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from typing import TypeAlias

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from torch import Tensor

from megatron_mod.model.builder import ModelChunks
from megatron_mod.model.trainable import described
from megatron_mod.parallel import device

# By parameter, as a plain optimizer has it, and gathered by the group that computes.
_FORMAT = {"distrib_optim_fully_reshardable_mem_efficient": False}
_PREFIX = "optimizer.state."
_MAIN = "param"  # the fp32 parameter that is stepped, whose copy the model's may be
_MAIN_PARAMETER = f"{_PREFIX}{_MAIN}."

Described: TypeAlias = ShardedTensor | ShardedTensorFactory


class OptimizerState:
    """The state of this rank's optimizer, described for saving, or for loading into it."""

    def __init__(self, optimizer: MegatronOptimizer, models: ModelChunks, *, loading: bool) -> None:
        parts = getattr(optimizer, "chained_optimizers", [optimizer])
        self._parts = [part for part in parts if not part.is_stub_optimizer]
        self._models, self._loading = models, loading

    def tensors(self) -> dict[str, Described]:
        """The moments by key, and main parameters of what the model has in bfloat16; called by all
        ranks, once steps were taken. A float32 parameter is its own main parameter, saved with the
        model."""
        return {t.key: t for t in nested_values(self._described) if not self._is_own_main(t.key)}

    def steps(self) -> int:
        """Steps taken so far, the same on every rank; called by all ranks."""
        found = [int(c["step"]) for part in self._parts for c in _counters(part) if "step" in c]
        taken = torch.tensor(max(found, default=0), device=device.device())
        dist.all_reduce(taken, op=dist.ReduceOp.MAX)
        return int(taken)

    def load(self, loaded: Mapping[str, Tensor], *, steps: int) -> None:
        """Put into the optimizer what was read: its ``tensors`` and the model's, by key."""
        for part, described in zip(self._parts, self._described, strict=True):
            read = {
                index: {
                    name: loaded[
                        entry.key.removeprefix(_MAIN_PARAMETER)
                        if self._is_own_main(entry.key)
                        else entry.key
                    ]
                    for name, entry in entries.items()
                }
                for index, entries in described.items()
            }
            if isinstance(part, DistributedOptimizer):
                part.load_parameter_state_from_fully_reshardable(read)
            else:
                for index, parameter in enumerate(part.get_parameters()):
                    with torch.no_grad():
                        parameter.copy_(read[index].pop(_MAIN))
                    for name, value in read[index].items():
                        part.optimizer.state[parameter][name].copy_(value)
            for counter in _counters(part):
                # A tensor of its own each: torch's Adam counts every parameter's up in place.
                counter["step"] = torch.tensor(float(steps)) if _counts_tensors(part) else steps

    def _is_own_main(self, key: str) -> bool:
        """Whether what has this key is a main parameter that is the model's own."""
        return key.startswith(_MAIN_PARAMETER) and (
            self._of_model[key.removeprefix(_MAIN_PARAMETER)].data.dtype == torch.float32
        )

    @cached_property
    def _of_model(self) -> dict[str, Described]:
        """This rank's parameters by key."""
        found = nested_values([model.sharded_state_dict() for model in self._models])
        return {t.key: t for t in found if isinstance(t, ShardedTensor | ShardedTensorFactory)}

    @cached_property
    def _described(self) -> list[dict[int, dict[str, Described]]]:
        """Of each part the tensors of every parameter by their names."""
        if self._loading:
            for part in self._parts:
                part.init_state_fn(part.optimizer, part.config)
        return [
            part.sharded_param_state_fully_reshardable(dict(self._of_model), self._loading, _FORMAT)
            if isinstance(part, DistributedOptimizer)
            else dict(enumerate(_describe(part, self._of_model.values())))
            for part in self._parts
        ]


def _describe(
    part: MegatronOptimizer, parameters: Iterable[Described]
) -> Iterator[dict[str, Described]]:
    """What ``sharded_param_state_fully_reshardable`` makes of an optimizer that is distributed."""
    by_main = {id(getattr(t.data, "main_param", t.data)): t for t in parameters}
    for main in part.get_parameters():
        state = {_MAIN: main, **part.optimizer.state[main]}
        yield {
            name: described(by_main[id(main)], tensor, prefix=f"{_PREFIX}{name}.")
            for name, tensor in state.items()
            if name != "step"
        }


def _counters(part: MegatronOptimizer) -> list[dict]:
    """What holds the number of steps, under ``step``: each parameter's state, or each group."""
    if _counts_tensors(part):
        return list(part.optimizer.state.values())
    return [group for group in part.optimizer.param_groups if group["params"]]


def _counts_tensors(part: MegatronOptimizer) -> bool:
    """Whether it is torch's Adam; Transformer Engine's and Apex's count in integers, by group."""
    return isinstance(part.optimizer, (torch.optim.Adam, torch.optim.AdamW))
