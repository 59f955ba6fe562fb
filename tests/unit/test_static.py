"""Static removal against a search by hand on Hugging Face's dense model."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_mod.evaluation import static
from megatron_mod.evaluation.backend import Observation
from megatron_mod.evaluation.huggingface import load_huggingface
from megatron_mod.evaluation.huggingface_backend import HuggingFaceBackend
from megatron_mod.evaluation.rows import Row, Score
from megatron_mod.evaluation.work import Work
from megatron_mod.model.architecture import Architecture
from megatron_mod.routing.config import RoutingConfig
from tests.helpers import formula, tiny
from tests.helpers.routed import save_export

LAYERS, SEED = (0, 1, 2, 3), 23  # where the cheapest two differ from the two cheapest
ARCH = Architecture(
    num_layers=9, hidden_size=8, ffn_hidden_size=16, num_attention_heads=2, num_query_groups=2,
    kv_channels=4, vocab_size=32, max_sequence_length=64, layernorm_epsilon=1e-5,
    rotary_base=10000.0, tied_embeddings=True,
)  # fmt: skip
ROUTED = (1, 2, 3, 4, 5, 6, 7)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A dense model's folder, and rows to score."""
    folder = tmp_path_factory.mktemp("static") / "hf"
    tiny.save_tokenizer(tiny.save_llama(folder, vocab_size=tiny.VOCAB, seed=SEED))
    generator = torch.Generator().manual_seed(SEED)
    texts = [torch.randint(3, tiny.VOCAB, (12 + n,), generator=generator) for n in range(6)]
    return folder, [Row.continuation(text[:4].tolist(), text[4:].tolist()) for text in texts]


def backend_of(hf, save, scheme: str, **settings) -> HuggingFaceBackend:
    """On an export whose routers are zeros."""
    routers = {layer: torch.zeros(1, 32) for layer in LAYERS}
    save_export(save, hf, routers, **formula.SCHEMES[scheme])
    return HuggingFaceBackend(*load_huggingface(save), **settings)


@torch.no_grad()
def by_hand(dense, rows, removed, scheme: str) -> float:
    """Nats a label without these layers, in plain torch."""
    routers = {layer: torch.zeros(1, 32) for layer in LAYERS}
    borders = {layer: math.inf if layer in removed else -math.inf for layer in LAYERS}
    nats, labels = 0.0, 0
    for row in rows:
        logits, _, _ = formula.forward(
            dense, row.ids, routers, borders=borders, **formula.SCHEMES[scheme]
        )
        asked = torch.tensor(row.labels)
        nats += float(torch.nn.functional.cross_entropy(logits, asked, reduction="sum"))
        labels += row.num_labels
    return nats / labels


def ranked(dense, rows, scheme: str) -> list[int]:
    """One by one, the cheapest first."""
    return sorted(LAYERS, key=lambda layer: by_hand(dense, rows, [layer], scheme))


def searched(dense, rows, scheme: str) -> list[int]:
    """Each next one the cheapest given those already out."""
    order: list[int] = []
    while len(order) < len(LAYERS):
        left = [layer for layer in LAYERS if layer not in order]
        order.append(min(left, key=lambda layer: by_hand(dense, rows, [*order, layer], scheme)))
    return order


@pytest.mark.parametrize("scheme", ["attn_sequence", "mlp_token", "block_token_all"])
def test_each_next_layer_costs_least_given_those_already_out(model, scheme, tmp_path):
    hf, rows = model
    dense = formula.load_dense(hf)
    expected = searched(dense, rows, scheme)
    assert set(expected[:2]) != set(ranked(dense, rows, scheme)[:2]), "not a case at all"
    passes = []
    backend = backend_of(hf, tmp_path / "export", scheme, batch_size=4)
    greedy = static.Greedy(
        backend, rows, work=work_of(backend), after_pass=lambda: passes.append(1)
    )
    assert (greedy.first(0), len(passes)) == ([], 0)

    def first(count: int) -> list[int]:
        return [place.layer for place in greedy.first(count)]

    assert (first(1), len(passes)) == (expected[:1], 4)
    assert (first(3), len(passes)) == (expected[:3], 4 + 3 + 2)
    assert (first(2), len(passes)) == (expected[:2], 4 + 3 + 2), "nothing is run twice"
    assert first(4) == expected
    for count, losses in enumerate(greedy.losses):
        for place, loss in losses.items():
            removed = [*expected[:count], place.layer]
            assert loss == pytest.approx(by_hand(dense, rows, removed, scheme), rel=1e-4)
    for removed in ((), expected[:2]):
        places = [place for place in backend.places if place.layer in removed]
        loss = static.loss_without(backend, rows, places)
        assert loss == pytest.approx(by_hand(dense, rows, removed, scheme), rel=1e-4)


def test_layers_are_chosen_on_some_of_many_rows(model, tmp_path):
    hf, _ = model
    rows = [Row.continuation([5], [7] * 25) for _ in range(400)]
    backend = backend_of(hf, tmp_path / "export", "mlp_token")
    work = work_of(backend)
    chosen = static.Greedy(backend, rows, work=work).rows
    assert len(chosen) * 25 == static.CHOICE_TOKENS
    assert static.Greedy(backend, rows[:7], work=work).rows == rows[:7]
    long = [Row.continuation([5], [7] * 9000)]
    assert len(static.Greedy(backend, long, work=work).rows) == 1


def work_of(backend: HuggingFaceBackend) -> Work:
    return Work.of(backend.model.config.to_dict())


class Costs:
    """A backend on which it costs so much to leave out each place, whatever else is out."""

    def __init__(self, places, cost) -> None:
        self.places, self.cost = places, cost

    def observe(self, rows, *, thresholds):
        out = sum(self.cost(p) for p, t in zip(self.places, thresholds, strict=True) if t == 1.0)
        score = [Score(-(2 + out) * row.num_labels, is_greedy=False) for row in rows]
        return [Observation(one, {}) for one in score]


def flops_without(work: Work, rows, removed) -> int:
    """Of a prefill of all rows, as if these places had nothing to route."""
    places = work.routing.places
    work = work.at([float(place in removed) for place in places])
    total = 0
    for row in rows:
        everyone = torch.ones(len(row.ids), dtype=torch.bool)
        total += work.prefill(len(row.ids), {p: everyone & (p not in removed) for p in places})
    return total


ROWS = [Row.continuation([5], list(range(length))) for length in (20, 33)]


@pytest.mark.parametrize(
    "granularity", ["attn_sequence", "mlp_token", "block_token", "attn_token+mlp_token"]
)
def test_as_much_is_removed_as_takes_the_same_work(granularity):
    targets = len(formula.targets_of(granularity))
    work = Work(ARCH, RoutingConfig(granularity, ROUTED, (0.5,) * len(ROUTED) * targets))
    places = work.routing.places
    backend = Costs(places, lambda place: (7 * place.layer) % 5 + (place.target == "mlp"))
    greedy = static.Greedy(backend, ROWS, work=work)
    order = greedy.first(len(places))
    by_count = [flops_without(work, ROWS, order[:count]) for count in range(len(places) + 1)]
    assert by_count == sorted(by_count, reverse=True)
    least, most = by_count[-1] - 5000, by_count[0] + 5000
    for flops in range(least, most, (most - least) // 40):
        found = static.Greedy(backend, ROWS, work=work).nearest(ROWS, flops)
        assert found == order[: len(found)]
        miss = abs(by_count[len(found)] - flops)
        assert miss == min(abs(one - flops) for one in by_count)
    for count, flops in enumerate(by_count):
        assert greedy.nearest(ROWS, flops) == order[:count]


def test_where_parts_differ_in_work_the_least_loss_for_it_goes_first():
    """An attention takes more than an MLP here."""
    routing = RoutingConfig("attn_token+mlp_token", (1, 2), (0.5,) * 4)
    work, costs = Work(ARCH, routing), {(1, "attn"): 1.2, (1, "mlp"): 1.0, (2, "mlp"): 3.0}
    backend = Costs(routing.places, lambda place: costs.get(place, 2.0))
    order = static.Greedy(backend, ROWS, work=work).first(4)
    saved = {
        place: flops_without(work, ROWS, []) - flops_without(work, ROWS, [place])
        for place in routing.places
    }
    by_work = sorted(routing.places, key=lambda place: costs.get(place, 2.0) / saved[place])
    by_loss = sorted(routing.places, key=lambda place: costs.get(place, 2.0))
    assert order == by_work != by_loss


def test_routing_that_offers_all_keys_does_more_work_than_removal_at_its_capacity():
    rows, counts = [Row.continuation([5], list(range(30)))], {}
    for keys_values in ("selected", "all"):
        routing = RoutingConfig("attn_token", ROUTED, (0.5,) * len(ROUTED), keys_values=keys_values)
        work = Work(ARCH, routing)  # of about four layers' worth skipped
        kept = {place: torch.arange(30) % 7 < 3 for place in routing.places}
        greedy = static.Greedy(Costs(routing.places, lambda _: 1.0), rows, work=work)
        counts[keys_values] = len(greedy.nearest(rows, work.prefill(30, kept)))
    assert counts["all"] < 4 <= counts["selected"]
