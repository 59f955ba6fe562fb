"""The optimizer's state for a checkpoint that any topology can read, distributed optimizer or not.

What an optimizer keeps beside its moments is either rebuilt from the settings (learning rates,
decay) or the number of steps taken. Megatron's own state dictionaries take the moments and that
number together, ask every rank for both, and give all parameters one number between them. Here the
moments go by their keys and the number by itself, so that a rank may own any part of them, or none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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

_PREFIX = "optimizer.state."
_MAIN = "param"  # the fp32 parameter that is stepped, whose copy the model's may be
_MAIN_PARAMETER = f"{_PREFIX}{_MAIN}."
_NAMES = (_MAIN, "exp_avg", "exp_avg_sq")

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
        for part, of_part in zip(self._parts, self._described, strict=True):
            read = {
                index: {
                    name: loaded[
                        entry.key.removeprefix(_MAIN_PARAMETER)
                        if self._is_own_main(entry.key)
                        else entry.key
                    ]
                    for name, entry in entries.items()
                }
                for index, entries in of_part.items()
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
        like = {id(entry.data): entry for entry in self._of_model.values()}
        return [
            {
                index: {
                    name: described(like[id(parameter)], tensor, prefix=f"{_PREFIX}{name}.")
                    for name, tensor in state.items()
                }
                for index, (parameter, state) in enumerate(self._whole(part))
            }
            for part in self._parts
        ]

    def _whole(self, part: MegatronOptimizer) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """Each of the model's parameters, in the optimizer's order, with its whole state."""
        if isinstance(part, DistributedOptimizer):
            for buffer in part.buffers:
                for parameter in buffer.param_index_map:
                    yield parameter, self._gathered(part, parameter)
            return
        of_model = [entry.data for entry in self._of_model.values()]
        by_main = {id(getattr(own, "main_param", own)): own for own in of_model}
        for main in part.get_parameters():
            state = {_MAIN: main, **part.optimizer.state[main]}
            yield by_main[id(main)], {name: state[name] for name in _NAMES}

    def _gathered(self, part: DistributedOptimizer, parameter: Tensor) -> dict[str, Tensor]:
        """The state of which ranks have a part each, or none, in main memory. Megatron's own gives
        parameters of a buffer of several buckets, as a shared embedding makes them, each other's.
        """
        if self._loading:
            return {name: torch.zeros(parameter.shape) for name in _NAMES}
        own: dict[str, Tensor] = {}
        if parameter in part.model_param_gbuf_map:
            own = part._get_main_param_and_optimizer_states(parameter)
            here = part._get_model_param_range_map(parameter)["param"]
        found = {}
        for name in _NAMES:
            whole = torch.zeros(parameter.numel(), device=parameter.device)
            if own:
                whole[here.start : here.end] = own[name].detach()
            dist.all_reduce(whole, group=part.data_parallel_group)
            found[name] = whole.view(parameter.shape).cpu()
        return found


def _counters(part: MegatronOptimizer) -> list[dict]:
    """What holds the number of steps, under ``step``: each parameter's state, or each group."""
    if _counts_tensors(part):
        return list(part.optimizer.state.values())
    return [group for group in part.optimizer.param_groups if group["params"]]


def _counts_tensors(part: MegatronOptimizer) -> bool:
    """Whether it is torch's Adam; Transformer Engine's and Apex's count in integers, by group."""
    return isinstance(part.optimizer, (torch.optim.Adam, torch.optim.AdamW))
