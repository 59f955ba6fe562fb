"""What moves the routers' biases, on routers alone."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_mod.model.layout import TokenLayout, zigzag
from megatron_mod.routing.config import RoutingConfig
from megatron_mod.routing.router import Router
from megatron_mod.training.borders import move, shifts

LAYERS, HIDDEN = (1, 3), 8
SHARES = torch.tensor([0.3, 0.6])


@pytest.mark.parametrize("scope", ["layer", "model"])
def test_biases_follow_the_routers_as_they_are_after_a_step(single_process, scope):
    """Of the units that were noted before it: of each layer's its share, with scope ``model`` the
    mean share of all layers' together; what is no unit does not count."""
    torch.manual_seed(0)
    routing = RoutingConfig("attn_token", LAYERS, (0.5, 0.5), scope=scope, bias=True)
    routers = {place: Router(HIDDEN, bias=True) for place in routing.places}
    inputs = {place: torch.randn(200, HIDDEN) + 1 for place in routing.places}
    groups = ProcessGroupCollection.use_mpu_process_groups()
    model = SimpleNamespace(routers=lambda: routers, groups=groups)
    for place, router in routers.items():
        padding = torch.full((50, HIDDEN), 100.0)
        valid = torch.arange(250) < 200
        sizes = torch.ones(3, 250, dtype=torch.float64)
        router.note_inputs(torch.cat((inputs[place], padding)), valid, sizes)
    for router in routers.values():
        router.weight.data += torch.randn(1, HIDDEN)
        router.bias.data += torch.randn(1)
    move(model, routing, shifts(model, routing, SHARES))
    kept = torch.stack([(routers[k](inputs[k]) >= 0).float().mean() for k in routing.places])
    if scope == "layer":
        torch.testing.assert_close(kept, SHARES, atol=0.01, rtol=0)
    else:
        assert float(kept.mean()) == pytest.approx(float(SHARES.mean()), abs=0.01)


@pytest.mark.parametrize("stride", [1, 3, 5])
def test_ranks_that_share_a_row_note_the_same_of_its_units(stride):
    places = torch.arange(48).view(24, 2)
    found = []
    for rank in (0, 1):
        mine = zigzag(places, dim=0, rank=rank, ranks=2)
        roles = torch.zeros(2, len(mine), dtype=torch.uint8)
        layout = TokenLayout(roles=roles, position_ids=mine.t() // 2, context_ranks=2)
        found += mine.flatten()[layout.every(stride, context_rank=rank)].tolist()
    assert sorted(found) == list(range(0, 48, stride))
    roles = torch.zeros(2, 24, dtype=torch.uint8)
    alone = TokenLayout(roles=roles, position_ids=places.t() // 2)
    assert places.flatten()[alone.every(stride, context_rank=0)].tolist() == sorted(found)
