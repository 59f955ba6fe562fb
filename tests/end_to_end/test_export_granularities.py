"""Every granularity of the export: logits, generation, the cache and what is computed.

Routers have biases and what is skipped stand-ins, but where a test says ``plain``.
"""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from tests.helpers import formula
from tests.helpers.exported import (
    RANK,
    ROUTED,
    Exports,
    decode,
    load,
    pad,
    positions,
    prefill,
    relative,
)

NEW = 10


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return Exports(tmp_path_factory.mktemp("granularities"), plain=False)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return Exports(tmp_path_factory.mktemp("plain"), plain=True)


schemes = pytest.mark.parametrize("name", formula.SCHEMES)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("use_cache", [True, False])
@schemes
def test_logits_equal_the_formula(case, name, use_cache, side, attention):
    output, mask = prefill(case.model(name, attention), case.prompts, side, use_cache=use_cache)
    for row, prompt in enumerate(case.prompts):
        expected, _, _ = case.formula(name, prompt)
        assert relative(output.logits[row][mask[row].bool()], expected) < 2e-5


@schemes
def test_plain_logits_and_generation_equal_the_formula(plain, name):
    test_logits_equal_the_formula(plain, name, True, "left", "sdpa")
    test_greedy_generation_equals_the_formula_step_by_step(plain, name, "sdpa")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@schemes
def test_batch_of_one_without_a_mask(case, name, attention):
    model = case.model(name, attention)
    for prompt in case.prompts:
        with torch.no_grad():
            logits = model(torch.tensor([prompt])).logits[0]
        assert relative(logits, case.formula(name, prompt)[0]) < 2e-5


@pytest.mark.parametrize("border", [float("inf"), -float("inf")], ids=["all_skipped", "none"])
@schemes
def test_all_or_none_skipped(case, name, border):
    model = load(case.export(name))
    borders = dict.fromkeys(model.config.places, border)
    for layer, target in borders:
        model.model.layers[layer].logit_borders[target] = border
    output, mask = prefill(model, case.prompts)
    last = decode(model, output.past_key_values, mask)
    for row, prompt in enumerate(case.prompts):
        expected, _, _ = case.formula(name, [*prompt, 9], borders=borders)
        assert relative(output.logits[row][mask[row].bool()], expected[:-1]) < 2e-5
        assert relative(last[row], expected[-1]) < 2e-5


@schemes
def test_a_tie_is_kept(case, name):
    """Routers of zeros put every logit exactly on the border: the model is the dense one."""
    model = load(case.export(name))
    for layer in ROUTED:
        for parameter in model.model.layers[layer].router.parameters():
            parameter.data.zero_()
    with torch.no_grad():
        for prompt in case.prompts:
            ids = torch.tensor([prompt])
            assert relative(model(ids).logits, case.dense(ids).logits) < 2e-5


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@schemes
def test_greedy_generation_equals_the_formula_step_by_step(case, name, attention):
    ids, mask = pad(case.prompts, "left")
    made = case.model(name, attention).generate(
        ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, eos_token_id=None
    )
    texts = []
    for row, prompt in enumerate(case.prompts):
        expected = case.greedy(name, prompt, NEW)
        assert made[row, -NEW:].tolist() == expected
        texts.append(tuple(expected))
    assert len(set(texts)) > 1, "all alike would compare little"
    assert len({token for text in texts for token in text}) > 4


@schemes
def test_cache_follows_reordering_repetition_selection_and_cropping(case, name):
    model = case.model(name)
    order, twice = torch.tensor([3, 3, 0, 4, 1]), torch.arange(5).repeat_interleave(2)

    def cache():
        return prefill(model, case.prompts)[0].past_key_values

    _, mask = pad(case.prompts, "left")
    plain = decode(model, cache(), mask)

    def check(change, rows):
        changed = cache()
        change(changed)
        found = decode(model, changed, mask[rows])
        torch.testing.assert_close(found, plain[rows], rtol=1e-5, atol=1e-5)

    check(lambda c: c.reorder_cache(order), order)
    check(lambda c: c.batch_repeat_interleave(2), twice)
    check(lambda c: c.batch_select_indices(torch.tensor([4, 2])), torch.tensor([4, 2]))
    longer = cache()
    decode(model, longer, mask, token=77)
    longer.crop(-1)
    torch.testing.assert_close(decode(model, longer, mask), plain, rtol=1e-5, atol=1e-5)


def _stored_tokens(cache, layer):
    """``[rows, longest]`` of a layer's keys, (0, 0) when it has none."""
    keys = cache.layers[layer].keys
    return (keys.shape[0], keys.shape[2]) if keys is not None else (0, 0)


@schemes
def test_the_cache_holds_what_the_definition_says(case, name):
    output, mask = prefill(case.model(name), case.prompts)
    cache, masks, batch = output.past_key_values, case.masks(name), len(case.prompts)
    for layer in range(4):
        assert cache.get_seq_length(layer) == mask.shape[1]
        attention = layer, "block" if name.startswith("block") else "attn"
        kept = None
        if attention in masks[0]:
            kept = torch.tensor([float(m[attention].sum()) for m in masks])
        if kept is None or name.endswith("all"):
            expected = (batch, mask.shape[1])
        elif name.endswith("selected"):
            expected = (batch, int(kept.max()))
        else:
            expected = (int((kept > 0).sum()), mask.shape[1])
        assert _stored_tokens(cache, layer) == expected


@pytest.mark.parametrize("name", [n for n in formula.SCHEMES if n.endswith("selected")])
def test_at_batch_one_only_selected_tokens_are_stored_at_decode_steps_too(case, name):
    model = case.model(name)
    for prompt in case.prompts:
        text, cache = [*prompt, 9, 10, 11], None
        masks = case.formula(name, text)[1]
        stops = range(len(prompt), len(text) + 1)
        for start, stop in zip([0, *stops], stops, strict=False):
            with torch.no_grad():
                ids = torch.tensor([text[start:stop]])
                cache = model(ids, past_key_values=cache).past_key_values
            for (layer, target), mask in masks.items():
                if target != "mlp":
                    assert _stored_tokens(cache, layer) == (1, int(mask[:stop].sum()))


# Counted work. Two operations a product; fused attention counts nothing, so the math kernel runs.


def _work(model, ids, mask, cache=None):
    """Per layer the FLOPs of each module, and the cache."""
    counter = FlopCounterMode(display=False)
    math_kernel = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with torch.no_grad(), math_kernel, counter:
        output = model(
            ids, attention_mask=mask, position_ids=positions(mask)[:, -ids.shape[1] :],
            past_key_values=cache, use_cache=True,
        )  # fmt: skip
    counts, name = counter.get_flop_counts(), type(model).__name__

    def of(layer, module):
        path = f"{name}.model.layers.{layer}" + (f".{module}" if module != "layer" else "")
        parts = ["", ".attn", ".mlp"] if module in ("router", "stand_in") else [""]  # one or two
        return sum(sum(counts.get(path + part, {}).values()) for part in parts)

    projections = [f"self_attn.{p}_proj" for p in "qkvo"]
    modules = ["layer", "router", "stand_in", "self_attn", *projections, "mlp"]
    layers = range(model.config.num_hidden_layers)
    return [{m: of(i, m) for m in modules} for i in layers], output.past_key_values


@schemes
def test_plain_counted_work_is_the_kept_units_share(plain, name):
    test_counted_work_is_the_kept_units_share(plain, name)


@schemes
def test_counted_work_is_the_kept_units_share(case, name):
    dense = load(case.hf)
    ids, mask = pad(case.prompts, "left")
    longer = torch.cat([mask, torch.ones(len(mask), 1, dtype=mask.dtype)], 1)
    full, dense_cache = _work(dense, ids, mask)
    found, cache = _work(case.model(name), ids, mask)
    _check_dense_work(dense.config, full, batch=len(ids), tokens=ids.shape[1])
    texts = [[*prompt, 9] for prompt in case.prompts]
    _check_work(case, name, full, found, texts, slice(0, -1), tokens=ids.shape[1])
    ids = torch.full((len(ids), 1), 9)
    full, _ = _work(dense, ids, longer, dense_cache)
    found, _ = _work(case.model(name), ids, longer, cache)
    _check_work(case, name, full, found, texts, slice(-1, None), tokens=1)


def _check_dense_work(config, full, *, batch, tokens):
    hidden, size = config.hidden_size, config.head_dim
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    projections = 2 * batch * tokens * hidden * size * (2 * heads + 2 * groups)
    assert [sum(layer[f"self_attn.{p}_proj"] for p in "qkvo") for layer in full] == [
        projections
    ] * 4
    assert [layer["mlp"] for layer in full] == [
        2 * batch * tokens * hidden * 3 * config.intermediate_size
    ] * 4


def _check_work(case, name, full, found, texts, part, *, tokens):
    """The exact share where it is defined: projections and MLP on kept units only."""
    prompt_masks, masks = case.masks(name), [case.formula(name, text)[1] for text in texts]
    units = len(texts) * tokens
    for layer in range(4):
        kept = {}
        for _, target in (place for place in masks[0] if place[0] == layer):
            kept[target] = (
                sum(tokens for m in prompt_masks if m[layer, target][0])
                if "sequence" in name
                else int(sum(m[layer, target][part].sum() for m in masks))
            )
        attention, mlp = (kept.get(t, kept.get("block", units)) for t in ("attn", "mlp"))
        keys = units if name.endswith("all") else attention
        for module, share in (
            ("self_attn.q_proj", attention), ("self_attn.o_proj", attention),
            ("self_attn.k_proj", keys), ("self_attn.v_proj", keys), ("mlp", mlp),
        ):  # fmt: skip
            assert found[layer][module] * units == full[layer][module] * share, (layer, module)
        others = sum(units - n for n in kept.values())  # but padding's, of which it has none
        product = 2 * case.dense.config.hidden_size * RANK * (not case.plain)
        assert found[layer]["stand_in"] == 2 * product * others, layer
        if "sequence" in name:
            assert found[layer]["self_attn"] * units == full[layer]["self_attn"] * attention


@pytest.mark.parametrize("name", [n for n in formula.SCHEMES if "token_" in n])
def test_attention_scores_pad_to_the_longest_selection_only(case, name):
    ids, mask = pad(case.prompts, "left")
    batch, tokens = ids.shape
    full, _ = _work(load(case.hf), ids, mask)
    found, _ = _work(case.model(name), ids, mask)
    per_pair = 2 * 2 * case.dense.config.num_attention_heads * case.dense.config.head_dim

    def scores(layer):
        return layer["self_attn"] - sum(layer[f"self_attn.{p}_proj"] for p in "qkvo")

    for layer in ROUTED:
        attention = layer, "block" if name.startswith("block") else "attn"
        longest = max(int(masks[attention].sum()) for masks in case.masks(name))
        keys = longest if name.endswith("selected") else tokens
        assert scores(full[layer]) == per_pair * batch * tokens * tokens
        # Routed attention does not pass through self_attn's own forward: count it in the layer.
        beside = ("router", "stand_in", "mlp")
        attention = found[layer]["layer"] - sum(found[layer][module] for module in beside)
        attention -= sum(found[layer][f"self_attn.{p}_proj"] for p in "qkvo")
        assert attention == per_pair * batch * longest * keys


class Waits(TorchDispatchMode):
    """Counts the operations that make the host wait for numbers from the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.split(".")[0]
        self.count += name in ("nonzero", "_local_scalar_dense", "is_nonzero", "masked_select")
        return function(*args, **(kwargs or {}))


@schemes
def test_the_host_waits_once_a_router(case, name):
    model = case.model(name)
    for prompt in case.prompts:
        with torch.no_grad(), Waits() as waits:
            model(torch.tensor([prompt]), use_cache=True)
        assert waits.count == len(model.config.places)
