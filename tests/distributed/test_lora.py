"""Adapters at every topology against plain torch on Hugging Face's model."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch

from megatron_mod.config.lora import TARGETS, LoraSettings
from megatron_mod.routing.config import NO_ROUTERS
from tests.distributed import cases
from tests.distributed.test_granularities import (
    DISTRIBUTED,
    EVERY,
    SELECTED,
    SPARSE,
    TENSOR,
    check,
    make_case,
    with_added,
)
from tests.helpers import tiny

PROJECTIONS = {
    "q_proj": (32, 32), "k_proj": (32, 16), "v_proj": (32, 16), "o_proj": (32, 32),
    "gate_proj": (32, 64), "up_proj": (32, 64), "down_proj": (64, 32),
}  # fmt: skip
ALL = LoraSettings(3, 5.0, 0.0, tuple(TARGETS), (0, 1, 2, 3))
SOME = LoraSettings(2, 2.0, 0.0, ("k_proj", "o_proj", "up_proj"), (1, 3))


@pytest.fixture(scope="module")
def case(tmp_path_factory, single_process):
    return make_case(tmp_path_factory.mktemp("llama"), "llama", tiny.LLAMAS["odd_vocabulary"])


@functools.cache  # tensors are handed to ranks by file descriptors, of which there are few
def made(lora: LoraSettings) -> dict[int, dict[str, torch.Tensor]]:
    """Adapters away from zero."""
    generator = torch.Generator().manual_seed(29)
    shapes = lora.shapes(PROJECTIONS)
    return {
        layer: {name: 0.2 * torch.randn(s, generator=generator) for name, s in shapes.items()}
        for layer in lora.layers
    }


def adapted(
    asked: cases.Asked, lora: LoraSettings = ALL, *, trained: str = "routers+stand_ins+lora"
) -> cases.Asked:
    return asked._replace(lora=lora, adapters=made(lora), trained=tuple(trained.split("+")))


def alone(routing, lora: LoraSettings = ALL, *, loss: str = "task") -> cases.Asked:
    """Adapters that train beside routers that do not, or none."""
    own = {"capacity_loss_weight": "auto", "training_compute": "sparse"}
    own |= {"bias": True, "stand_in_rank": 3} if routing.layers else {}
    return adapted(cases.Asked(replace(routing, **own), loss), lora, trained="lora")


EACH = [adapted(with_added(routing, "task")) for routing in [*EVERY, *SELECTED, *SPARSE]]
DEEP = [
    adapted(with_added(EVERY[1], "distill"), SOME),
    adapted(with_added(SPARSE[-1], "both")),  # block_token, selected keys
    alone(SPARSE[1]),  # attn_token, all keys
    alone(NO_ROUTERS, SOME),
]
assert [(each.routing.granularity, each.routing.keys_values) for each in DEEP[:3]] == [
    ("attn_token", "all"),
    ("block_token", "selected"),
    ("attn_token", "all"),
]


def test_one_rank(case, tmp_path):
    check(case, [*EACH, *DEEP], 1, [{}], tmp_path)


def test_two_ranks(case, tmp_path):
    topologies = [
        {"tensor": 2},
        TENSOR,
        {**TENSOR, "packed": True},
        {"pipeline": 2, "virtual_pipeline": 2},
        {"context": 2},
        DISTRIBUTED,
    ]
    check(case, DEEP, 2, topologies, tmp_path)
