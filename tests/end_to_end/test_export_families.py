"""Exports of the other dense families, sliding windows included, against the formula."""

from __future__ import annotations

import functools

import pytest
import torch

from megatron_mod.evaluation.known_prefix import KnownPrefix
from tests.helpers import formula
from tests.helpers.exported import Exports, pad, positions, relative

WINDOW, NEW = 4, 8  # shorter than most prompts: old keys are dropped, then and at decode steps
KINDS = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
SLIDING = {"use_sliding_window": True, "sliding_window": WINDOW, "layer_types": KINDS}
FAMILIES = {
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral_sliding": ("mistral", {"sliding_window": WINDOW}),
    "qwen2": ("qwen2", {}),
    "qwen2_sliding": ("qwen2", SLIDING),
    "qwen3": ("qwen3", {}),
    "qwen3_sliding": ("qwen3", SLIDING),
}


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    @functools.cache
    def make(family):
        kind, changes = FAMILIES[family]
        return Exports(tmp_path_factory.mktemp(family), kind, plain=False, **changes)

    return make


families = pytest.mark.parametrize("family", FAMILIES)
schemes = pytest.mark.parametrize("name", formula.SCHEMES)


@families
def test_the_formula_without_routers_is_the_dense_model(exports, family):
    case = exports(family)
    expected = WINDOW if family.endswith("sliding") else None
    assert case.dense.config.sliding_window == expected
    with torch.no_grad():
        for prompt in case.prompts:
            found, _, _ = formula.forward(case.dense, prompt, {}, granularity="attn_token")
            assert relative(found, case.dense(torch.tensor([prompt])).logits[0]) < 2e-5


@families
@torch.no_grad()
def test_what_no_threshold_changes_is_computed_once(exports, family):
    """Layers 2 and 3 decide otherwise each time; what enters layer 2 is run once."""
    model = exports(family).model("block_token_all")
    ids, mask = pad(exports(family).prompts, "right")
    known, runs = KnownPrefix(model, 2), []
    handle = model.model.layers[1].register_forward_hook(lambda *_: runs.append(1))
    for thresholds in ([0.5, 0.5, 0.5], [0.5, 1.0, 0.2], [0.5, 0.1, 1.0]):
        model.set_thresholds(thresholds)
        found = known(ids, attention_mask=mask, use_cache=False).logits
        wanted = model(ids, attention_mask=mask, use_cache=False).logits
        assert torch.equal(found, wanted)
    handle.remove()
    model.set_thresholds(0.5)
    assert len(runs) == 1 + 3  # the model by itself ran it each time


SOME = ("attn_sequence", "mlp_token", "attn_token_all", "block_token_selected")


@pytest.mark.parametrize(
    ("family", "name"),
    [(f, n) for f in FAMILIES for n in formula.SCHEMES if "sliding" in f or n in SOME],
)
def test_logits_equal_the_formula(exports, family, name):
    case = exports(family)
    ids, mask = pad(case.prompts, "left")
    with torch.no_grad():
        logits = case.model(name)(ids, attention_mask=mask, position_ids=positions(mask)).logits
    for row, prompt in enumerate(case.prompts):
        assert relative(logits[row][mask[row].bool()], case.formula(name, prompt)[0]) < 2e-5


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.endswith("sliding")])
@schemes
def test_greedy_generation_equals_the_formula_step_by_step(exports, family, name):
    case = exports(family)
    ids, mask = pad(case.prompts, "left")
    made = case.model(name).generate(
        ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, eos_token_id=None
    )
    for row, prompt in enumerate(case.prompts):
        assert made[row, -NEW:].tolist() == case.greedy(name, prompt, NEW)


@schemes
def test_nothing_older_than_the_window_is_stored(exports, name):
    case = exports("mistral_sliding")
    prompt = case.prompts[1]
    masks = case.formula(name, prompt)[1]
    with torch.no_grad():
        cache = case.model(name)(torch.tensor([prompt]), use_cache=True).past_key_values
    of_attention = {index: mask for (index, target), mask in masks.items() if target != "mlp"}
    for index, layer in enumerate(cache.layers):
        visible = WINDOW - 1
        if index in of_attention and name.endswith("selected"):
            visible = int(of_attention[index][-visible:].sum())
        elif index in of_attention and name.endswith("sequence"):
            visible *= int(of_attention[index][0])
        assert (0 if layer.keys is None else layer.keys.shape[2]) == visible
        assert layer.get_seq_length() == len(prompt)
