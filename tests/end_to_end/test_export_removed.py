"""Attention removed for good (a threshold of 1): no keys and values, and nothing else changes."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.helpers import formula
from tests.helpers.exported import LENGTHS, RANK, load, pad, positions, relative
from tests.helpers.routed import save_export

# The first layer, and the first that slides: a mask's size is read off the cache of each.
REMOVED = (0, 1)
NEW = 5
KINDS = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
SLIDING = {"use_sliding_window": True, "sliding_window": 4, "layer_types": KINDS}
MODELS = {
    "llama": ("llama", {}),
    "mistral": ("mistral", {"sliding_window": 4}),
    "qwen2": ("qwen2", SLIDING),
}
SCHEMES = [name for name in formula.SCHEMES if "token_" in name]
ALMOST = 1 - 1e-12  # no score reaches it, but one might: keys and values are stored


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    @functools.cache
    def make(name, scheme):
        """The dense model, its export's routers, and the export, all of whose units skip."""
        folder, (family, changes) = tmp_path_factory.mktemp("removed"), MODELS[name]
        hf = formula.save_model(folder / "hf", family, **changes)
        generator = torch.Generator().manual_seed(3)
        granularity = formula.SCHEMES[scheme]["granularity"]
        places = formula.places(REMOVED, granularity)
        routers = {place: torch.randn(1, 32, generator=generator) for place in places}
        sizes = 32, RANK, generator
        more = {layer: formula.bias_and_stand_in(*sizes, granularity) for layer in REMOVED}
        settings = {"bias": True, "stand_in_rank": RANK, "threshold": 1.0}
        settings |= formula.SCHEMES[scheme]
        export = save_export(folder / "export", hf, routers, more, **settings)
        return formula.load_dense(hf), routers, more, export

    return make


@pytest.fixture(scope="module")
def prompts():
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(3, 128, (n,), generator=generator).tolist() for n in LENGTHS]


models = pytest.mark.parametrize("name", MODELS)
schemes = pytest.mark.parametrize("scheme", SCHEMES)


@models
@schemes
def test_it_generates_what_the_formula_does(exports, prompts, name, scheme):
    dense, routers, more, export = exports(name, scheme)
    model, (ids, mask) = load(export), pad(prompts, "left")
    settings = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
    with torch.no_grad():
        logits = model(ids, attention_mask=mask, position_ids=positions(mask)).logits
    made = model.generate(ids, attention_mask=mask, **settings)
    given = {**formula.SCHEMES[scheme], "more": more, "borders": dict.fromkeys(routers, torch.inf)}
    for row, prompt in enumerate(prompts):
        expected, _, _ = formula.forward(dense, prompt, routers, **given)
        assert relative(logits[row][mask[row].bool()], expected) < 2e-5
        assert made[row, -NEW:].tolist() == formula.greedy(dense, prompt, routers, new=NEW, **given)


@models
@schemes
def test_it_does_what_one_does_that_stores_keys_nobody_reads(exports, prompts, name, scheme):
    export = exports(name, scheme)[-1]
    removed, stored = load(export), load(export)
    stored.set_thresholds(ALMOST)
    ids, mask = pad(prompts, "left")
    order = torch.tensor([3, 3, 0, 4, 1])
    found = []
    for model in (removed, stored):
        made = [model.generate(ids, attention_mask=mask, num_beams=3, max_new_tokens=NEW)]
        made.append(model.generate(ids[:1], prefill_chunk_size=3, max_new_tokens=NEW))
        with torch.no_grad():
            cache = model(ids, attention_mask=mask, use_cache=True).past_key_values
            if name == "llama":  # a window has dropped what would be needed
                model(ids[:, :2], past_key_values=cache)
                cache.crop(-2)
            cache.reorder_cache(order)
            cache.batch_repeat_interleave(2)
            twice = order.repeat_interleave(2)
            longer = torch.cat([mask[twice], torch.ones(10, 3, dtype=mask.dtype)], 1)
            more = ids[twice, -3:]
            made.append(model(more, attention_mask=longer, past_key_values=cache).logits)
        found.append(made)
        assert [layer.get_seq_length() for layer in cache.layers] == [ids.shape[1] + 3] * 4
        keys = [cache.layers[layer].keys for layer in REMOVED]
        if model is removed:
            assert keys == [None, None]
            report = model.routing_report()
            assert report["cache_bytes"] == 0 < report["cache_bytes_saved"]
        elif scheme.endswith("all"):
            assert all(k.shape[0] == 10 for k in keys)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-5)


@schemes
def test_nothing_but_the_stand_in_is_computed(exports, prompts, scheme):
    export = exports("llama", scheme)[-1]
    model, ids, cache = load(export), torch.tensor([prompts[1]]), None
    for part in (ids, ids[:, :1]):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            cache = model(part, past_key_values=cache, use_cache=True).past_key_values
        counts = counter.get_flop_counts()
        for layer in REMOVED:
            at, tokens = f"MoDLlamaForCausalLM.model.layers.{layer}", part.shape[1]
            parts = [""] if len(model.config.targets) == 1 else [".attn", ".mlp"]
            work = {
                name: sum(sum(counts.get(f"{at}.{name}{part}", {}).values()) for part in parts)
                for name in ("router", "stand_in")
            }
            routers = len(model.config.targets)
            expected = {"router": 2 * 32 * tokens, "stand_in": 4 * 32 * RANK * tokens}
            assert work == {name: routers * count for name, count in expected.items()}
            mlp = 6 * 32 * 64 * tokens * scheme.startswith("attn")
            assert sum(counts[at].values()) == sum(work.values()) + mlp


def test_a_used_cache_does_not_survive_a_removal(exports, prompts):
    model, ids = load(exports("llama", "attn_token_all")[-1]), torch.tensor([prompts[1]])
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        model.set_thresholds(0.5)
        with pytest.raises(ValueError, match="with these thresholds: pass an empty DynamicCache"):
            model(ids, past_key_values=cache)
        expected = model(ids).logits
        cache.reset()
        assert torch.equal(model(ids, past_key_values=cache).logits, expected)
