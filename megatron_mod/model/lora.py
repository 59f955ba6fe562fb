"""LoRA adapters on the linears of a layer (Hu et al. 2021, arXiv 2106.09685), whatever ranks share
it.

An adapter belongs to one projection by Hugging Face's names. Megatron computes several of them in
one linear, whose adapters work as one: one product with their ``A`` together, one collective over
the tensor-parallel ranks, and one product with a matrix of their ``B``, in the order of the
linear's outputs. What travels between ranks is never wider than ``rank`` channels a projection.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    get_cuda_rng_tracker,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
)
from torch import Tensor, nn

from megatron_mod.config.lora import TARGETS, LoraSettings
from megatron_mod.model.projection import Part, SeesParts

# Random states that dropout draws from: of inputs that tensor-parallel ranks share, and of those
# that each has its own of.
SHARED, OWN = "lora", "lora_own"
AXES = {"a": 1, "b": 0}  # along which ranks share a matrix, if they do


class _Linear(NamedTuple):
    """One of a layer's linears as this rank holds it.

    ``inputs``: how many it has. ``outputs``: its projections and how many outputs each has in one
    of its ``groups``, which are equal and lie one after the other. ``by_rows``: each rank has part
    of the inputs, and of the outputs all.
    """

    module: nn.Module
    inputs: int
    outputs: dict[str, int]
    groups: int = 1
    by_rows: bool = False

    @property
    def split(self) -> str:
        """Which of an adapter's matrices the ranks share."""
        return "a" if self.by_rows else "b"


class LayerAdapters(nn.Module):
    """The adapters of a layer: ``{target}.a`` ``[rank, in]`` and ``{target}.b`` ``[out, rank]`` of
    each target, of a column-parallel one this rank's rows of ``b``, of a row-parallel one its
    columns of ``a``. In fp32, and computed in the dtype of the hidden states.

    They add to what the layer's linears make, by hooks on them, so that a linear is what it was.
    """

    def __init__(self, layer: TransformerLayer, settings: LoraSettings) -> None:
        super().__init__()
        self.settings, self.group = settings, layer.pg_collection.tp
        self.sequence_parallel = layer.config.sequence_parallel
        self.switched_on = True
        self.linears = _linears(layer)
        place = None if layer.config.use_cpu_initialization else torch.cuda.current_device()
        for name, linear in self._adapted():
            for target in linear.outputs:
                if target in settings.targets:
                    self.add_module(target, self._pair(linear, target, place))
            linear.module.register_forward_hook(_Adds(self, name), with_kwargs=True)

    def _pair(
        self, linear: _Linear, target: str, place: torch.device | int | None
    ) -> nn.ParameterDict:
        rank, outputs = self.settings.rank, linear.outputs[target] * linear.groups
        shapes = {"a": (rank, linear.inputs), "b": (outputs, rank)}
        own = {}
        for key, shape in shapes.items():
            own[key] = nn.Parameter(torch.zeros(shape, dtype=torch.float32, device=place))
            if key == linear.split:
                set_tensor_model_parallel_attributes(own[key], True, AXES[key], stride=1)
            else:
                # With it a rank sees its share of the tokens, and Megatron adds up gradients.
                own[key].sequence_parallel = self.sequence_parallel  # type: ignore[attr-defined]
        return nn.ParameterDict(own)

    def _adapted(self) -> Iterator[tuple[str, _Linear]]:
        for name, linear in self.linears.items():
            if not linear.outputs.keys().isdisjoint(self.settings.targets):
                yield name, linear

    def of(self, target: str) -> nn.ParameterDict:
        """A target's ``a`` and ``b``."""
        found = self.get_submodule(target)
        assert isinstance(found, nn.ParameterDict)
        return found

    @property
    def trains(self) -> bool:
        return any(parameter.requires_grad for parameter in self.parameters())

    def added(self, name: str, hidden_states: Tensor, part: Part | None = None) -> Tensor:
        """What the adapters of a linear (a value of ``TARGETS``) add to its outputs, or to those of
        a ``part``, of its inputs, both as this rank has them."""
        linear, dtype = self.linears[name], hidden_states.dtype
        targets = [target for target in linear.outputs if target in self.settings.targets]
        own = {target: self.of(target) for target in targets}
        weights = [own[target]["a"].to(dtype) for target in targets]
        if self.training and self.settings.dropout:
            is_shared = not (linear.by_rows or self.sequence_parallel)
            with get_cuda_rng_tracker().fork(SHARED if is_shared else OWN):
                inputs = [F.dropout(hidden_states, self.settings.dropout) for _ in targets]
            inner = torch.cat([F.linear(x, a) for x, a in zip(inputs, weights, strict=True)], -1)
        else:
            inner = F.linear(hidden_states, torch.cat(weights))
        outer = self._outer(linear, {target: own[target]["b"] for target in targets})
        if part is not None:
            outer = part.of_rows(outer)
        return F.linear(self._exchanged(inner, linear), outer.to(dtype))

    def _exchanged(self, inner: Tensor, linear: _Linear) -> Tensor:
        """``[.., ranks]`` of this rank's inputs to that of its outputs."""
        if self.group.size() == 1:
            return inner
        if linear.by_rows:
            if self.sequence_parallel:
                return reduce_scatter_to_sequence_parallel_region(inner, group=self.group)
            return reduce_from_tensor_model_parallel_region(inner, group=self.group)
        if self.sequence_parallel:
            return gather_from_sequence_parallel_region(inner, group=self.group)
        return copy_to_tensor_model_parallel_region(inner, group=self.group)

    def _outer(self, linear: _Linear, b: dict[str, Tensor]) -> Tensor:
        """``[out, ranks]``, scaled: each target's ``b`` in the rows of its outputs and the columns
        of its share of the inner product, zeros elsewhere."""
        width, rank, place, rows = len(b) * self.settings.rank, self.settings.rank, 0, []
        like = next(iter(b.values()))
        for target, outputs in linear.outputs.items():
            if target not in b:
                rows.append(like.new_zeros(linear.groups, outputs, width))
                continue
            own = b[target].unflatten(0, (linear.groups, outputs))
            rows.append(F.pad(own, (place, width - place - rank)))
            place += rank
        return torch.cat(rows, 1).flatten(0, 1) * self.settings.scale

    def _split(self) -> dict[str, int]:
        """The parameters that ranks share, and along which axis."""
        return {
            f"{target}.{linear.split}": AXES[linear.split]
            for _, linear in self._adapted()
            for target in linear.outputs
        }

    @torch.no_grad()
    def put(self, adapters: dict[str, Tensor]) -> None:
        """Fill this rank's part of whole tensors, by their names in the layer."""
        split, rank = self._split(), self.group.rank()
        for name, parameter in self.named_parameters():
            whole = adapters[name]
            if name in split and self.group.size() > 1:
                whole = whole.chunk(self.group.size(), split[name])[rank]
            parameter.copy_(whole)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict:
        """As a Megatron module's."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            self._split(),
            sharded_offsets,
            tp_group=self.group,
            dp_cp_group=metadata["dp_cp_group"],
        )


class _Adds(SeesParts):
    """A forward hook on a linear that adds what the layer's adapters make of its input."""

    def __init__(self, adapters: LayerAdapters, name: str) -> None:
        self.adapters, self.name = adapters, name

    def __call__(
        self, linear: nn.Module, args: tuple, kwargs: dict, output: tuple
    ) -> tuple[Tensor, Tensor | None]:
        values, bias = output
        if not self.adapters.switched_on:
            return values, bias
        return values + self.adapters.added(self.name, args[0], kwargs.get("part")), bias


def _linears(layer: TransformerLayer) -> dict[str, _Linear]:
    """A layer's linears by Megatron's names, which are those in ``TARGETS``."""
    attention, mlp, config = layer.self_attention, layer.mlp, layer.config
    ranks, hidden, dim = layer.pg_collection.tp.size(), config.hidden_size, config.kv_channels
    queries = config.num_attention_heads // config.num_query_groups * dim  # of a group
    qkv = {"q_proj": queries, "k_proj": dim, "v_proj": dim}
    groups = config.num_query_groups // ranks
    found = {
        "linear_qkv": _Linear(attention.linear_qkv, hidden, qkv, groups),
        "linear_proj": _Linear(
            attention.linear_proj, queries * groups, {"o_proj": hidden}, by_rows=True
        ),
    }
    if isinstance(mlp, MLP):  # and no mixture, which has many
        ffn = config.ffn_hidden_size // ranks
        found |= {
            "linear_fc1": _Linear(mlp.linear_fc1, hidden, {"gate_proj": ffn, "up_proj": ffn}),
            "linear_fc2": _Linear(mlp.linear_fc2, ffn, {"down_proj": hidden}, by_rows=True),
        }
    names = {target: name for target, name in TARGETS.items() if name in found}
    assert {t: name for name, linear in found.items() for t in linear.outputs} == names
    return found


@contextlib.contextmanager
def switched_off(model: nn.Module) -> Iterator[None]:
    """Have the adapters of a model add nothing for the block, in which no backward pass runs."""
    adapters = [module for module in model.modules() if isinstance(module, LayerAdapters)]
    for each in adapters:
        each.switched_on = False
    try:
        yield
    finally:
        for each in adapters:
            each.switched_on = True


def seed_dropout(
    settings: LoraSettings | None, *, seed: int, groups: ProcessGroupCollection
) -> None:
    """Make the random states that dropout draws from, if there is any: alike where ranks hold the
    same numbers, and apart where their tokens, layers or channels differ. They are saved and gone
    on from as Megatron's own are."""
    made, where = CudaRNGStatesTracker(), (seed, groups.pp.rank(), groups.dp_cp.rank())
    if settings is not None and settings.dropout:
        for name, more in ((SHARED, ()), (OWN, (1 + groups.tp.rank(),))):
            (own,) = np.random.SeedSequence((*where, *more)).generate_state(1)
            made.add(name, int(own))
    tracker = get_cuda_rng_tracker()
    others = {k: v for k, v in tracker.get_states().items() if k not in (SHARED, OWN)}
    tracker.set_states(others | made.get_states())


def initial_adapters(
    settings: LoraSettings, projections: dict[str, tuple[int, int]], *, seed: int
) -> dict[int, dict[str, Tensor]]:
    """Whole tensors by layer and by their names in it, the same at every topology: ``a`` uniform
    within ``1 / sqrt(in)`` (Kaiming with a slope of sqrt 5, as PEFT has it), ``b`` zeros, with
    which adapters add nothing.

    ``projections``: ``Architecture.projections``.
    """
    shapes, found = settings.shapes(projections), {}
    for layer in settings.layers:
        found[layer] = {name: torch.zeros(shape) for name, shape in shapes.items()}
        for name, tensor in found[layer].items():
            target, _, key = name.partition(".")
            if key == "a":
                place = layer * len(TARGETS) + list(TARGETS).index(target)
                own = np.random.SeedSequence((seed, place)).generate_state(1, np.uint64)
                generator = torch.Generator().manual_seed(int(own[0]))
                bound = tensor.shape[1] ** -0.5
                tensor.uniform_(-bound, bound, generator=generator)
    return found
