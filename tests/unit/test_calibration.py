"""The search for thresholds, on models whose answers are known."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_mod.evaluation.backend import Observation
from megatron_mod.evaluation.calibration import Calibration
from megatron_mod.evaluation.rows import Row, Score
from megatron_mod.evaluation.work import Work
from megatron_mod.model.architecture import Architecture
from megatron_mod.routing.config import RoutingConfig, logit_border
from megatron_mod.routing.thresholds import border_at, threshold_at

ROWS, LENGTH, LAYERS = 10, 20, (0, 2)
ARCH = Architecture(
    num_layers=3, hidden_size=8, ffn_hidden_size=16, num_attention_heads=2, num_query_groups=2,
    kv_channels=4, vocab_size=32, max_sequence_length=64, layernorm_epsilon=1e-5,
    rotary_base=10000.0, tied_embeddings=True,
)  # fmt: skip


@pytest.mark.parametrize("capacity", [0.0, 0.1, 0.5, 0.73, 1.0])
def test_a_border_keeps_the_share(capacity):
    logits = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    kept = (logits >= border_at(logits, capacity)).double().mean()
    assert float(kept) == pytest.approx(capacity, abs=0.0021)


def test_a_border_is_near_no_logit():
    logits = torch.tensor([3.0, 2.0, 1.0001, 1.0, 0.9999, -4.0]).repeat_interleave(100)
    logits += 1e-7 * torch.arange(600) / 600  # the same, computed in different batches
    border = border_at(logits, 0.55)  # 330 would be among the ones
    assert float((logits - border).abs().min()) > 1e-5
    assert int((logits >= border).sum()) in (300, 400)
    assert border_at(torch.zeros(5), 0.5) == -math.inf
    assert border_at(torch.zeros(5), 0.4) == math.inf


@pytest.mark.parametrize("border", [-math.inf, -29.0, -1e-3, 0.0, 12.5, math.inf])
def test_a_threshold_is_its_borders(border):
    assert logit_border(threshold_at(border)) == pytest.approx(border, rel=1e-4)
    with pytest.raises(ValueError, match="around the logit -31"):
        threshold_at(-31.0)


class Model:
    """A backend whose later layer's logits fall with what the first one skips, and whose loss
    grows with all that is skipped."""

    layers = LAYERS

    def __init__(self, *, by_sequence: bool = False) -> None:
        generator = torch.Generator().manual_seed(2)
        units = 1 if by_sequence else LENGTH
        self.logits = 3 * torch.randn(ROWS, len(LAYERS), units, generator=generator)
        self.calls = 0

    def observe(self, rows, *, thresholds):
        self.calls += 1
        first, second = (logit_border(threshold) for threshold in thresholds)
        found = []
        for logits in self.logits:
            skipped = (logits[0] < first).double().mean()
            later = logits[1] - 4 * skipped
            cost = float(skipped + (later < second).double().mean()) / 2
            score = Score(-LENGTH * (2 + cost**2), is_greedy=False)
            found.append(Observation(score, dict(zip(LAYERS, (logits[0], later), strict=True))))
        return found


def calibration(scope: str, **settings) -> Calibration:
    granularity = "block_sequence" if settings.get("by_sequence") else "block_token"
    routing = RoutingConfig(granularity, LAYERS, (0.5, 0.5))
    rows = [Row(range(LENGTH), 4, range(LENGTH))] * ROWS
    return Calibration(Model(**settings), rows, Work(ARCH, routing), scope=scope)


@pytest.mark.parametrize("scope", ["layer", "model"])
@pytest.mark.parametrize("by_sequence", [False, True])
@pytest.mark.parametrize("capacity", [0.0, 0.3, 0.5, 0.9, 1.0])
def test_a_capacity_is_found(scope, by_sequence, capacity):
    found = calibration(scope, by_sequence=by_sequence)
    point = found.at_capacity(capacity)
    assert point.mean_capacity == pytest.approx(capacity, abs=max(0.005, found.unit))
    if scope == "layer":
        assert point.capacity == pytest.approx([capacity] * 2, abs=max(0.005, found.unit))
    else:
        assert len(set(point.thresholds)) == 1
    assert found.backend.calls <= 15


@pytest.mark.parametrize("scope", ["layer", "model"])
def test_the_largest_capacity_with_a_speedup_is_found(scope):
    found = calibration(scope)
    point = found.at_speedup(1.3)
    assert 1.3 <= found.speedup(point) <= 1.32
    with pytest.raises(ValueError, match="--speedup 9: .* at most"):
        found.at_speedup(9.0)


@pytest.mark.parametrize("scope", ["layer", "model"])
def test_the_smallest_capacity_with_a_perplexity_is_found(scope):
    found = calibration(scope)
    assert found.dense.perplexity == pytest.approx(math.exp(2))
    point = found.at_perplexity(1.1 * math.exp(2))
    assert 1.08 * math.exp(2) <= point.perplexity <= 1.1 * math.exp(2)
    assert found.at_perplexity(math.exp(2)).capacity == (1.0, 1.0)
    assert found.at_perplexity(math.exp(3.01)).mean_capacity == 0.0


def test_no_thresholds_are_run_twice():
    found = calibration("layer")
    found.at_capacity(0.5)
    calls = found.backend.calls
    assert found.at_capacity(0.5) is found.at(found.at_capacity(0.5).thresholds)
    assert found.backend.calls == calls
