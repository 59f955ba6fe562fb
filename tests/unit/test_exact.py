"""Which tokens an exact selection keeps."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_mod.model.architecture import Architecture
from megatron_mod.model.cost import training_costs
from megatron_mod.routing.config import RoutingConfig
from megatron_mod.routing.exact import draw_lots, top_k


@pytest.mark.parametrize("capacity", [0.0, 0.125, 0.3, 0.35, 0.5, 0.999, 1.0])
def test_each_document_keeps_its_share_of_the_largest_scores(capacity):
    """Against a sort of each document by itself; rows of several documents, padding, ties."""
    random = torch.Generator().manual_seed(7)
    lengths = [[5, 1, 4], [10], [3, 3], []]
    rows = [[(d, p) for d, n in enumerate(row) for p in range(n)] for row in lengths]
    size, number = 12, 0
    document = torch.zeros(size, len(rows), dtype=torch.int64)
    positions, valid = document.clone(), torch.zeros(size, len(rows), dtype=torch.bool)
    for row, tokens in enumerate(rows):
        for place, (own, position) in enumerate(tokens):
            document[place, row], positions[place, row] = number + own, position
            valid[place, row] = True
        number += len(lengths[row])
    scores = torch.randint(-3, 3, (size, len(rows)), generator=random).float()  # many ties
    shuffled = torch.randperm(size, generator=random)  # as a zigzag of ranks' parts is
    parts = (t[shuffled] for t in (scores, document, positions, valid))
    found = top_k(*parts, num_documents=number, capacity=capacity)
    kept = torch.zeros_like(valid)
    kept[shuffled] = found
    for one in range(number):
        mine = (document == one) & valid
        tokens = sorted(zip((-scores[mine]).tolist(), positions[mine].tolist(), strict=True))
        k = math.floor(capacity * len(tokens) + 0.5)
        assert sorted(positions[mine & kept].tolist()) == sorted(p for _, p in tokens[:k])
    assert not (kept & ~valid).any()


def test_lots_are_even_and_each_layers_own():
    positions = torch.arange(4096)[:, None].expand(-1, 2)
    lots = draw_lots(positions, lot=3, layer=1)
    assert torch.equal(lots, draw_lots(positions, lot=3, layer=1))
    assert torch.equal(lots[:, 0], lots[:, 1])
    assert float(lots.min()) >= 0
    assert float(lots.max()) < 1
    histogram = torch.histc(lots[:, 0], 8, 0, 1)
    assert float((histogram - 512).abs().max()) < 100  # five standard deviations
    for other in (draw_lots(positions, lot=4, layer=1), draw_lots(positions, lot=3, layer=2)):
        together = torch.corrcoef(torch.stack((lots[:, 0], other[:, 0])))[0, 1]
        assert abs(float(together)) < 0.08


def test_the_share_that_is_kept_falls_with_the_steps():
    routing = RoutingConfig(
        "block_token", (1, 3), (0.125, 0.3), selection="top_k", capacity_warmup_fraction=0.5
    )
    first, third = routing.places
    assert routing.keys_values == "selected"
    assert routing.capacities_at(0.0) == {first: 1.0, third: 1.0}
    assert routing.capacities_at(0.25) == pytest.approx({first: 0.5625, third: 0.65})
    assert routing.capacities_at(0.5) == {first: 0.125, third: 0.3}  # to the bit
    assert routing.capacities_at(0.9) == {first: 0.125, third: 0.3}


@pytest.mark.parametrize("granularity", ["attn_token", "mlp_token", "block_token"])
def test_a_training_step_costs_what_its_documents_keep(granularity):
    """By hand: of 10 and 7 tokens a layer keeps floor(0.3 n + 0.5), 3 and 2 of them."""
    hidden, ffn, vocab, size = 8, 12, 16, 4
    arch = Architecture(
        num_layers=2, hidden_size=hidden, ffn_hidden_size=ffn, num_attention_heads=2,
        num_query_groups=2, kv_channels=4, vocab_size=vocab, max_sequence_length=64,
        layernorm_epsilon=1e-5, rotary_base=10000.0, tied_embeddings=True,
    )  # fmt: skip
    routing = RoutingConfig(
        granularity, (1,), (0.3,), selection="top_k", causal="predictor", predictor_size=size,
        training_compute="sparse",
    )  # fmt: skip
    attends, feeds = granularity != "mlp_token", granularity != "attn_token"
    whole, kept = (17, 55 + 28), (5, 6 + 3)  # tokens, pairs of them that attention sees
    (tokens, pairs), through = (kept if attends else whole), (kept if feeds else whole)[0]
    wanted = 17 * 2 * (hidden + size * (hidden + 1))  # the router and its predictor
    wanted += tokens * 4 * 2 * hidden * hidden + pairs * 4 * hidden
    wanted += through * 3 * 2 * hidden * ffn
    costs = training_costs(arch, routing, [10, 7], labels=0, kept=[0.3])
    assert costs.layers[0] == 17 * (4 * 2 * hidden**2 + 3 * 2 * hidden * ffn) + 83 * 4 * hidden
    if granularity == "attn_token":  # backward comes to its scores through the MLP's inputs
        wanted += 17 * 3 * 2 * hidden * ffn
    assert costs.layers[1] == wanted
