"""Llama-3-8B's shape beside itself with routers, where there is a GPU with room for it."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_mod.benchmark.inference_speed import Pair

ROOM = 60e9  # bytes: the weights are made twice before they are shared

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("granularity", ["attn_sequence", "block_sequence", "attn_token"])
def test_llama3_8b(granularity):
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < ROOM:
        pytest.skip(f"needs {ROOM / 1e9:.0f} GB of free GPU memory")
    pair = Pair.of_shape("llama3-8b", granularity, dtype=torch.bfloat16)
    row = pair.measure(4, 512, repetitions=2, new_tokens=4, capacity=0.5)
    held = torch.cuda.memory_allocated()
    assert sum(p.numel() for p in pair.dense.parameters()) == 8_030_261_248
    assert held < 20e9, "the two models do not share their weights"
    assert row["capacity"] == pytest.approx(0.5, abs=0.01)
    for phase in ("prefill", "decode"):
        assert math.isfinite(row[phase]["share"])
        assert row[phase]["ideal"] > 1
