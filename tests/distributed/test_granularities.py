"""Loss, capacity and router gradients of every scheme at every topology against the formula."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_mod.data.chat import Sample
from megatron_mod.routing.config import RoutingConfig
from megatron_mod.routing.scheme import OF_ANY_MODEL
from tests.distributed import cases
from tests.helpers import tiny
from tests.helpers.ranks import run_ranks
from tests.helpers.thinned import number_asked, one_in, some
from tests.helpers.training_formula import Scheme, adapt, batch_loss

RANK = 3  # of stand-ins
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
    added = {layer: {"router.weight": weight} for layer, weight in routers.items()}
    for granularity in ("attn_token", "attn_token+mlp_token"):
        routing = scheme(granularity, bias=True, stand_in_rank=RANK)
        for own in added.values():
            for name, shape in routing.added_shapes(32, num_experts=1).items():
                scale = 0.5 if name.startswith("router") else 0.3
                own.setdefault(name, scale * torch.randn(shape, generator=generator))
    return hf, root / "megatron", samples, added


def scheme(granularity: str, **changes: object) -> RoutingConfig:
    return cases.routing_config(granularity=granularity, **changes)


EVERY = [scheme(name) for name in OF_ANY_MODEL]
SELECTED = [
    scheme(name, keys_values="selected")
    for name in ("attn_token", "block_token", "attn_token+mlp_token")
]
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
DEEP = [EVERY[0], SELECTED[0], SPARSE[-3]]  # attn_sequence; attn_token selected, dense and sparse
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


def with_added(routing: RoutingConfig, loss: str, **changes: object) -> cases.Asked:
    """With biases and stand-ins, and a price where nothing else is said."""
    changes = {"bias": True, "stand_in_rank": RANK, "capacity_loss_weight": "auto", **changes}
    price = None
    if changes["capacity_loss_weight"] == "auto":
        price = (0.8, 0.3, 0.5, 0.6)[: len(routing.places)]
    return cases.Asked(replace(routing, **changes), loss, price)


PENALTY = {"capacity_loss_weight": 0.7}
ADDED = [
    *(with_added(r, "both") for r in [*EVERY, *SELECTED]),
    *(with_added(r, "task", **PENALTY) for r in SPARSE),
    with_added(SPARSE[1], "distill"),  # attn_token
    with_added(SPARSE[4], "distill", scope="layer"),  # block_sequence
    with_added(SPARSE[7], "distill", scope="layer"),  # attn_token+mlp_token
    with_added(EVERY[3], "task", bias=False, **PENALTY),  # mlp_token
]
ADDED_DEEP = [
    with_added(EVERY[1], "both"),
    with_added(SPARSE[4], "distill", scope="layer"),
    with_added(SPARSE[3], "task", **PENALTY),
    with_added(SPARSE[-2], "both"),
    with_added(SPARSE[-1], "both"),
]
assert [(r.routing.granularity, r.routing.keys_values) for r in ADDED_DEEP] == [
    ("attn_token", "all"),
    ("block_sequence", None),
    ("mlp_token", None),
    ("block_token", "selected"),
    ("attn_token+mlp_token", "selected"),
]
TENSOR = {"tensor": 2, "sequence_parallel": True}
PIPELINE = {"pipeline": 2}
DISTRIBUTED = {"use_distributed_optimizer": True}


def expected_of(
    case,
    training: RoutingConfig | cases.Asked,
    *,
    dtype: torch.dtype = torch.float32,
    beside: Callable[[], torch.Tensor | float] = lambda: 0.0,
) -> dict:
    """What the formula says, computed in ``dtype``; ``beside``: what is then added to the loss."""
    from transformers import AutoModelForCausalLM

    hf, _, samples, tensors = case
    training = asked(training)
    routing, loss_name, price, own = training[:4]
    model = AutoModelForCausalLM.from_pretrained(hf, dtype=dtype)
    if hasattr(model, "set_experts_implementation"):  # Transformers 5's grouped one has no float64
        model.set_experts_implementation("eager")
    model.requires_grad_("base" in training.trained)
    added = copied(cases.only(own or tensors, routing), dtype)
    teacher, adapters = None, {}
    is_fixed = "routers" not in training.trained
    if training.lora is not None:
        teacher = copy.deepcopy(model)
        adapters = {
            layer: {
                name: tensor.to(dtype, copy=True).requires_grad_() for name, tensor in its.items()
            }
            for layer, its in training.adapters.items()
        }
        adapt(model, adapters, training.lora.scale)
    rules = {k: v for k, v in vars(routing).items() if k in Scheme.__dataclass_fields__}
    rules |= {"priced": price is not None, "fixed": is_fixed, "loss": loss_name}
    found = batch_loss(model, samples, added, Scheme(**rules), teacher=teacher)
    assert found.margin > 1e-3, "a decision too close to the border to compare"
    loss, capacity = found.loss, found.capacity
    cost, found_price = 0.0, []
    if price is not None:
        cost = sum(p * capacity[k] for p, k in zip(price, routing.places, strict=True))
        slopes, pulls = [], []  # sum s / N and sum s e, with e of all but the unit's own price
        for place, own in zip(routing.places, price, strict=True):
            bias = added[place.layer][routing.name_of("router", place.target) + ".bias"]
            (slope,) = torch.autograd.grad(capacity[place], bias, retain_graph=True)
            (pull,) = torch.autograd.grad(loss + cost, bias, retain_graph=True)
            slopes.append(slope.sum())
            pulls.append((pull - own * slope).sum())
        pulls, slopes = torch.stack(pulls), torch.stack(slopes)
        if routing.scope == "model":
            pulls, slopes = (t.sum().expand(len(t)) for t in (pulls, slopes))
        found_price = (-pulls / slopes).tolist()
    for place, target in zip(routing.places, routing.capacity, strict=True):
        if price is not None or is_fixed or routing.num_noop_experts:
            break
        # The penalty, spelled out: before the first step the previous capacity is 1.
        mean = sum(routing.capacity) / len(routing.capacity)
        on = (mean if routing.scope == "model" else target) < 1.0
        loss = loss + routing.capacity_loss_weight * on * (capacity[place] - target)
    (loss + cost + beside()).backward()
    return {
        "logits": [logits.detach() for logits in found.logits],
        "price": found_price,
        "task_loss": float(found.task_loss.detach()),
        "loss": float(loss.detach()),
        "capacity": [float(capacity[place].detach()) for place in routing.places],
        "gradients": {
            (k, f"{prefix}{name}"): t.grad
            for prefix, all_own in (("", {} if is_fixed else added), ("lora.", adapters))
            for k, own in all_own.items()
            for name, t in own.items()
        },
        "base": {name: parameter.grad for name, parameter in model.named_parameters()},
    }


def copied(tensors: dict, dtype: torch.dtype) -> dict[int, dict[str, torch.Tensor]]:
    """Leaves of a graph, by layer and name."""
    return {
        layer: {name: tensor.to(dtype, copy=True).requires_grad_() for name, tensor in own.items()}
        for layer, own in tensors.items()
    }


def asked(training: RoutingConfig | cases.Asked) -> cases.Asked:
    return training if isinstance(training, cases.Asked) else cases.Asked(training)


def check(
    case, trainings: list, world: int, topologies: list[dict], folder, every: int = 1
) -> None:
    """``every``: of how many pairs of topology and training one is asked for."""
    _, base, samples, added = case
    trainings = [asked(training) for training in trainings]
    expected = [expected_of(case, training) for training in trainings]
    found = run_ranks(
        cases.gradients, base, samples, added, topologies, trainings, every,
        world=world, folder=folder,
    )  # fmt: skip
    assert {name[-1] for name in found[0]} == set(range(len(trainings)))
    assert len(found[0]) == number_asked(len(topologies), len(trainings), every)
    for name in found[0]:
        what = (trainings[name[-1]], name)
        wanted, seen = expected[name[-1]], set()
        for result in (per_rank[name] for per_rank in found):
            assert result["capacity"] == pytest.approx(wanted["capacity"]), what
            assert result["evaluated_capacity"] == pytest.approx(wanted["capacity"]), what
            assert result["task_loss"] == pytest.approx(wanted["task_loss"], rel=EXACT), what
            assert result["step_task_loss"] == pytest.approx(wanted["task_loss"], rel=EXACT), what
            assert result["loss"] == pytest.approx(wanted["loss"], rel=EXACT), what
            # A price is a small difference of large terms.
            assert result["price"] == pytest.approx(wanted["price"], rel=1e-3, abs=1e-6), what
            assert result["frozen_changed"] == 0
            for key, gradient in result["gradients"].items():
                seen.add(key)
                exact = wanted["gradients"][key]
                # A bias's gradient is a small difference of large terms.
                difference, size = (gradient - exact).abs().max(), exact.abs().max()
                assert difference <= EXACT * size + 1e-7, (what, key)
        assert seen == wanted["gradients"].keys(), what


def test_the_batch_skips_some_units_in_every_scheme(case):
    for routing in [*EVERY, *SELECTED]:
        capacity = expected_of(case, routing)["capacity"]
        assert min(capacity) < 1, routing
        assert max(capacity) > 0, routing
    for routing in FEW:
        capacity = expected_of(case, routing)["capacity"]
        assert 0 < min(capacity) < 0.1, routing
        assert max(capacity) < 0.3, routing
    assert expected_of(case, VARIANTS[3])["capacity"] == [1.0, 1.0]
    for routing in VARIANTS[-2:]:
        assert expected_of(case, routing)["capacity"] == [0.0, 0.0]


@pytest.mark.parametrize(
    ("trainings", "world", "topologies", "every"),
    [
        *one_in(2, [*ALL, *ADDED], 1, [{}, {"packed": True}], id="one_rank"),
        *some(3, [*EVERY, *SPARSE], 1, [{"rows": 1}], 1, id="one_row"),
        pytest.param(
            [*ALL, *ADDED_DEEP], 2, [TENSOR, PIPELINE], 1, id="two_ranks", marks=pytest.mark.slow
        ),
        *one_in(
            4,
            [*DEEP, *ADDED_DEEP],
            2,
            [
                {"tensor": 2},
                TENSOR,
                {},
                DISTRIBUTED,
                {"pipeline": 2, "layout": (1, 3)},
                {"pipeline": 2, "layout": (4, 0)},  # the last stage has the head alone
                {"pipeline": 2, "virtual_pipeline": 2},
                {"pipeline": 2, "virtual_pipeline": 2, "layout": (2, 1, 1, 0)},
                {"context": 2},
            ],
            id="two_ranks_deep",
        ),
        *one_in(
            3,
            [*DEEP, *ADDED_DEEP[:2]],
            4,
            [{"tensor": 2, "pipeline": 2}, {"context": 2, "pipeline": 2}, {"tensor": 2}],
            id="four_ranks",
        ),
        *some(2, FEW, 2, [{"context": 2, "rows": 1}], 1, id="two_ranks_few"),
        pytest.param(
            SELECTED_FEW,
            4,
            [{**TENSOR, "context": 2, "rows": 1}, {"context": 4, "rows": 1}],
            1,
            id="four_ranks_few",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_loss_and_gradients_equal_the_formula(case, trainings, world, topologies, every, tmp_path):
    check(case, trainings, world, topologies, tmp_path, every)


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
