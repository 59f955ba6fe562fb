"""Routers on experts: loss, gradients and capacity at every topology against the formula."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_mod.data.chat import Sample
from megatron_mod.routing.config import RoutingConfig
from tests.distributed import cases, resume_cases
from tests.distributed.test_granularities import check, expected_of
from tests.helpers import experts, tiny
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import EXPERTS, Trainer, metrics
from tests.helpers.thinned import one_in

PRICED = {"capacity_loss_weight": "auto", "bias": True}
SEEDS = {"mixtral": 7, "qwen3_moe": 7, "olmoe": 8}  # no logit is near the border
NEAR_ALL, NEAR_NONE = 1e-9, 1 - 1e-7


def make_case(root: Path, family: str, *, seed: int | None = None) -> tuple:
    """A model, a batch, and routers under which some pairs skip."""
    kind, changes = experts.FAMILIES[family]
    hf = tiny.save_model(root / "hf", kind, **changes)
    cases.convert(hf, root / "megatron")
    generator = torch.Generator().manual_seed(seed or SEEDS[family])
    samples = []
    for index, (prompt, answer) in enumerate(
        [(3, 4), (9, 6), (5, 11), (7, 2), (4, 8), (12, 5), (6, 6), (3, 9)]
    ):
        ids = torch.randint(3, 128, (prompt + answer,), generator=generator).tolist()
        samples.append(Sample(ids, [False] * prompt + [True] * answer, f"made:{index}"))
    number = changes.get("num_experts", changes.get("num_local_experts"))
    added = {
        layer: {
            "router.weight": 0.5 * torch.randn(number, 32, generator=generator),
            "router.bias": 0.5 * torch.randn(number, generator=generator),
        }
        for layer in cases.ROUTED
    }
    return hf, root / "megatron", samples, added


@pytest.fixture(
    scope="module",
    params=[
        pytest.param("mixtral", marks=pytest.mark.slow),
        "qwen3_moe",
        pytest.param("olmoe", marks=pytest.mark.slow),
    ],
)
def any_case(request, tmp_path_factory, single_process):
    return make_case(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def case(tmp_path_factory, single_process):
    return make_case(tmp_path_factory.mktemp("qwen3_moe"), "qwen3_moe")


def routing(**changes: object) -> RoutingConfig:
    return cases.routing_config(granularity="expert_token", **changes)


def priced(loss: str = "task", **changes: object) -> cases.Asked:
    return cases.Asked(routing(**{**PRICED, **changes}), loss, (0.8, 0.3))


TRAININGS = [
    routing(),
    routing(renormalize=True, scope="layer", bias=True),
    routing(training_compute="sparse"),
    routing(training_compute="sparse", renormalize=True),
    priced("both", renormalize=True),
    priced("distill", training_compute="sparse", scope="layer"),
    routing(threshold=NEAR_ALL),
    routing(threshold=NEAR_NONE, training_compute="sparse"),
    routing(threshold=NEAR_NONE, renormalize=True),
]
DEEP = [TRAININGS[3], TRAININGS[4], TRAININGS[7]]
SEQUENCE_PARALLEL = {"tensor": 2, "sequence_parallel": True}


def test_the_batch_skips_some_pairs(any_case):
    for training in TRAININGS[:6]:
        capacity = expected_of(any_case, training)["capacity"]
        assert min(capacity) > 0.1, training
        assert max(capacity) < 0.9, training
    assert expected_of(any_case, TRAININGS[6])["capacity"] == [1.0, 1.0]
    assert expected_of(any_case, TRAININGS[7])["capacity"] == [0.0, 0.0]


@pytest.mark.parametrize(
    ("trainings", "topologies", "every"),
    [
        *one_in(2, TRAININGS, [{}, {"packed": True}], id="one_rank"),
        pytest.param(
            DEEP,
            [{"rows": 1}, {"recompute": "full"}, {"recompute": "selective"}],
            1,
            id="one_rank_again",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_one_rank_equals_the_formula(any_case, trainings, topologies, every, tmp_path):
    check(any_case, trainings, 1, topologies, tmp_path, every)


@pytest.mark.parametrize(
    ("trainings", "world", "topologies", "every"),
    [
        *one_in(
            3,
            DEEP,
            2,
            [
                {"expert": 2},
                {"expert": 2, "rows": 1, "use_distributed_optimizer": True},
                SEQUENCE_PARALLEL,
                {"tensor": 2},
                {"pipeline": 2},
                {"pipeline": 2, "virtual_pipeline": 2},
                {},
                {"context": 2},
                {"context": 2, "expert": 2},
            ],
            id="two_ranks",
        ),
        *one_in(
            2,
            [DEEP[1], TRAININGS[5]],
            4,
            [
                {"expert": 2, "pipeline": 2},
                {"expert": 2, **SEQUENCE_PARALLEL},
                {"expert": 4},
            ],
            id="four_ranks",
        ),
    ],
)
def test_ranks_equal_the_formula(case, trainings, world, topologies, every, tmp_path):
    check(case, trainings, world, topologies, tmp_path, every)


@pytest.mark.slow
def test_a_run_goes_on_with_its_experts_elsewhere(tmp_path, single_process):
    kind, changes = experts.FAMILIES["mixtral"]
    trainer = Trainer(tmp_path / "trainer", kind=kind, **changes)
    trainer.write_distinct()
    jobs = []
    for name, degree, before in (("two", 2, None), ("one", 1, "two"), ("again", 2, "one")):
        settings = {**EXPERTS, "parallel__expert_model_parallel_size": degree}
        arguments = trainer.arguments(tmp_path / name, **settings)
        jobs.append((before and tmp_path / before, {"expert": degree}, arguments))
    run_ranks(resume_cases.trainings, jobs, world=2, folder=tmp_path / "ranks", seconds=500)
    expected = metrics(tmp_path / "two")
    assert len({line["loss"] for line in expected}) == 6
    for name in ("one", "again"):
        for line, wanted in zip(metrics(tmp_path / name), expected, strict=True):
            for key in ("loss", "grad_norm", "capacity"):
                assert line[key] == pytest.approx(wanted[key], rel=1e-3, abs=1e-3), (name, key)


def test_experts_that_compute_nothing_are_waited_for_by_nobody(case, tmp_path):
    """The first half of the experts, all of one rank's, are sent tokens and compute none."""
    half = torch.where(torch.arange(8) < 4, -50.0, 0.0)
    added = {
        layer: {**own, "router.bias": own["router.bias"] + half} for layer, own in case[3].items()
    }
    trainings = [
        cases.Asked(routing(bias=True, training_compute="sparse"), added=added),
        cases.Asked(routing(bias=True, renormalize=True), added=added),
    ]
    check(case, trainings, 2, [{"expert": 2}], tmp_path)
