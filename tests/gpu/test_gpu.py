"""The same equalities on CUDA: run where there is a GPU, skipped with a reason elsewhere."""

from __future__ import annotations

import warnings

import pytest
import torch

from megatron_mod.conversion.convert import hf_to_megatron
from megatron_mod.routing.config import RoutingConfig
from megatron_mod.routing.scheme import GRANULARITIES
from tests.distributed import cases
from tests.helpers import tiny
from tests.helpers.ranks import run_ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory, single_process):
    folder = tmp_path_factory.mktemp("gpu")
    hf = tiny.save_llama(folder / "hf", num_key_value_heads=2)
    hf_to_megatron(hf, folder / "megatron")
    return hf, folder / "megatron"


def test_logits_equal_hugging_face(model, tmp_path):
    routing = cases.routing_config()
    (found,) = run_ranks(
        cases.logit_differences, [model], [{}], 128, routing, world=1, folder=tmp_path
    )
    assert max(found.values()) <= 2e-5


SCHEMES = [(name, None) for name in GRANULARITIES]
SCHEMES += [("attn_token", "selected"), ("block_token", "selected")]


def layer_of(routing: RoutingConfig, implementation: str, dtype: torch.dtype):
    """The only layer of a model with weights from a seed, and its rotary table."""
    from megatron_mod.model.architecture import Architecture
    from megatron_mod.model.builder import build_model, transformer_config

    arch = Architecture(
        num_layers=1, hidden_size=256, ffn_hidden_size=512, num_attention_heads=4,
        num_query_groups=2, kv_channels=64, vocab_size=64, max_sequence_length=128,
        layernorm_epsilon=1e-5, rotary_base=10000.0, tied_embeddings=True,
    )  # fmt: skip
    config = transformer_config(arch, dtype=dtype)
    model = build_model(arch, config, routing, implementation=implementation)[0]
    generator = torch.Generator().manual_seed(4)
    for name, parameter in sorted(model.named_parameters()):
        scale = 0.3 if "router" in name else 0.05
        values = torch.randn(parameter.shape, generator=generator) * scale
        parameter.data.copy_(1 + values if "norm" in name else values)
    return model.decoder.layers[0], model.rotary_pos_emb(96)


def grid(dtype: torch.dtype) -> torch.Tensor:
    values = torch.randn(96, 3, 256, generator=torch.Generator().manual_seed(8))
    return values.to("cuda", dtype)


@pytest.mark.parametrize(("granularity", "keys_values"), SCHEMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_transformer_engine_equals_torch(single_process, granularity, keys_values, dtype):
    pytest.importorskip("transformer_engine.pytorch")
    outputs = {}
    for implementation in ("local", "transformer_engine"):
        for compute in ("dense", "sparse"):
            routing = RoutingConfig(
                granularity, (0,), (0.5,), keys_values=keys_values, training_compute=compute
            )
            layer, rotary = layer_of(routing, implementation, dtype)
            x = grid(dtype)
            for training in (True, False):
                layer.train(training)
                layer.router.weight.grad = None
                y, _ = layer(x, rotary_pos_emb=rotary)
                kept = layer.router.kept.item() / layer.router.valid.item()
                assert 0 < kept < 1, "the case skips nothing or everything"
                y.float().square().mean().backward()
                gradient = layer.router.weight.grad if training else None
                outputs[implementation, compute, training] = y.detach().float(), gradient
    tolerance = 0.03 if dtype == torch.bfloat16 else 1e-4
    for (implementation, compute, training), (y, gradient) in outputs.items():
        wanted, slope = outputs["local", compute if training else "dense", training]
        assert (y - wanted).abs().max() <= tolerance * wanted.abs().max(), (implementation, compute)
        if training:
            assert (gradient - slope).abs().max() <= tolerance * slope.abs().max()


@pytest.mark.parametrize(("granularity", "keys_values"), SCHEMES)
def test_the_host_waits_only_for_the_number_of_chosen_tokens(
    single_process, granularity, keys_values
):
    routing = RoutingConfig(granularity, (0,), (0.5,), keys_values=keys_values)
    layer, rotary = layer_of(routing, "local", torch.bfloat16)
    x = grid(torch.bfloat16).requires_grad_()
    layer(x, rotary_pos_emb=rotary)[0].sum().backward()  # what is made once is made
    try:
        torch.cuda.set_sync_debug_mode("error")
        layer(x, rotary_pos_emb=rotary)[0].sum().backward()
        torch.cuda.set_sync_debug_mode("warn")
        layer.eval()
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            layer(x, rotary_pos_emb=rotary)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [w for w in seen if "synchronizing" in str(w.message)]
    assert len(waits) == 1  # the shapes of what is computed
