"""The optimizer's state for a checkpoint that any topology can read, distributed optimizer or not.

Megatron describes the state's tensors by parameter. What it keeps beside them is either rebuilt
from the settings (learning rates, decay) or the number of steps taken, and rank 0, whose word would
be saved, has neither when it owns no router. So the tensors go by their keys and the number by
itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import LocalNonpersistentObject, ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace, nested_values
from megatron.core.optimizer.optimizer import MegatronOptimizer
from torch import Tensor

from megatron_mod.model.builder import ModelChunks
from megatron_mod.parallel import device

# A distributed optimizer's state by parameter, as a plain optimizer has it.
_FORMAT = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
}
_MAIN_PARAMETER = "optimizer.state.param."  # a distributed optimizer's copy of the parameter


class OptimizerState:
    """The state of this rank's optimizer, described for saving, or for loading into it."""

    def __init__(self, optimizer: MegatronOptimizer, models: ModelChunks, *, loading: bool) -> None:
        self._optimizer = optimizer
        self._state: dict = {}
        if optimizer.is_stub_optimizer:
            return
        if loading:
            _allocate(optimizer)
        parameters = {f"model{i}": model.sharded_state_dict() for i, model in enumerate(models)}
        self._state = optimizer.sharded_state_dict(parameters, is_loading=loading, metadata=_FORMAT)

    def tensors(self) -> dict[str, ShardedTensor]:
        """The state's tensors by key. Parameters are not among them: a router is float32 and
        its own main parameter, saved with the model."""
        return {t.key: t for t in self._sharded() if not t.key.startswith(_MAIN_PARAMETER)}

    def steps(self) -> int:
        """Steps taken so far, the same on every rank; called by all ranks."""
        found = [int(container[key]) for container, key in _step_places(self._state)]
        taken = torch.tensor(max(found, default=0), device=device.device())
        dist.all_reduce(taken, op=dist.ReduceOp.MAX)
        return int(taken)

    def load(self, loaded: Mapping[str, Tensor], *, steps: int) -> None:
        """Put into the optimizer what was read: its ``tensors`` and the model's, by key."""

        def value(entry: object) -> object:
            if isinstance(entry, ShardedTensor):
                return loaded[entry.key.removeprefix(_MAIN_PARAMETER)]
            return entry.unwrap() if isinstance(entry, LocalNonpersistentObject) else entry

        if not self._state:
            return
        dict_list_map_inplace(value, self._state)
        for container, key in _step_places(self._state):
            container[key] = torch.tensor(float(steps)) if key == "common_step" else steps
        parts = _parts(self._optimizer)
        for index, part in enumerate(parts):
            _load_part(part, self._state if len(parts) == 1 else self._state[index])

    def _sharded(self) -> Iterator[ShardedTensor]:
        return (v for v in nested_values(self._state) if isinstance(v, ShardedTensor))


def _parts(optimizer: MegatronOptimizer) -> Sequence[MegatronOptimizer]:
    return getattr(optimizer, "chained_optimizers", [optimizer])


def _load_part(part: MegatronOptimizer, state: dict) -> None:
    by_parameter = state.pop("param_state", None)
    part.load_state_dict(state)
    if by_parameter is None:
        return
    # A distributed optimizer copies all that torch's Adam keeps by parameter, and expects tensors
    # for the step, too; but the step has just been loaded with the groups.
    steps = {p: s.pop("step") for p, s in part.optimizer.state.items() if "step" in s}
    part.load_parameter_state_from_fully_reshardable(by_parameter)
    for parameter, step in steps.items():
        part.optimizer.state[parameter]["step"] = step


def _allocate(optimizer: MegatronOptimizer) -> None:
    """Make an unused distributed optimizer's tensors; it cannot describe itself without them.

    Megatron takes a step without gradient for this. Parameters it decays are loaded afterwards.
    """
    for part in _parts(optimizer):
        allocate = getattr(part, "_init_optimizer_states_with_dummy_values", None)
        if allocate and not part.is_stub_optimizer and not part.optimizer.state:
            allocate()


def _step_places(state: object) -> Iterator[tuple[dict, str]]:
    """Where Megatron and torch keep the number of steps: once for all parameters, or by group."""
    if isinstance(state, dict):
        if "param_groups" in state:
            groups = [group for group in state["param_groups"] if "step" in group]
            yield from ((group, "step") for group in groups)
            if isinstance(state.get("state"), dict) and not groups:
                state["state"].setdefault("common_step", 0)
                yield state["state"], "common_step"
        else:
            for value in state.values():
                yield from _step_places(value)
