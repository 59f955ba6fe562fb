"""Exports of the other dense families, sliding windows included, against the formula."""

from __future__ import annotations

import functools

import pytest
import torch

from megatron_mod.evaluation import known_prefix
from megatron_mod.evaluation.known_prefix import KnownPrefix, WatchedBorders
from megatron_mod.routing.scheme import Place
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
@pytest.mark.parametrize("name", ["attn_sequence", "block_token_all"])
@torch.no_grad()
def test_what_no_border_changes_is_computed_once(exports, family, name):
    """A call begins at the layer of the first border that another call before it had not."""
    model = exports(family).model(name)
    ids, mask = pad(exports(family).prompts, "right")
    places = [Place(*place) for place in model.config.places]
    layers = [place.layer for place in places]
    assert layers == [0, 2, 3]
    known, runs = KnownPrefix(model, layers), []
    hooks = [
        layer.register_forward_hook(lambda *_, index=index: runs.append(index))
        for index, layer in enumerate(model.model.layers)
    ]
    for thresholds, begins in (
        ([0.5, 0.5, 0.5], 0),
        ([0.5, 1.0, 0.2], 2),
        ([0.5, 1.0, 1.0], 3),
        ([0.5, 0.1, 1.0], 2),  # what entered layer 3 was of 1.0
        ([0.5, 0.1, 0.3], 3),
        ([0.2, 0.1, 0.3], 0),
        ([0.2, 0.1, 0.3], 3),  # all that is kept is of the last call
    ):
        calls = {"attention_mask": mask, "use_cache": False}
        borders, alone = (WatchedBorders(places, thresholds) for _ in range(2))
        wanted = model(ids, borders=alone, **calls).logits
        runs.clear()
        assert torch.equal(known(ids, borders=borders, **calls).logits, wanted)
        assert runs == list(range(begins, 4)), thresholds
        for place in places:
            (seen,), (said,) = borders.watched[place], alone.watched[place]
            assert torch.equal(seen, said)
    for hook in hooks:
        hook.remove()


@torch.no_grad()
def test_other_masks_are_other_texts(exports):
    """What a sequence's decision may see is a part of what enters later layers."""
    model = exports("qwen3").model("attn_sequence")
    ids, mask = pad(exports("qwen3").prompts, "right")
    places = [Place(*place) for place in model.config.places]
    known = KnownPrefix(model, [place.layer for place in places])
    seen = mask.bool() & (torch.arange(mask.shape[1]) < 2)
    for routing_mask in (mask.bool(), seen):
        calls = {"attention_mask": mask, "use_cache": False, "routing_mask": routing_mask}
        for _ in range(2):
            wanted = model(ids, borders=WatchedBorders(places, [0.5] * 3), **calls).logits
            found = known(ids, borders=WatchedBorders(places, [0.5] * 3), **calls).logits
            assert torch.equal(found, wanted)
    assert len(known.known) == 2


@torch.no_grad()
def test_where_there_is_no_room_nothing_is_kept(exports, monkeypatch):
    model = exports("qwen3").model("block_token_all")
    ids, mask = pad(exports("qwen3").prompts, "right")
    places = [Place(*place) for place in model.config.places]
    size = ids.numel() * model.config.hidden_size * 4
    for room, kept in ((size, {0, 2}), (2 * size, {0, 2, 3}), (size - 1, set())):
        monkeypatch.setattr(known_prefix, "MOST_BYTES", room)
        known = KnownPrefix(model, [place.layer for place in places])
        for _ in range(2):
            borders = WatchedBorders(places, [0.5] * 3)
            known(ids, attention_mask=mask, borders=borders, use_cache=False)
        (layers,) = known.known.values()
        assert layers.keys() == kept


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
