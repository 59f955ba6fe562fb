"""The attention of one query a sequence among keys that fill part of their memory, in three ways.

What decode steps by CUDA graphs may do: graphs are fixed, numbers of keys are not.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from megatron_mod.config.shapes import SHAPES
from megatron_mod.hf.attention_mod import attend_in_parts
from megatron_mod.hf.buffers_mod import capacity_for
from megatron_mod.hf.kernels_mod import kernels_of_any_shape
from megatron_mod.parallel import device

TIMES, ROUNDS = 20, 10


@torch.inference_mode()
def attention_times(
    shape: str, cells: Sequence[tuple[int, int]], dtype: torch.dtype
) -> Iterator[dict]:
    """Microseconds, medians of ways in turn, for each batch and context: ``alone_us``, of exactly
    the keys there are, launched by itself; ``masked_us``, of all there is room for, under a mask;
    ``in_parts_us``, as exports do in graphs; and how far apart the first and the last are."""
    heads, groups = (SHAPES[shape][f"num_{kind}_heads"] for kind in ("attention", "key_value"))
    channels = SHAPES[shape]["hidden_size"] // heads
    scale = channels**-0.5
    for batch, context in cells:
        with device.device():
            query = torch.randn(batch, groups, heads // groups, channels, dtype=dtype)
            size = batch, groups, capacity_for(context), channels
            keys, values = (torch.randn(size, dtype=dtype) for _ in range(2))
            bias = torch.zeros(batch, 1, 1, size[2])
        bias[..., context:] = -torch.inf
        few, mask = [held[:, :, :context] for held in (keys, values)], bias.to(dtype)

        def alone(query=query, few=few) -> Tensor:
            return scaled_dot_product_attention(query, few[0], few[1], scale=scale)

        def masked(query=query, keys=keys, values=values, mask=mask) -> Tensor:
            return scaled_dot_product_attention(query, keys, values, mask, scale=scale)

        def in_parts(query=query, keys=keys, values=values, bias=bias) -> Tensor:
            return attend_in_parts(query, keys, values, bias, scale)

        ways = {way.__name__: way for way in (alone, masked, in_parts)}
        with kernels_of_any_shape():
            apart = float((alone() - in_parts()).abs().max())
            repeated = {name: _many(way) for name, way in ways.items()}
        times: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(-1, ROUNDS):
            for name, repeat in repeated.items():
                device.synchronize()
                began = time.perf_counter()
                repeat()
                device.synchronize()
                if number >= 0:
                    times[name].append(1e6 * (time.perf_counter() - began) / TIMES)
        found = {f"{name}_us": statistics.median(those) for name, those in times.items()}
        yield {"batch": batch, "context": context, "places": size[2], **found, "apart": apart}


def _many(function: Callable[[], Tensor]) -> Callable[[], None]:
    """``TIMES`` calls, on a GPU by a graph: so that none waits to be launched."""

    def repeat() -> None:
        for _ in range(TIMES):
            function()

    if not device.HAS_GPU:
        return repeat
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        repeat()
    return graph.replay
