"""The search for thresholds, on models whose answers are known."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_mod.calibration.curve import Curve
from megatron_mod.calibration.search import Calibration
from megatron_mod.evaluation.backend import Observation
from megatron_mod.evaluation.rows import Row, Score
from megatron_mod.evaluation.work import Work
from megatron_mod.hf.thresholds_mod import border_at, common_border, settled_border, threshold_at
from megatron_mod.model.architecture import Architecture
from megatron_mod.routing.config import RoutingConfig, logit_border
from megatron_mod.routing.scheme import Place

ROWS, LENGTH, LAYERS = 10, 20, (0, 2)
PLACES = tuple(Place(layer, "block") for layer in LAYERS)
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


@pytest.mark.parametrize("scale", [1e-3, 1.0, 50.0])
def test_many_scores_that_differ_reach_the_share_at_any_scale(scale):
    """Half a million, of which most lie nearer to each other than rounding tells apart."""
    logits = scale * torch.randn(500_000, generator=torch.Generator().manual_seed(0))
    for capacity in (0.25, 0.5, 0.9):
        kept = (logits >= border_at(logits, capacity)).double().mean()
        assert float(kept) == pytest.approx(capacity, abs=0.0021)


@pytest.mark.parametrize("capacity", [0.2, 0.3, 0.35, 0.5, 0.59, 0.61])
def test_a_large_group_of_equal_scores_stays_together(capacity):
    """A third of the units, equal but for rounding, among many that differ."""
    generator = torch.Generator().manual_seed(0)
    equal = 0.3 * (1 + 1e-6 * torch.rand(1000, generator=generator))
    logits = torch.cat((equal, torch.randn(2000, generator=generator)))
    kept = logits >= border_at(logits, capacity)
    assert len(kept[:1000].unique()) == 1
    above = float((logits > 0.31).double().mean())
    nearest = min((above, above + 1 / 3), key=lambda share: abs(share - capacity))
    if above < capacity < above + 1 / 3:
        assert float(kept.double().mean()) == pytest.approx(nearest, abs=0.005)
    else:
        assert float(kept.double().mean()) == pytest.approx(capacity, abs=0.0021)


def test_settling_keeps_the_same_units_and_leaves_no_group_divided():
    logits = torch.tensor([3.0, 2.0, 2.0, -1.0])
    assert settled_border(logits, 2.9) == 2.5
    assert settled_border(logits, 1.9) == 0.5
    assert settled_border(logits, 2.0) is None, "rounding may have decided otherwise"
    assert settled_border(logits, 4.0) == math.inf
    assert settled_border(logits, -1.5) == -math.inf
    near = torch.tensor([3.0, 2.0 + 1e-6, 2.0, -1.0])
    assert settled_border(near, 2.0 + 5e-7) is None


def test_scores_that_are_no_numbers_are_refused():
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="scores are not all finite"):
            border_at(torch.tensor([0.0, bad, 1.0]), 0.5)


def test_no_units_at_all_leave_a_layer_on():
    assert border_at(torch.zeros(0), 0.5) == -math.inf
    assert settled_border(torch.zeros(0), 1.0) == -math.inf


def falling(border: float) -> torch.Tensor:
    """Scores of two layers of which the second's fall by what the first one skips."""
    first = torch.linspace(-1, 1, 101)
    return torch.cat((first, first - (first < border).float().mean()))


def test_a_common_border_is_where_its_own_scores_put_it():
    seen = []

    def scores_at(border: float) -> torch.Tensor:
        seen.append(border)
        return falling(border)

    for capacity in (0.2, 0.5, 0.8):
        border = common_border(scores_at, capacity)
        assert border == settled_border(falling(border), border)
        assert float((falling(border) >= border).double().mean()) == pytest.approx(
            capacity, abs=0.01
        )
    assert len(seen) < 3 * 20


def test_a_common_border_that_cannot_settle_divides_no_group():
    """Keeping the group makes it too many, skipping it too few: the share lies between."""

    def scores_at(border: float) -> torch.Tensor:
        group = torch.full((50,), 0.5 if border > 0 else -0.5)
        return torch.cat((torch.linspace(1, 2, 10), group, torch.linspace(-2, -1, 40)))

    border = common_border(scores_at, 0.3)
    scores = scores_at(border)
    assert settled_border(scores, border) == border
    assert int((scores >= border).sum()) in (10, 60)


@pytest.mark.parametrize("border", [-math.inf, -29.0, -1e-3, 0.0, 12.5, math.inf])
def test_a_threshold_is_its_borders(border):
    assert logit_border(threshold_at(border)) == pytest.approx(border, rel=1e-4)
    with pytest.raises(ValueError, match="around the logit -31"):
        threshold_at(-31.0)


class Model:
    """A backend whose later layer's logits ``fall`` with what the first one skips, and whose loss
    grows with all that is skipped."""

    places = PLACES

    def __init__(self, *, by_sequence: bool = False, fall: float = 4.0) -> None:
        self.by_sequence, self.fall = by_sequence, fall
        generator = torch.Generator().manual_seed(2)
        units = 1 if by_sequence else LENGTH
        self.logits = 3 * torch.randn(ROWS, len(PLACES), units, generator=generator)
        self.calls = 0

    def observe(self, rows, *, thresholds):
        self.calls += 1
        first, second = (logit_border(threshold) for threshold in thresholds)
        found = []
        for logits in self.logits:
            skipped = (logits[0] < first).double().mean()
            later = logits[1] - self.fall * skipped
            cost = float(skipped + (later < second).double().mean()) / 2
            score = Score(-LENGTH * (2 + cost**2), is_greedy=False)
            found.append(Observation(score, dict(zip(PLACES, (logits[0], later), strict=True))))
        return found

    def experts(self):
        return {}


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
def test_a_budget_takes_few_passes_where_scores_move_little(scope):
    found = calibration(scope, fall=0.3)
    for work in (0.9, 0.7):
        calls = found.backend.calls
        assert work - 0.006 <= found.at_work(work).flops / found.dense_flops <= work
        assert found.backend.calls - calls <= 4


@pytest.mark.parametrize("scope", ["layer", "model"])
def test_the_smallest_capacity_with_a_perplexity_is_found(scope):
    found = calibration(scope)
    assert found.dense.perplexity == pytest.approx(math.exp(2))
    point = found.at_perplexity(1.1 * math.exp(2))
    assert 1.08 * math.exp(2) <= point.perplexity <= 1.1 * math.exp(2)
    assert found.at_perplexity(math.exp(2)).capacity == (1.0, 1.0)
    assert found.at_perplexity(math.exp(3.01)).mean_capacity == 0.0


@pytest.mark.parametrize("scope", ["layer", "model"])
def test_every_budgets_borders_lie_in_the_middle_of_gaps(scope):
    found = calibration(scope)
    for point in (found.at_capacity(0.6), found.at_speedup(1.2), found.at_perplexity(7.6)):
        groups = [torch.cat(list(point.logits.values()))] if scope == "model" else (
            point.logits.values())  # fmt: skip
        for logits, threshold in zip(groups, point.thresholds, strict=scope == "layer"):
            border = logit_border(threshold)
            assert settled_border(logits, border) == pytest.approx(border, rel=1e-9)


def test_a_capacity_of_layers_is_where_their_own_scores_put_it():
    point = calibration("layer").at_capacity(0.4)
    borders = list(map(logit_border, point.thresholds))
    assert borders == pytest.approx([border_at(s, 0.4) for s in point.logits.values()], rel=1e-9)


def test_no_thresholds_are_run_twice():
    found = calibration("layer")
    found.at_capacity(0.5)
    calls = found.backend.calls
    assert found.at_capacity(0.5) is found.at(found.at_capacity(0.5).thresholds)
    assert found.backend.calls == calls


def test_a_layer_that_will_never_keep_anybody_takes_less_work():
    """Of two thresholds that skip everything, that of 1 says so; the model is not run again."""
    found = calibration("layer")
    nobody, never = found.at([1 - 1e-12] * 2), found.at([1.0] * 2)
    assert found.backend.calls == 2
    assert nobody.nats == never.nats
    assert nobody.flops - never.flops == 2 * ROWS * LENGTH * 2 * (2 * 8 * 8)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_a_point_stands_beside_the_removal_of_as_much_work(share):
    found = calibration("layer")
    point = found.at_capacity(share)
    at = Curve(found).at(point)
    every = [found.at([1.0] * n + [0.0] * (2 - n)).flops for n in range(3)]
    assert at.static.flops == min(every, key=lambda flops: abs(flops - point.flops))
    assert at.static.capacity == tuple(float(place not in at.removed) for place in PLACES)
    told = at.to_dict()
    assert told["static_method"] == "greedy"
    assert told["static_capacity"] == at.static.mean_capacity
    assert told["static_counted_speedup"] == found.dense_flops / at.static.flops
    assert told["static_removed_layers"] == [place.layer for place in at.removed]


def test_layers_may_be_chosen_on_other_rows():
    found = calibration("layer")
    curve = Curve(found, ranking=found.rows[:2])
    seen = []
    observe = found.backend.observe
    found.backend.observe = lambda rows, thresholds: (
        seen.append((len(rows), thresholds)) or observe(rows, thresholds=thresholds)
    )
    at = curve.at(found.at_capacity(0.5))
    assert [thresholds for rows, thresholds in seen if rows == 2] == [[1.0, 0.0], [0.0, 1.0]]
    assert seen[-1] == (ROWS, tuple(float(place in at.removed) for place in PLACES))
