"""Chosen queries at their places among all keys attend as they do with a mask."""

from __future__ import annotations

import pytest
import torch

from megatron_mod.benchmark.routing import SIZES, Setting, layer_of
from megatron_mod.model.attention import TorchCoreAttention
from megatron_mod.model.layout import AttentionPlan, TokenLayout
from megatron_mod.routing.masks import TokenRole
from tests.helpers.exported import Exports

LENGTH = 7
ROWS = {"rows": ((7,), (5,), (7,)), "packed": ((3, 4), (2, 3))}


def core_attention() -> TorchCoreAttention:
    setting = Setting(1, LENGTH, 1, training=False, implementation="local", dtype=torch.float32)
    return layer_of("tiny", None, setting)[0].self_attention.core_attention


def layout_of(documents: tuple) -> TokenLayout:
    roles = torch.zeros(len(documents), LENGTH, dtype=torch.uint8)
    positions = torch.zeros(len(documents), LENGTH, dtype=torch.int64)
    for row, lengths in enumerate(documents):
        used = sum(lengths)
        roles[row, :used] = int(TokenRole.PROMPT)
        positions[row, :used] = torch.cat([torch.arange(n) for n in lengths])
        if len(lengths) == 1:
            positions[row] = torch.arange(LENGTH)
    return TokenLayout(roles=roles, position_ids=positions, documents=documents)


@pytest.mark.parametrize("skipped", [None, 1], ids=["all", "a document has none"])
@pytest.mark.parametrize("documents", ROWS.values(), ids=ROWS)
def test_core_attention(single_process, monkeypatch, documents, skipped):
    layout, core = layout_of(documents), core_attention()
    generator = torch.Generator().manual_seed(3)
    chosen = (torch.rand(LENGTH, len(documents), generator=generator) < 0.6) & layout.valid
    if skipped is not None:
        chosen &= layout.document != skipped
    choice = layout.grid.choose(chosen)
    selection = choice.selection([choice.counts.tolist()])
    for part, which in ((selection.index, chosen), (selection.rest().index, ~chosen)):
        assert part.sort().values.tolist() == which.flatten().nonzero()[:, 0].tolist()
    plan = AttentionPlan(
        queries=selection.segments, keys=layout.tokens, documents=selection.documents
    )
    found = []
    for among in (False, True):
        generator.manual_seed(4)
        *_, heads, groups, channels = SIZES["tiny"]
        keys = LENGTH, len(documents), groups, channels
        shapes = (len(selection.index), 1, heads, channels), keys, keys
        inputs = [torch.randn(s, generator=generator).requires_grad_() for s in shapes]
        monkeypatch.setattr(core, "_is_quick_among_keys", lambda *_, among=among: among)
        output = core(*inputs, packed_seq_params=plan)
        (output * torch.randn(output.shape, generator=generator)).sum().backward()
        found.append((output, *(t.grad for t in inputs)))
    assert 0 < len(selection.index) < LENGTH * len(documents)
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", ["attn_token_all", "block_token_all"])
def test_export(tmp_path, monkeypatch, name):
    exports = Exports(tmp_path, plain=True, num_key_value_heads=2)
    model, prompts = exports.model(name), torch.tensor([p[:3] for p in exports.prompts])
    asked = []
    ones = torch.ones_like(prompts)  # as generate passes it: nothing is padding
    found = []
    for among in (False, True):
        layer = type(model.model.layers[0])
        monkeypatch.setattr(
            layer, "_is_quick_among_keys", lambda *_, among=among: asked.append(among) or among
        )
        with torch.no_grad():
            found.append(model(prompts).logits)
            torch.testing.assert_close(model(prompts, attention_mask=ones).logits, found[-1])
    assert set(asked) == {False, True}
    before = len(asked)
    ones[0, 0] = 0
    with torch.no_grad():
        model(prompts, attention_mask=ones)
    assert len(asked) == before, "padding needs a mask"
    assert sum(each["kept"] for each in model.routing_report()["layers"].values()) > 0
    torch.testing.assert_close(*found)
