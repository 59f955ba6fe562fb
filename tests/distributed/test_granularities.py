"""Loss, capacity and router gradients of every scheme at every topology against the formula."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_mod.data.chat import Sample
from megatron_mod.routing.config import RoutingConfig
from megatron_mod.routing.scheme import GRANULARITIES
from tests.distributed import cases
from tests.helpers import tiny
from tests.helpers.ranks import run_ranks
from tests.helpers.training_formula import Scheme, batch_loss

EXACT = 1e-4  # relative difference of losses and gradients


@pytest.fixture(scope="module")
def case(tmp_path_factory, single_process):
    """A model, a batch, and routers away from zero under which some units skip."""
    return make_case(tmp_path_factory.mktemp("llama"), "llama", tiny.LLAMAS["odd_vocabulary"])


def make_case(root: Path, kind: str, changes: dict) -> tuple:
    hf = tiny.save_model(root / "hf", kind, **changes)
    cases.convert(hf, root / "megatron")
    generator = torch.Generator().manual_seed(11)
    samples = []
    for index, (prompt, answer) in enumerate(
        [(3, 4), (9, 6), (5, 11), (7, 2), (4, 8), (12, 5), (6, 6), (3, 9)]
    ):
        ids = torch.randint(3, 128, (prompt + answer,), generator=generator).tolist()
        samples.append(Sample(ids, [False] * prompt + [True] * answer, f"made:{index}"))
    routers = {layer: 0.5 * torch.randn(1, 32, generator=generator) for layer in cases.ROUTED}
    return hf, root / "megatron", samples, routers


def scheme(granularity: str, **changes: object) -> RoutingConfig:
    return cases.routing_config(granularity=granularity, **changes)


EVERY = [scheme(name) for name in GRANULARITIES]
SELECTED = [scheme(name, keys_values="selected") for name in ("attn_token", "block_token")]
SPARSE = [
    scheme(r.granularity, keys_values=r.keys_values, training_compute="sparse")
    for r in [*EVERY, *SELECTED]
]
VARIANTS = [
    scheme("attn_sequence", pooling="all", scope="layer"),
    # Out of reach, so this layer's penalty is off from the first step on: 1 > 1 is false.
    scheme("attn_sequence", pooling="all", scope="layer", capacity=(1.0, 0.25)),
    scheme("mlp_token", threshold=0.6),
    scheme("block_token", threshold=1e-9),  # none skipped
    scheme("block_token", threshold=1 - 1e-7, training_compute="sparse"),  # all skipped
    scheme("block_sequence", threshold=1 - 1e-7, training_compute="sparse"),
]
ALL = [*EVERY, *SELECTED, *SPARSE, *VARIANTS]
DEEP = [EVERY[0], SELECTED[0], SPARSE[-2]]  # attn_sequence; attn_token selected, dense and sparse
assert [r.granularity for r in DEEP] == ["attn_sequence", "attn_token", "attn_token"]
# So few tokens that some context-parallel ranks have none, with every treatment of keys.
FEW = [
    scheme(
        r.granularity,
        keys_values=r.keys_values,
        training_compute=r.training_compute,
        threshold=0.99,
    )
    for r in [*EVERY, *SELECTED, *SPARSE]
    if r.granularity.endswith("token")
]
SELECTED_FEW = [routing for routing in FEW if routing.keys_values == "selected"]
TENSOR = {"tensor": 2, "sequence_parallel": True}
PIPELINE = {"pipeline": 2}
DISTRIBUTED = {"use_distributed_optimizer": True}


def expected_of(case, routing: RoutingConfig) -> dict:
    from transformers import AutoModelForCausalLM

    hf, _, samples, weights = case
    model = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32).requires_grad_(False)
    routers = {layer: weight.clone().requires_grad_() for layer, weight in weights.items()}
    rules = {name: getattr(routing, name) for name in Scheme.__dataclass_fields__}
    task, capacity, margin = batch_loss(model, samples, routers, Scheme(**rules))
    assert margin > 1e-3, "a decision too close to the border to compare"
    loss = task
    for layer, target in zip(routing.layers, routing.capacity, strict=True):
        # The penalty, spelled out: before the first step the previous capacity is 1.
        mean = sum(routing.capacity) / len(routing.capacity)
        on = (mean if routing.scope == "model" else target) < 1.0
        loss = loss + routing.capacity_loss_weight * on * (capacity[layer] - target)
    loss.backward()
    return {
        "task_loss": float(task.detach()),
        "loss": float(loss.detach()),
        "capacity": [float(capacity[layer].detach()) for layer in routing.layers],
        "gradients": {layer: router.grad for layer, router in routers.items()},
    }


def check(case, routings: list[RoutingConfig], world: int, topologies: list[dict], folder) -> None:
    _, base, samples, routers = case
    expected = [expected_of(case, routing) for routing in routings]
    found = run_ranks(
        cases.gradients, base, samples, routers, topologies, routings, world=world, folder=folder
    )
    assert len(found[0]) == len(topologies) * len(routings)
    for name in found[0]:
        what = (routings[name[-1]], name)
        wanted, seen = expected[name[-1]], set()
        for result in (per_rank[name] for per_rank in found):
            assert result["capacity"] == pytest.approx(wanted["capacity"]), what
            assert result["evaluated_capacity"] == pytest.approx(wanted["capacity"]), what
            assert result["task_loss"] == pytest.approx(wanted["task_loss"], rel=EXACT), what
            assert result["loss"] == pytest.approx(wanted["loss"], rel=EXACT), what
            assert result["frozen_changed"] == 0
            for layer, gradient in result["gradients"].items():
                seen.add(layer)
                exact = wanted["gradients"][layer]
                difference = (gradient - exact).abs().max()
                assert difference <= EXACT * exact.abs().max(), (what, layer)
        assert seen == set(cases.ROUTED), what


def test_the_batch_skips_some_units_in_every_scheme(case):
    for routing in [*EVERY, *SELECTED]:
        capacity = expected_of(case, routing)["capacity"]
        assert min(capacity) < 1, routing
        assert max(capacity) > 0, routing
    for routing in FEW:
        assert 0 < max(expected_of(case, routing)["capacity"]) < 0.1, routing
    assert expected_of(case, VARIANTS[3])["capacity"] == [1.0, 1.0]
    for routing in VARIANTS[-2:]:
        assert expected_of(case, routing)["capacity"] == [0.0, 0.0]


@pytest.mark.parametrize(
    ("routings", "world", "topologies"),
    [
        (ALL, 1, [{}, {"packed": True}]),
        ([*EVERY, *SPARSE], 1, [{"rows": 1}]),
        (ALL, 2, [TENSOR, PIPELINE]),
        (
            DEEP,
            2,
            [
                {"tensor": 2},
                {},
                DISTRIBUTED,
                {"pipeline": 2, "first": 1},
                {"pipeline": 2, "virtual_pipeline": 2},
                {"context": 2},
            ],
        ),
        (DEEP, 4, [{"tensor": 2, "pipeline": 2}, {"context": 2, "pipeline": 2}, {"tensor": 2}]),
        (FEW, 2, [{"context": 2, "rows": 1}]),
        pytest.param(
            SELECTED_FEW,
            4,
            [{**TENSOR, "context": 2, "rows": 1}, {"context": 4, "rows": 1}],
            marks=pytest.mark.slow,
        ),
    ],
    ids=[
        "one_rank",
        "one_row",
        "two_ranks",
        "two_ranks_deep",
        "four_ranks",
        "two_ranks_few",
        "four_ranks_few",
    ],
)
def test_loss_and_gradients_equal_the_formula(case, routings, world, topologies, tmp_path):
    check(case, routings, world, topologies, tmp_path)


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_other_families_equal_the_formula(single_process, family, tmp_path):
    case = make_case(tmp_path, *tiny.FAMILIES[family])
    routings = [EVERY[0], EVERY[1], *SELECTED, *SPARSE[-2:]]  # with windows, biases, head norms
    check(case, routings, 1, [{}], tmp_path / "ranks")


def test_ranks_that_decide_differently_are_stopped(case, tmp_path):
    _, base, samples, _ = case
    for message in run_ranks(
        cases.disagreement, base, samples, scheme("mlp_token"), world=2, folder=tmp_path
    ):
        assert message.startswith("layer 2 (mlp_token): tensor-parallel ranks decided differently")


def test_backward_ends_at_the_first_router(case, tmp_path):
    _, base, samples, _ = case
    deep = cases.routing_config(layers=(3,), capacity=(0.5,))
    found = run_ranks(cases.layers_with_backward, base, samples, deep, world=2, folder=tmp_path)
    assert found == [[], [3]]  # the second stage holds layers 2 and 3
