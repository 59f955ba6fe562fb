"""Loss, auxiliary loss and gradients of Mixture-of-Depths at every topology against the formula."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_mod.routing.config import RoutingConfig
from tests.distributed import cases
from tests.distributed.test_granularities import DISTRIBUTED, PIPELINE, TENSOR, copied, make_case
from tests.distributed.test_lora import ALL, made
from tests.helpers import exact_formula, tiny
from tests.helpers.ranks import run_ranks
from tests.helpers.thinned import number_asked, one_in
from tests.helpers.training_formula import adapt

EXACT = 1e-4  # relative difference of losses and gradients
APART = 1e-4  # scores that decide lie at least so far from each other


def scheme(granularity: str, *, causal: str = "predictor", **changes: object) -> RoutingConfig:
    if causal == "predictor":
        changes = {"predictor_size": 8, **changes}
    else:
        changes = {"causal_loss_weight": 0.3, **changes}
    return cases.routing_config(
        granularity=granularity,
        selection="top_k",
        causal=causal,
        training_compute="sparse",
        **{"capacity": (0.5, 0.3), "capacity_loss_weight": "auto", **changes},
    )


GRANULARITIES = ("attn_token", "mlp_token", "block_token")
EVERY = [
    scheme(name, causal=rule) for name in GRANULARITIES for rule in ("predictor", "auxiliary_loss")
]
ENDS = [
    scheme("block_token", capacity=(1e-3, 1.0)),  # none, all
    scheme("attn_token", capacity=(1.0, 1e-3), causal="auxiliary_loss"),
    scheme("mlp_token", capacity=(0.05, 0.05)),  # one or none of a document
    scheme("block_token", capacity=(0.05, 0.12)),
    scheme("block_token", bias=True),
]
DEEP = [EVERY[0], EVERY[5], ENDS[0], ENDS[3]]


@pytest.fixture(scope="module")
def case(tmp_path_factory, single_process):
    return with_predictors(
        make_case(tmp_path_factory.mktemp("llama"), "llama", tiny.LLAMAS["odd_vocabulary"])
    )


def with_predictors(case: tuple) -> tuple:
    """A case whose layers have the predictors that they may have, too."""
    hf, base, samples, added = case
    generator = torch.Generator().manual_seed(12)
    shapes = scheme("block_token").added_shapes(32, num_experts=1)
    for own in added.values():
        for name, shape in shapes.items():
            own.setdefault(name, 0.3 * torch.randn(shape, generator=generator))
    return hf, base, samples, added


def expected_of(
    case, routing: RoutingConfig, *, causal: bool = False, ties: bool = False, adapters=None
) -> dict:
    from transformers import AutoModelForCausalLM

    hf, _, samples, tensors = case
    model = AutoModelForCausalLM.from_pretrained(hf, attn_implementation="eager")
    model.requires_grad_(False)
    added = copied(cases.only(tensors, routing), torch.float32)
    if adapters is not None:
        adapt(model, adapters, ALL.scale)
    found = exact_formula.batch_loss(
        model,
        samples,
        added,
        granularity=routing.granularity,
        capacity=dict(zip(routing.layers, routing.capacity, strict=True)),
        causal=causal,
    )
    assert ties or found.margin > APART, "a decision too close to another to compare"
    if not causal:
        weight = 0.0 if adapters else (routing.causal_loss_weight or 1.0)
        (found.task_loss + weight * sum(found.causal_loss)).backward()
    return {
        "task_loss": float(found.task_loss.detach()),
        "capacity": found.capacity,
        "agreement": found.agreement,
        "causal_loss": [float(loss.detach()) for loss in found.causal_loss],
        "logits": found.logits,
        "gradients": {
            (layer, name): torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
            for layer, own in added.items()
            for name, tensor in own.items()
        },
    }


def check(
    case,
    routings: list[RoutingConfig],
    world: int,
    topologies: list[dict],
    folder,
    every: int = 1,
) -> None:
    _, base, samples, added = case
    expected = [expected_of(case, routing) for routing in routings]
    by_rule = [expected_of(case, routing, causal=True) for routing in routings]
    asked = [cases.Asked(routing) for routing in routings]
    found = run_ranks(
        cases.gradients, base, samples, added, topologies, asked, every,
        world=world, folder=folder,
    )  # fmt: skip
    assert {name[-1] for name in found[0]} == set(range(len(routings)))
    assert len(found[0]) == number_asked(len(topologies), len(routings), every)
    for name in found[0]:
        what, wanted, rule = (routings[name[-1]], name), expected[name[-1]], by_rule[name[-1]]
        seen = set()
        for result in (per_rank[name] for per_rank in found):
            causal = result["causal"]
            assert result["capacity"] == pytest.approx(wanted["capacity"]), what
            assert result["evaluated_capacity"] == pytest.approx(wanted["capacity"]), what
            assert result["step_task_loss"] == pytest.approx(wanted["task_loss"], rel=EXACT), what
            assert result["task_loss"] == pytest.approx(wanted["task_loss"], rel=EXACT), what
            assert causal["task_loss"] == pytest.approx(rule["task_loss"], rel=EXACT), what
            assert causal["capacity"] == pytest.approx(rule["capacity"]), what
            assert causal["agreement"] == pytest.approx(wanted["agreement"]), what
            assert causal["loss"] == pytest.approx(wanted["causal_loss"], rel=EXACT), what
            assert result["frozen_changed"] == 0
            for key, gradient in result["gradients"].items():
                seen.add(key)
                exact = wanted["gradients"][key]
                difference, size = (gradient - exact).abs().max(), exact.abs().max()
                assert difference <= EXACT * size + 1e-7, (what, key, difference, size)
        assert seen == wanted["gradients"].keys(), what


def test_the_rules_differ_in_the_batch(case):
    for routing in EVERY:
        found, rule = expected_of(case, routing), expected_of(case, routing, causal=True)
        assert all(0.3 < share < 1 for share in found["agreement"])
        assert found["capacity"] != rule["capacity"]
        assert found["task_loss"] != pytest.approx(rule["task_loss"], rel=1e-3)


@pytest.mark.parametrize(
    ("routings", "world", "topologies", "every"),
    [
        *one_in(
            3,
            [*EVERY, *ENDS],
            1,
            [{}, {"packed": True}, {"recompute": "full"}],
            id="one_rank",
        ),
        pytest.param([EVERY[4]], 1, [{"rows": 1}, {"rows": 8}], 1, id="rows"),
        pytest.param(
            [*EVERY, *ENDS],
            2,
            [TENSOR, PIPELINE, {"context": 2}],
            1,
            id="two_ranks",
            marks=pytest.mark.slow,
        ),
        *one_in(
            6,
            DEEP,
            2,
            [
                {"tensor": 2},
                TENSOR,
                PIPELINE,
                {},
                DISTRIBUTED,
                {"pipeline": 2, "virtual_pipeline": 2},
                {"context": 2, "rows": 1},
            ],
            id="two_ranks_deep",
        ),
        pytest.param(
            DEEP,
            4,
            [{"tensor": 2, "pipeline": 2}, {**TENSOR, "context": 2, "rows": 1}],
            1,
            id="four_ranks",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_loss_and_gradients_equal_the_formula(case, routings, world, topologies, every, tmp_path):
    check(case, routings, world, topologies, tmp_path, every)


@pytest.mark.parametrize("family", ["mistral", "qwen3"])
def test_other_families_equal_the_formula(single_process, family, tmp_path):
    case = with_predictors(make_case(tmp_path, *tiny.FAMILIES[family]))
    check(case, [*EVERY[::2], ENDS[0]], 1, [{}], tmp_path / "ranks")


def test_a_tie_goes_to_the_lower_position(case, tmp_path):
    """All scores of a router are one number: its bias."""
    hf, base, samples, added = case
    tied = {
        layer: {**own, "router.weight": torch.zeros(1, 32), "router.bias": torch.tensor([0.7])}
        for layer, own in added.items()
    }
    routing = replace(scheme("block_token", causal="auxiliary_loss"), bias=True)
    wanted = expected_of((hf, base, samples, tied), routing, ties=True)
    (found,) = run_ranks(
        cases.gradients, base, samples, tied, [{}], [cases.Asked(routing)],
        world=1, folder=tmp_path,
    )  # fmt: skip
    (result,) = found.values()
    assert result["step_task_loss"] == pytest.approx(wanted["task_loss"], rel=EXACT)


@pytest.mark.parametrize("rule", ["predictor", "auxiliary_loss"])
def test_adapters_hear_of_scores_that_stay_as_they_are(case, rule, tmp_path):
    """A score is a part of what is computed: adapters below have its gradient, too."""
    _, base, samples, added = case
    routing, adapters = scheme("block_token", causal=rule), copied(made(ALL), torch.float32)
    expected_of(case, routing, adapters=adapters)
    asked = cases.Asked(routing, lora=ALL, adapters=made(ALL), trained=("lora",))
    (found,) = run_ranks(
        cases.gradients, base, samples, added, [{}], [asked], world=1, folder=tmp_path
    )
    (result,) = found.values()
    for layer, own in adapters.items():
        for name, tensor in own.items():
            gradient = result["gradients"][layer, f"lora.{name}"]
            difference, size = (gradient - tensor.grad).abs().max(), tensor.grad.abs().max()
            assert difference <= EXACT * size + 1e-7, (layer, name)
