"""Mixtures of experts on the device: shared by ranks, trained whole, and grouped by Transformer
Engine."""

from __future__ import annotations

import pytest
import torch

from megatron_mod.routing.config import NO_ROUTERS
from tests.distributed import cases, test_whole_mixtures
from tests.distributed.test_granularities import DISTRIBUTED, TENSOR, expected_of, make_case
from tests.distributed.test_whole_mixtures import EXPERT, INTEGRATED, STAGED
from tests.gpu.test_equality import BF16, ROUNDING, SHAPE, TIMES, VARIANTS, distances
from tests.gpu.where import layers_of, long_on_cpu

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("single_process"), long_on_cpu]


def test_experts_on_two_ranks_train_as_the_formula_says(tmp_path):
    case = test_whole_mixtures.make(tmp_path, "mixtral")
    topologies = [EXPERT, {**EXPERT, **DISTRIBUTED}, TENSOR]
    trainings = [NO_ROUTERS, STAGED, INTEGRATED]
    test_whole_mixtures.check(case, trainings, 2, topologies, tmp_path / "ranks")


def test_grouped_experts_are_as_near_as_one_after_the_other(tmp_path):
    """Every token goes to every expert, so that no rounding changes a choice."""
    experts = {"num_local_experts": 4, "num_experts_per_tok": 4, "sliding_window": None}
    files = make_case(tmp_path, "mixtral", {**SHAPE, **experts})
    asked = cases.Asked(NO_ROUTERS, trained=())
    wanted = expected_of(files, cases.Asked(NO_ROUTERS, trained=("base",)), dtype=torch.float64)
    off = {}
    for name in ("local", "transformer_engine"):
        topology = {**VARIANTS[name, BF16], "logits": True}
        with layers_of(name):
            (found,) = cases.gradients(*files[1:], [topology], [asked]).values()
        off[name] = distances({**found, "gradients": {}}, {**wanted, "gradients": {}})["logits"]
    assert off["transformer_engine"] <= TIMES * max(off["local"], ROUNDING)
