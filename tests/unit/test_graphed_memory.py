"""The memory of decode steps by graphs: of one cache after another, of any length."""

from __future__ import annotations

import copy

import pytest
import torch

from megatron_mod.evaluation.huggingface import load_model
from megatron_mod.hf import attention_mod, buffers_mod
from tests.helpers.exported import Exports, pad
from tests.helpers.graphed import assert_same, generated


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    return Exports(tmp_path_factory.mktemp("exports"), plain=True)


@pytest.fixture
def small_parts(monkeypatch):
    """So that a few tokens need more room, which holds anything at first."""
    for module in (attention_mod, buffers_mod):
        monkeypatch.setattr(module, "PART", 4)
    make = buffers_mod.StaticMemory.__init__

    def filled(self, *args) -> None:
        make(self, *args)
        self.whole.fill_(torch.nan)

    monkeypatch.setattr(buffers_mod.StaticMemory, "__init__", filled)


@pytest.mark.parametrize("name", ["attn_sequence", "attn_token_all", "block_token_selected"])
def test_texts_that_outgrow_their_room(exports, graphs, small_parts, name):
    model = load_model(exports.export(name), dtype=torch.float32).eval()
    batches = pad(exports.prompts[:3], "left"), (torch.tensor([exports.prompts[1]]), None)
    settings = {"max_new_tokens": 20}
    wanted = [generated(model, *batch, **settings) for batch in batches]
    with model.graphed_decoding():
        assert_same([generated(model, *batch, **settings) for batch in batches], wanted)
        recorded = len(graphs)
        assert_same([generated(model, *batch, **settings) for batch in batches], wanted)
        places = [held.places for held in model.model.graphs.buffers.values()]
    assert min(places) > 16
    # Once there is room, the second time, what fewer tokens need is recorded for good.
    with model.graphed_decoding():
        generated(model, batches[0][0][:, -2:], **{**settings, "max_new_tokens": 4})
        model.model.graphs.pool = "of the graphs that go"
        generated(model, *batches[0], **settings)
        assert model.model.graphs.pool is None
        graphs.clear()
        generated(model, *batches[0], **settings)
        generated(model, *batches[0], **settings)
        again = len(graphs)
        generated(model, *batches[0], **settings)
        assert len(graphs) == again < recorded


def steps(model, cache, tokens, mask=None) -> torch.Tensor:
    """Logits of tokens ``[B, N]``, one after the other, behind what is in a cache."""
    found = []
    for number in range(tokens.shape[1]):
        if mask is not None:
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        token = tokens[:, number : number + 1]
        found.append(model(token, attention_mask=mask, past_key_values=cache).logits)
    return torch.cat(found, 1)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", ["attn_token_all", "block_sequence", "mlp_sequence"])
def test_caches_take_turns(exports, graphs, name, batch):
    """In the memory of the same graphs: several, copies, cropped ones, and without graphs."""
    model = load_model(exports.export(name), dtype=torch.float32).eval()
    texts = [pad(exports.prompts[first : first + batch], "left") for first in (0, 1)]
    tokens = torch.tensor([[7, 8, 9]]).expand(batch, -1)

    def story() -> list[torch.Tensor]:
        found = []
        caches = [model(i, attention_mask=m, use_cache=True).past_key_values for i, m in texts]
        masks = [mask for _, mask in texts]

        def step(which: int) -> None:
            found.append(steps(model, caches[which], tokens, masks[which]))
            more = torch.ones(batch, 3, dtype=masks[which].dtype)
            masks[which] = torch.cat([masks[which], more], 1)

        for which in (0, 1, 0):
            step(which)
        caches.append(copy.deepcopy(caches[0]))
        masks.append(masks[0])
        for which in (0, 2, 0, 2):
            step(which)
        for cache, which in ((caches[0], 0), (caches[1], 1)):
            for layer in cache.layers:
                layer.crop(-2 if hasattr(layer, "is_croppable") else layer.get_seq_length() - 2)
            masks[which] = masks[which][:, :-2]
        for which in (1, 0):
            step(which)
        before, model.model.graphs = model.model.graphs, None
        for which in (0, 1):
            step(which)
        model.model.graphs = before
        for which in (1, 0, 2):
            step(which)
        return found + [cache.layers[1].keys for cache in caches]

    with torch.no_grad():
        wanted = story()
        with model.graphed_decoding():
            found = story()
    assert graphs
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 3])
def test_attention_in_parts(batch, dtype):
    part = attention_mod.PART
    query, keys, values = (
        torch.randn(batch, 2, tokens, 16, dtype=dtype) for tokens in (4, 3 * part, 3 * part)
    )
    seen = torch.rand(batch, 1, 1, 3 * part) < 0.5
    bias = torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)
    found = attention_mod.attend_in_parts(query, keys, values, bias, 0.3)
    wanted = torch.nn.functional.scaled_dot_product_attention(
        *(t.double() for t in (query, keys, values)), seen, scale=0.3
    )
    near = 1e-5 if dtype is torch.float32 else 1e-2
    torch.testing.assert_close(found.double(), wanted, rtol=near, atol=near)


def test_a_layer_whose_cache_alone_was_cropped(exports, graphs):
    model = load_model(exports.export("mlp_token"), dtype=torch.float32).eval()
    ids, tokens = torch.tensor([exports.prompts[1]]), torch.tensor([[7, 8]])

    def cropped() -> torch.Tensor:
        cache = model(ids, use_cache=True).past_key_values
        first = steps(model, cache, tokens)
        layer = cache.layers[1]
        layer.keys, layer.values = (held[:, :, :-3] for held in (layer.keys, layer.values))
        return torch.cat([first, steps(model, cache, tokens)])

    with torch.no_grad():
        wanted = cropped()
        with model.graphed_decoding():
            torch.testing.assert_close(cropped(), wanted, rtol=1e-4, atol=1e-5)


def test_a_model_that_uses_fewer_of_its_layers(exports, graphs):
    model = load_model(exports.export("attn_token_all"), dtype=torch.float32).eval()
    model.config.num_hidden_layers = 3
    ids = torch.tensor([exports.prompts[1]])
    model.set_thresholds(0.0)

    def logits() -> torch.Tensor:
        cache = model(ids, use_cache=True).past_key_values
        return steps(model, cache, torch.tensor([[7, 8]]))

    with torch.no_grad():
        wanted = logits()
        with model.graphed_decoding():
            torch.testing.assert_close(logits(), wanted, rtol=1e-4, atol=1e-5)
