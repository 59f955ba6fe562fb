"""Routed layers in somebody else's hands: captured, compiled, and with nothing to compute."""

from __future__ import annotations

import pytest
import torch

from megatron_mod.routing.config import RoutingConfig
from tests.gpu.test_waits import SCHEMES, layer_of
from tests.gpu.where import layers_of, long_on_cpu, only_cuda

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("single_process")]


@only_cuda
@pytest.mark.parametrize("compute", ["dense", "sparse"])
def test_cuda_graphs_are_refused(compute):
    routing = RoutingConfig("attn_token", (0,), (0.5,), training_compute=compute)
    layer, rotary, hidden = layer_of(routing, "local")
    before = layer(hidden, rotary_pos_emb=rotary)[0]
    with pytest.raises(ValueError, match="CUDA graph"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        layer(hidden, rotary_pos_emb=rotary)
    assert torch.equal(layer(hidden, rotary_pos_emb=rotary)[0], before)


@pytest.mark.parametrize("implementation", ["local", "transformer_engine"])
@pytest.mark.parametrize("compute", ["dense", "sparse"])
@pytest.mark.parametrize(("granularity", "keys_values"), SCHEMES)
@long_on_cpu
def test_all_kept_is_all_and_nothing_kept_is_nothing(
    granularity, keys_values, compute, implementation
):
    """Also what no kernel likes: no tokens at all."""
    outputs = {}
    for threshold in (0.0, 1.0):
        routing = RoutingConfig(
            granularity, (0,), (0.5,), keys_values=keys_values, threshold=threshold,
            training_compute=compute,
        )  # fmt: skip
        with layers_of(implementation):
            layer, rotary, hidden = layer_of(routing, implementation)
            for training in (True, False):
                hidden.grad = None
                output, _ = layer.train(training)(hidden, rotary_pos_emb=rotary)
                output.float().square().mean().backward()
                assert output.isfinite().all()
                assert hidden.grad.isfinite().all()
                outputs[threshold, training] = output.detach().float()
    assert not torch.equal(outputs[0.0, True], outputs[1.0, True])
    for threshold in (0.0, 1.0):
        apart = (outputs[threshold, True] - outputs[threshold, False]).norm()
        assert apart <= 0.01 * outputs[threshold, True].norm()
    if granularity.startswith("block"):
        assert torch.equal(outputs[1.0, True], hidden.detach().float())


@pytest.mark.parametrize("compute", ["dense", "sparse"])
@long_on_cpu
def test_a_compiled_layer_is_right(compute):
    routing = RoutingConfig("block_token", (0,), (0.5,), training_compute=compute)
    layer, rotary, hidden = layer_of(routing, "local")
    found = []
    for run in (layer, torch.compile(layer, backend="eager")):
        layer.router.weight.grad = None
        output, _ = run(hidden, rotary_pos_emb=rotary)
        output.float().square().mean().backward()
        found.append((output.detach(), layer.router.weight.grad.clone()))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)
    torch.compiler.reset()
