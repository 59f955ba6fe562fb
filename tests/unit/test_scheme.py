"""A granularity's name, parsed once."""

from __future__ import annotations

import pytest

from megatron_mod.routing.config import RoutingConfig
from megatron_mod.routing.scheme import GRANULARITIES, Scheme


@pytest.mark.parametrize("name", GRANULARITIES)
def test_a_name_is_its_target_and_unit(name):
    scheme = Scheme.parse(name)
    assert str(scheme) == name
    assert scheme.per_sequence == (scheme.unit == "sequence")
    assert (scheme.attention_target, scheme.mlp_target) == {
        ("attn",): ("attn", None), ("mlp",): (None, "mlp"), ("block",): ("block", "block"),
        ("attn", "mlp"): ("attn", "mlp"), ("expert",): (None, None),
    }[scheme.targets]  # fmt: skip
    assert scheme.per_expert == (name == "expert_token")
    assert scheme.chooses_keys == (name in ("attn_token", "block_token", "attn_token+mlp_token"))


def test_places_go_by_layer_and_attention_is_decided_on_first():
    routing = RoutingConfig("attn_sequence+mlp_sequence", (3, 12), (0.5,) * 4)
    assert routing.places == ((3, "attn"), (3, "mlp"), (12, "attn"), (12, "mlp"))
    assert routing.labels == ["3.attn", "3.mlp", "12.attn", "12.mlp"]
    assert RoutingConfig("block_token", (3, 12), (0.5,) * 2).labels == ["3", "12"]


@pytest.mark.parametrize("name", ["token", "attn-token", "attn_tokens", "block", ""])
def test_another_name_is_refused_with_those_there_are(name):
    with pytest.raises(ValueError, match="must be one of attn_sequence, attn_token"):
        RoutingConfig(name, (1,), (0.5,))
