"""A granularity's name, parsed once."""

from __future__ import annotations

import pytest

from megatron_mod.routing.config import RoutingConfig
from megatron_mod.routing.scheme import GRANULARITIES, Scheme


@pytest.mark.parametrize("name", GRANULARITIES)
def test_a_name_is_its_target_and_unit(name):
    scheme = Scheme.parse(name)
    assert str(scheme) == f"{scheme.target}_{scheme.unit}" == name
    assert scheme.per_sequence == (scheme.unit == "sequence")
    assert (scheme.covers_attention, scheme.covers_mlp) == {
        "attn": (True, False), "mlp": (False, True), "block": (True, True),
    }[scheme.target]  # fmt: skip
    assert scheme.chooses_keys == (name in ("attn_token", "block_token"))


@pytest.mark.parametrize("name", ["token", "attn-token", "attn_tokens", "block", ""])
def test_another_name_is_refused_with_those_there_are(name):
    with pytest.raises(ValueError, match="must be one of attn_sequence, attn_token"):
        RoutingConfig(name, (1,), (0.5,))
