"""Adapters at every topology against plain torch on Hugging Face's model."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch

from megatron_mod.checkpoint.distributed import load_tensors
from megatron_mod.config.lora import TARGETS, LoraSettings
from megatron_mod.model.lora import OWN, SHARED
from megatron_mod.routing.config import NO_ROUTERS
from tests.distributed import cases, resume_cases
from tests.distributed.test_distributed_optimizer import DISTRIBUTED as DISTRIBUTED_RUN
from tests.distributed.test_distributed_optimizer import job
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
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import DEFAULT, Trainer, metrics

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
    adapted(with_added(SPARSE[-2], "both")),  # block_token, selected keys
    alone(SPARSE[1]),  # attn_token, all keys
    alone(NO_ROUTERS, SOME),
    # So few tokens that some context-parallel ranks have none.
    adapted(cases.Asked(replace(SPARSE[-2], threshold=0.99))),
    adapted(with_added(SPARSE[-1], "both")),  # two routers a layer
]
assert [(each.routing.granularity, each.routing.keys_values) for each in DEEP[:3]] == [
    ("attn_token", "all"),
    ("block_token", "selected"),
    ("attn_token", "all"),
]


@pytest.mark.parametrize("each", [EACH[::3], pytest.param(EACH, marks=pytest.mark.slow)])
def test_one_rank(case, each, tmp_path):
    check(case, [*each, *DEEP], 1, [{}], tmp_path)


@pytest.mark.parametrize("every", [6, pytest.param(1, marks=pytest.mark.slow)])
def test_two_ranks(case, every, tmp_path):
    topologies = [
        {"tensor": 2},
        TENSOR,
        {**TENSOR, "packed": True},
        {"pipeline": 2, "virtual_pipeline": 2},
        {"context": 2, "rows": 1},
        DISTRIBUTED,
    ]
    check(case, DEEP, 2, topologies, tmp_path, every)


def test_dropout_is_alike_where_ranks_hold_the_same(case, tmp_path):
    """Where tensor-parallel ranks hold whole inputs the gradients of what they all have would
    differ otherwise, which ``whole_gradients`` would not have."""
    _, base, samples, added = case
    asked = adapted(cases.Asked(EVERY[1]), replace(ALL, dropout=0.3))
    topologies = [{"tensor": 2}, TENSOR, {"context": 2}]
    arguments = (base, samples, added, topologies, [asked])
    first, second = run_ranks(cases.gradients, *arguments, world=2, folder=tmp_path)
    for name in first:
        states = first[name]["random"], second[name]["random"]
        is_tensor = ("tensor", 2) in name
        assert torch.equal(*(state[SHARED] for state in states)) == is_tensor, name
        assert not torch.equal(*(state[OWN] for state in states)), name


@pytest.fixture(scope="module")
def trainer(tmp_path_factory, single_process):
    made = Trainer(tmp_path_factory.mktemp("trainer"))
    made.write_distinct()
    return made


@pytest.mark.slow  # as test_resume_topologies, with adapters
def test_a_run_goes_on_at_another_topology(trainer, tmp_path):
    """From the same start to the same end, to rounding, wherever it goes on."""
    settings = {
        **DEFAULT, "router__init": "zeros", "train__trainable": "routers+lora", "lora__rank": 3,
        "lora__layers": "[0,2]", "optimizer__lr": 0.002, "checkpoint__keep": 0,
        "checkpoint__interval": 2, "train__steps": 4,
    }  # fmt: skip
    alone, tensor = tmp_path / "alone", tmp_path / "tensor"
    trainer.train(alone, **settings)
    jobs = [
        job(
            trainer,
            tensor,
            {**settings, "parallel__sequence_parallel": "true", **DISTRIBUTED_RUN},
            tensor=2,
        ),
        job(trainer, tmp_path / "stages", settings, after=tensor, pipeline=2),
        job(trainer, tmp_path / "shares", {**settings, **DISTRIBUTED_RUN}, after=tensor),
    ]
    run_ranks(resume_cases.trainings, jobs, world=2, folder=tmp_path / "ranks", seconds=500)
    wanted, final = metrics(alone), load_tensors(alone / "step_00000004" / "state")
    for name in ("tensor", "stages", "shares"):
        for line, expected in zip(metrics(tmp_path / name), wanted, strict=True):
            for key in ("loss", "task_loss", "grad_norm", "capacity"):
                assert line[key] == pytest.approx(expected[key], rel=1e-3), (name, key)
        found = load_tensors(tmp_path / name / "step_00000004" / "state")
        assert {k for k in found if "lora" in k} == {k for k in final if "lora" in k}
        for key in (k for k in final if k.startswith("decoder.") and "lora" in k):
            torch.testing.assert_close(found[key], final[key], rtol=1e-2, atol=2e-4)
