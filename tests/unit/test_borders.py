"""What moves the routers' biases, on routers alone."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_mod.routing.config import RoutingConfig
from megatron_mod.routing.router import Router
from megatron_mod.training.borders import Hold

LAYERS, HIDDEN = (1, 3), 8


@pytest.mark.parametrize("scope", ["layer", "model"])
def test_a_step_moves_no_mean_score(single_process, scope):
    """Each layer's, or with scope ``model`` the mean of all layers', of the units it has seen."""
    torch.manual_seed(0)
    routers = {layer: Router(HIDDEN, bias=True) for layer in LAYERS}
    inputs = {layer: torch.randn(50, HIDDEN) + 1 for layer in LAYERS}
    routing = RoutingConfig("attn_token", LAYERS, (0.5, 0.5), scope=scope, bias=True)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    model = SimpleNamespace(routers=lambda: routers, groups=groups)

    def means() -> torch.Tensor:
        return torch.stack([routers[layer](inputs[layer]).mean() for layer in LAYERS]).detach()

    before, hold = means(), Hold(model, routing)
    for router in routers.values():
        router.weight.data += torch.randn(1, HIDDEN)
        router.bias.data += torch.randn(1)
    moved = means() - before
    hold.release(torch.stack([inputs[layer].mean(0) for layer in LAYERS]))
    assert moved.abs().min() > 0.1
    wanted = torch.zeros(2) if scope == "layer" else moved - moved.mean()
    torch.testing.assert_close(means() - before, wanted, atol=1e-5, rtol=0)
