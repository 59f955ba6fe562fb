"""Whose code a training runs: what is said at its start, and by the doctor."""

from __future__ import annotations

from megatron.core import optimizer
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_mod.model.specs import routed_layer_spec
from megatron_mod.parallel import device
from megatron_mod.routing.config import RoutingConfig

PACKAGES = {"transformer_engine": "Transformer Engine", "apex": "apex"}


def kernels(implementation: str) -> dict[str, str]:
    """What computes attention, norms and the optimizer's step of a training on layers of an
    implementation, and what carries its collectives: a class, and whose kernels it runs.

    It is read off the specs that a model is built from, and off Megatron, which takes its Adam from
    Transformer Engine, apex or torch as it is imported.
    """
    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)
    routing = RoutingConfig("attn_token", (0,), (0.5,))
    layer = routed_layer_spec(config, routing, implementation).submodules
    return {
        "attention": _whose(layer.self_attention.submodules.core_attention),
        "norms": _whose(layer.input_layernorm),
        "optimizer": _whose(optimizer.Adam),
        "communication": device.collective_backend(),
    }


def _whose(kind: type) -> str:
    modules = {part for base in kind.__mro__ for part in base.__module__.split(".")}
    packages = [name for package, name in PACKAGES.items() if package in modules]
    return f"{kind.__name__} ({packages[0] if packages else 'torch'})"
