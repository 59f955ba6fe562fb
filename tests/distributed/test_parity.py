"""Logits, losses and gradients at every topology against Hugging Face and the formula."""

from __future__ import annotations

import pytest
import torch

from megatron_mod.data.chat import Sample
from megatron_mod.routing.config import RoutingConfig
from tests.distributed import cases
from tests.helpers import oracle, tiny
from tests.helpers.ranks import run_ranks

ONE = [{}]
TWO = [
    {"tensor": 2},
    {"tensor": 2, "sequence_parallel": True},
    {"pipeline": 2},
    {},  # data 2
]
FOUR = [{"tensor": 2, "pipeline": 2}]
ZEROS = cases.routing_config()
LOGITS = 2e-5  # largest logit difference over largest logit, fp32
EXACT = 1e-4  # relative difference of losses and gradients


@pytest.fixture(scope="module")
def models(tmp_path_factory, single_process):
    """Each tiny model as Hugging Face folder and as base checkpoint; and as its own base, read
    without conversion."""
    root = tmp_path_factory.mktemp("models")
    pairs = []
    kinds = {**{n: ("llama", changes) for n, changes in tiny.LLAMAS.items()}, **tiny.FAMILIES}
    for name, (kind, changes) in kinds.items():
        hf = tiny.save_model(root / name, kind, **changes)
        cases.convert(hf, root / f"{name}-megatron")
        pairs.append((hf, root / f"{name}-megatron"))
    return pairs + [(hf, hf) for hf, _ in pairs if hf.name in ("odd_vocabulary", "qwen2", "qwen3")]


@pytest.fixture(scope="module")
def routed_case(models):
    """A model, a batch, and routers away from zero under which some sequences skip."""
    hf, base = next(pair for pair in models if pair[0].name == "odd_vocabulary")
    generator = torch.Generator().manual_seed(11)
    samples = []
    for index, (prompt, answer) in enumerate(
        [(3, 4), (9, 6), (5, 11), (7, 2), (4, 8), (12, 5), (6, 6), (3, 9)]
    ):
        ids = torch.randint(3, 128, (prompt + answer,), generator=generator).tolist()
        samples.append(Sample(ids, [False] * prompt + [True] * answer, f"made:{index}"))
    routers = {layer: 0.5 * torch.randn(1, 32, generator=generator) for layer in cases.ROUTED}
    return hf, base, samples, routers


ROUTINGS = [
    cases.routing_config(pooling="prompt"),
    cases.routing_config(pooling="all", scope="layer"),
    # Out of reach, so this layer's penalty is off from the first step on: 1 > 1 is false.
    cases.routing_config(pooling="all", scope="layer", capacity=(1.0, 0.25)),
]


@pytest.mark.parametrize(
    ("world", "topologies"),
    [(2, TWO), (4, FOUR)],
    ids=["two_ranks", "four_ranks"],
)
def test_logits_equal_hugging_face(models, world, topologies, tmp_path):
    found = run_ranks(
        cases.logit_differences, models, topologies, 128, ZEROS, world=world, folder=tmp_path
    )
    for per_rank in found:
        assert len(per_rank) == len(models) * len(topologies)
        assert max(per_rank.values()) <= LOGITS, per_rank


def test_logits_equal_hugging_face_on_one_rank(models, single_process):
    found = cases.logit_differences(models, ONE, 128, ZEROS)
    assert len(found) == len(models)
    assert max(found.values()) <= LOGITS, found


def test_another_model_is_told_apart(models, single_process):
    swapped = [(models[0][0], models[1][1])]
    (difference,) = cases.logit_differences(swapped, ONE, 128, ZEROS).values()
    assert difference > 0.1


def _formula(routed_case, routing: RoutingConfig) -> dict:
    from transformers import LlamaForCausalLM

    hf, _, samples, weights = routed_case
    model = LlamaForCausalLM.from_pretrained(hf, dtype=torch.float32).requires_grad_(False)
    routers = {layer: weight.clone().requires_grad_() for layer, weight in weights.items()}
    loss, capacity, margin = oracle.training_loss(
        model, samples, routers, weight=0.0, target=0.0, pooling=routing.pooling
    )
    assert margin > 1e-3, "a decision too close to the border to compare"
    assert 0 < min(capacity.values()) < 1 or max(capacity.values()) < 1, "nothing skips"
    # The penalty, spelled out: before the first step the previous capacity is 1.
    for layer, target in zip(routing.layers, routing.capacity, strict=True):
        mean = sum(routing.capacity) / len(routing.capacity)
        on = (mean if routing.scope == "model" else target) < 1.0
        mask_mean, *_ = _mask_mean(model, samples, routers, layer, routing.pooling)
        loss = loss + routing.capacity_loss_weight * on * (mask_mean - target)
    loss.backward()
    return {
        "loss": float(loss.detach()),
        "capacity": [capacity[layer] for layer in routing.layers],
        "gradients": {layer: router.grad for layer, router in routers.items()},
    }


def _mask_mean(model, samples, routers, layer, pooling):
    masks = []
    for sample in samples:
        pooled = slice(0, sample.prompt_length) if pooling == "prompt" else slice(None)
        _, made, _ = oracle.forward(model, sample.ids, routers, pooled=pooled)
        masks.append(made[layer])
    return torch.stack(masks).mean(), masks


@pytest.mark.parametrize(
    ("world", "topologies"),
    [
        (1, ONE),
        (2, [*TWO, {"use_distributed_optimizer": True}, {"pipeline": 2, "first": 1}]),
        (4, [*FOUR, {}, {"tensor": 2}, {"pipeline": 2}]),
    ],
    ids=["one_rank", "two_ranks", "four_ranks"],
)
def test_loss_and_gradients_equal_the_formula(routed_case, world, topologies, tmp_path):
    _, base, samples, routers = routed_case
    expected = [_formula(routed_case, routing) for routing in ROUTINGS]
    found = run_ranks(
        cases.gradients, base, samples, routers, topologies, ROUTINGS, world=world, folder=tmp_path
    )
    for name in found[0]:
        wanted = expected[name[-1]]
        seen = set()
        for per_rank in found:
            result = per_rank[name]
            assert result["loss"] == pytest.approx(wanted["loss"], rel=EXACT), name
            assert result["capacity"] == pytest.approx(wanted["capacity"]), name
            assert result["frozen_changed"] == 0
            for layer, gradient in result["gradients"].items():
                seen.add(layer)
                scale = wanted["gradients"][layer].abs().max()
                difference = (gradient - wanted["gradients"][layer]).abs().max() / scale
                assert difference < EXACT, (name, layer)
        distributed_optimizer = name[-3]
        assert seen == (set() if distributed_optimizer else set(cases.ROUTED)), name
