"""The Transformer Engine layers as far as they can be built without a GPU."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from megatron_mod.routing.config import RoutingConfig


@pytest.fixture
def engine():
    """Our Transformer Engine module, where Transformer Engine imports."""
    from megatron_mod import parallel  # noqa: F401

    try:
        import transformer_engine.pytorch
    except Exception as error:  # a build for another torch fails with more than ImportError
        pytest.skip(f"Transformer Engine does not import here: {error}")
    from megatron_mod.model import transformer_engine

    return transformer_engine


def test_routed_layers_have_norms_of_their_own(engine):
    from megatron_mod.model.specs import dense_layer_spec, routed_layer_spec

    routing = RoutingConfig("attn_token", (1,), (0.5,))
    config = SimpleNamespace(qk_layernorm=False, num_moe_experts=None)
    dense = dense_layer_spec(config, "transformer_engine").submodules.self_attention.submodules
    assert "LayerNorm" in dense.linear_qkv.__name__
    routed = routed_layer_spec(config, routing, "transformer_engine").submodules
    assert "LayerNorm" not in routed.self_attention.submodules.linear_qkv.__name__
    assert routed.input_layernorm is routed.pre_mlp_layernorm
    assert routed.self_attention.submodules.core_attention is engine.TECoreAttention


def test_checkpoint_keys_are_those_of_the_local_layers(engine, single_process, monkeypatch):
    from megatron_mod.model.architecture import Architecture
    from megatron_mod.model.builder import build_model, transformer_config

    # Its modules ask for CUDA when they are built and use it when they run.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    arch = Architecture(
        num_layers=2, hidden_size=32, ffn_hidden_size=64, num_attention_heads=4,
        num_query_groups=2, kv_channels=8, vocab_size=32, max_sequence_length=64,
        layernorm_epsilon=1e-5, rotary_base=10000.0, tied_embeddings=True,
    )  # fmt: skip
    keys = []
    for implementation in ("local", "transformer_engine"):
        config = transformer_config(arch, dtype=torch.float32)
        routing = RoutingConfig("attn_token", (1,), (0.5,))
        model = build_model(arch, config, routing, implementation=implementation)
        keys.append(
            {
                value.key
                for name, value in model.sharded_state_dict().items()
                if not name.endswith("_extra_state")
            }
        )
    assert keys[0] == keys[1]
    assert "decoder.layers.1.router.weight" in keys[0]


def test_float32_is_for_local_layers_unless_the_other_is_asked_for(monkeypatch):
    """Transformer Engine would multiply as TF32."""
    from megatron_mod.model import specs

    monkeypatch.setattr(specs.device, "HAS_GPU", True)
    monkeypatch.setitem(sys.modules, "megatron_mod.model.transformer_engine", SimpleNamespace())
    assert specs.choose_implementation() == "transformer_engine"
    assert specs.choose_implementation(dtype=torch.float32) == "local"
    asked = specs.choose_implementation("transformer_engine", dtype=torch.float32)
    assert asked == "transformer_engine"


def test_without_a_gpu_it_is_refused_by_name(monkeypatch):
    from megatron_mod.model import specs

    monkeypatch.setattr(specs.device, "HAS_GPU", False)
    assert specs.choose_implementation() == "local"
    with pytest.raises(ValueError, match=r"model.transformer_impl = 'transformer_engine'.*no GPU"):
        specs.choose_implementation("transformer_engine")
