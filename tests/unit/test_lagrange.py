"""Thresholds at one price per operation, on models whose best ones are known."""

from __future__ import annotations

import json
import math

import pytest
import torch

from megatron_mod.calibration.budget import EQUAL, PRICE, THRESHOLD, find
from megatron_mod.calibration.search import Calibration
from megatron_mod.config.budget import BudgetRequest
from megatron_mod.evaluation.backend import Observation
from megatron_mod.evaluation.rows import Row, Score
from megatron_mod.evaluation.work import Work
from megatron_mod.hf.thresholds_mod import logit_border
from megatron_mod.model.architecture import Architecture
from megatron_mod.routing.config import RoutingConfig
from megatron_mod.routing.scheme import Place

ROWS, LENGTH = 6, 100
ARCH = Architecture(
    num_layers=6, hidden_size=8, ffn_hidden_size=256, num_attention_heads=2, num_query_groups=2,
    kv_channels=4, vocab_size=32, max_sequence_length=128, layernorm_epsilon=1e-5,
    rotary_base=10000.0, tied_embeddings=True,
)  # fmt: skip


class Separable:
    """A backend whose loss is a sum over routers of what each skips, squared, times its weight;
    ``wild``: what it grows by as all of them skip together, which no measurement of one tells."""

    by_sequence = False

    def __init__(self, places: tuple[Place, ...], weights: tuple[float, ...], *, wild=0.0) -> None:
        self.places, self.weights, self.wild, self.calls = places, weights, wild, 0
        generator = torch.Generator().manual_seed(2)
        self.logits = torch.randn(ROWS, len(places), LENGTH, generator=generator)

    def observe(self, rows, *, thresholds):
        self.calls += 1
        borders = torch.tensor([logit_border(threshold) for threshold in thresholds])
        skipped = (self.logits < borders[:, None]).double().mean((0, 2))
        loss = float((torch.tensor(self.weights) * skipped.square()).sum())
        loss += self.wild * float(skipped.prod())
        score = Score(-LENGTH * (1 + loss), is_greedy=False)
        return [Observation(score, dict(zip(self.places, own, strict=True))) for own in self.logits]

    def experts(self):
        return {}


@pytest.fixture
def request_of(tmp_path):
    def make(**budget) -> BudgetRequest:
        data = tmp_path / "data.txt"
        data.touch()
        (tmp_path / "config.json").write_text(json.dumps({}))
        return BudgetRequest(str(tmp_path), str(data), **budget)

    return make


def calibration(granularity: str, weights, *, scope: str = "model", **more) -> Calibration:
    layers = tuple(range(1, 1 + len(weights) // (2 if "+" in granularity else 1)))
    places = len(weights)
    routing = RoutingConfig(granularity, layers, (0.5,) * places)
    backend = Separable(routing.places, weights, **more)
    rows = [Row(range(LENGTH), 4, range(LENGTH))] * ROWS
    return Calibration(backend, rows, Work(ARCH, routing), scope=scope)


@pytest.mark.parametrize(
    ("scope", "budget"), [("model", {"work": 0.7}), ("layer", {"speedup": 1 / 0.7})]
)
def test_all_routers_pay_one_price(request_of, scope, budget):
    """Least ``sum w s^2`` at a sum of ``s``: every ``s`` as ``1 / w``."""
    weights = (1.0, 2.0, 4.0, 8.0)
    made = calibration("block_token", weights, scope=scope)
    found = find(request_of(**budget), made)
    assert found.method == PRICE
    assert 0.69 < found.point.flops / made.dense_flops <= 0.7
    skipped = [1 - capacity for capacity in found.point.capacity]
    total = sum(skipped)
    best = [total / weight / sum(1 / w for w in weights) for weight in weights]
    assert skipped == pytest.approx(best, abs=0.06)
    assert found.other.flops <= 0.7 * made.dense_flops
    alike = sum(w * (total / 4) ** 2 for w in weights)
    least = sum(w * s**2 for w, s in zip(weights, best, strict=True))
    assert math.log(found.point.perplexity) - 1 < least + 0.1 * (alike - least)
    assert made.backend.calls < 60


def test_an_operation_costs_the_same_wherever_it_is(request_of):
    """An MLP that takes more work than an attention is skipped more at the same loss a unit."""
    made = calibration("attn_token+mlp_token", (1.0, 1.0, 1.0, 1.0))
    found = find(request_of(work=0.8), made)
    assert found.method == PRICE
    capacity = found.point.capacity
    assert max(capacity[1::2]) < min(capacity[::2]) - 0.1


@pytest.mark.parametrize(("scope", "method"), [("model", THRESHOLD), ("layer", EQUAL)])
def test_what_loses_less_is_kept(request_of, scope, method):
    """Where what one router trades says nothing of several, no price is better than one threshold
    for all."""
    made = calibration("block_token", (1.0, 1.0, 1.5, 1.0), scope=scope, wild=9.0)
    found = find(request_of(work=0.6), made)
    assert found.point.nats <= made.at_work(0.6).nats
    made = calibration("block_token", (0.0, 0.0, 0.0, 0.0), scope=scope)
    found = find(request_of(work=0.7), made)
    assert found.method == method
    assert found.other is None


def test_a_budget_below_all_skipped_says_what_the_least_is(request_of):
    made = calibration("attn_token", (1.0, 1.0))
    with pytest.raises(ValueError, match=r"--work 0.2: skipping everything .* leaves 0\.\d+ of"):
        find(request_of(work=0.2), made)
