"""What the host does for a decode step by CUDA graphs, the graphs left out.

On a GPU a step takes no less than this, whatever the model skips. It is Python's own time and that
of what is launched between graphs, of layers so small that computing takes next to nothing; so it
can be measured anywhere, and compared on one machine.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from megatron_mod.config.shapes import SHAPES
from megatron_mod.conversion.export import portable_config
from megatron_mod.hf.cache_mod import CACHE
from megatron_mod.hf.graph_mod import DecodingGraphs
from megatron_mod.hf.modeling_mod import MoDLlamaConfig, MoDLlamaForCausalLM
from megatron_mod.parallel import device
from megatron_mod.routing.config import RoutingConfig

LAYERS = 32
GRANULARITIES = (None, "attn_token", "block_token", "block_sequence")  # None: no routers
CONTEXT, WARM_UP, ROUNDS = 16, 10, 100


class LeftOut(DecodingGraphs):
    """Graphs that do nothing: what they would have made stays as it was at first."""

    def _record(
        self, function: Callable[[], Any], restore: Callable[[], Any]
    ) -> tuple[Callable[[], None], Any]:
        result = function()
        restore()
        return lambda: None, result


def host_times() -> Iterator[dict]:
    """Microseconds a layer and step of one sequence, median and least, of a model without routers
    and of models in which every other layer has one that keeps it; they take turns."""
    steps = {name: _steps_of(name) for name in GRANULARITIES}
    times: dict[str | None, list[float]] = {name: [] for name in GRANULARITIES}
    for number in range(WARM_UP + ROUNDS):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            if number >= WARM_UP:
                times[name].append(1e6 * (time.perf_counter() - began) / LAYERS)
    for name, found in times.items():
        middle = statistics.median(found)
        yield {"granularity": name, "us_per_layer": middle, "least_us_per_layer": min(found)}


def _steps_of(granularity: str | None) -> Callable[[], None]:
    """A decode step of a model, whose text grows."""
    shape = {**portable_config(SHAPES["tiny"]), "num_hidden_layers": LAYERS}
    shape.pop("model_type")
    if granularity is not None:
        layers = tuple(range(1, LAYERS, 2))
        routing = RoutingConfig(granularity, layers, (0.5,) * len(layers), scope="layer")
        shape["routing"] = routing.to_dict()
    config = MoDLlamaConfig(architectures=[MoDLlamaForCausalLM.__name__], **shape)
    with device.device():
        model = MoDLlamaForCausalLM(config).eval()
    ids = torch.zeros(1, CONTEXT, dtype=torch.int64, device=model.device)
    cache = DynamicCache(config=model.config)

    @torch.no_grad()
    def forward(tokens: Tensor) -> None:
        model(tokens, **{CACHE: cache})

    forward(ids)
    model.model.graphs = LeftOut(model.model.layers)
    return lambda: forward(ids[:, :1])
