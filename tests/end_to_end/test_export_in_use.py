"""The export in real use: generation modes, turns, thresholds, its report, and what it refuses."""

from __future__ import annotations

import contextlib
import math
from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache, StaticCache

from tests.helpers import formula
from tests.helpers.exported import ROUTED, Exports, load, pad, positions, relative

NEW = 6


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return Exports(tmp_path_factory.mktemp("in_use"), plain=False)


schemes = pytest.mark.parametrize("name", formula.SCHEMES)
sequences = pytest.mark.parametrize("name", [n for n in formula.SCHEMES if "sequence" in n])
tokens = pytest.mark.parametrize("name", [n for n in formula.SCHEMES if "token" in n])


@contextlib.contextmanager
def fixed(case, name, masks):
    """The dense model whose routed layers choose update or stand-in by a sequence's mask."""
    hooks, dense = [], case.dense
    for (index, target), mask in masks.items():
        layer, m = dense.model.layers[index], mask[0]
        parted = {
            one: case.more(name)[index][formula.name_of(one, target, case.granularity(name))]
            for one in formula.STAND_IN
        }

        def choose(update, read, m=m, added=parted):
            return m * update + (1 - m) * formula.stand_in(added, read)

        if target == "block":
            hook = layer.register_forward_hook(
                lambda layer, inputs, output, choose=choose: (
                    inputs[0] + choose(output - inputs[0], layer.input_layernorm(inputs[0]))
                )
            )
        elif target == "mlp":
            hook = layer.mlp.register_forward_hook(
                lambda _, inputs, output, choose=choose: choose(output, inputs[0])
            )
        else:
            hook = layer.self_attn.register_forward_hook(
                lambda _, __, named, output, choose=choose: (
                    choose(output[0], named["hidden_states"]), *output[1:]
                ),
                with_kwargs=True,
            )  # fmt: skip
        hooks.append(hook)
    yield dense
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize(
    "mode",
    [
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 3},
        {"do_sample": True, "num_beams": 2, "use_cache": False},
    ],
    ids=["beams", "samples", "sampled_beams_without_cache"],
)
@sequences
def test_generation_equals_hugging_faces_with_the_masks_fixed(case, name, mode):
    settings = {"max_new_tokens": NEW, "eos_token_id": None, **mode}
    for prompt in case.prompts:
        masks = case.formula(name, prompt)[1]
        ids = torch.tensor([prompt])
        torch.manual_seed(1)
        with fixed(case, name, masks) as dense:
            expected = dense.generate(ids, **settings)
        torch.manual_seed(1)
        assert torch.equal(case.model(name).generate(ids, **settings), expected)


@schemes
def test_beams_of_a_padded_batch_equal_each_prompts_own(case, name):
    settings = {"max_new_tokens": NEW, "eos_token_id": None, "num_beams": 3}
    ids, mask = pad(case.prompts, "left")
    together = case.model(name).generate(ids, attention_mask=mask, **settings)
    for row, prompt in enumerate(case.prompts):
        alone = case.model(name).generate(torch.tensor([prompt]), **settings)
        assert together[row, -NEW:].tolist() == alone[0, -NEW:].tolist()


@pytest.mark.parametrize("padded", [True, False])
@schemes
def test_generation_without_a_cache_uses_the_prompts_decision(case, name, padded):
    ids, mask = pad(case.prompts, "left")
    batches = [(ids, mask)] if padded else [(torch.tensor([p]), None) for p in case.prompts]
    made = [
        row
        for ids, mask in batches
        for row in case.model(name).generate(
            ids, attention_mask=mask, max_new_tokens=NEW, use_cache=False, eos_token_id=None
        )
    ]
    for row, prompt in zip(made, case.prompts, strict=True):
        assert row[-NEW:].tolist() == case.greedy(name, prompt, NEW)


@schemes
def test_the_first_prefills_decision_holds_over_several_turns(case, name):
    settings = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
    for prompt in case.prompts[:3]:
        first = case.model(name).generate(
            torch.tensor([prompt]), return_dict_in_generate=True, **settings
        )
        text = [*first.sequences[0].tolist(), 33, 44, 55, 66]
        second = case.model(name).generate(
            torch.tensor([text]),
            attention_mask=torch.ones(1, len(text), dtype=torch.int64),
            past_key_values=first.past_key_values,
            **settings,
        )
        masks = None
        if "sequence" in name:
            made = case.formula(name, prompt)[1]
            masks = {layer: mask[:1].expand(len(text) + NEW) for layer, mask in made.items()}
        for _ in range(NEW):
            text.append(int(case.formula(name, text, masks=masks)[0][-1].argmax()))
        assert second[0].tolist() == text


@tokens
def test_chunked_prefill_and_assisted_decoding_are_right_for_tokens(case, name):
    model, prompt = case.model(name), case.prompts[1]
    settings = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": 0}
    expected = case.greedy(name, prompt, NEW)
    assert 0 not in expected, "an end of text would cut the comparison short"
    for extra in ({"prefill_chunk_size": 3}, {"prompt_lookup_num_tokens": 2}):
        made = model.generate(torch.tensor([prompt]), **settings, **extra)
        assert made[0, -NEW:].tolist() == expected


# Thresholds


def _places(case, name):
    return formula.places(ROUTED, case.granularity(name))


def _borders(case, name, thresholds):
    logits = [math.log(t / (1 - t)) for t in thresholds]
    return dict(zip(_places(case, name), logits, strict=True))


def _decided(case, name, thresholds):
    """Of each router the masks and logits of the prompts' units, by the formula."""
    borders = _borders(case, name, thresholds)
    made = [case.formula(name, p, borders=borders) for p in case.prompts]
    unit = slice(0, 1) if "sequence" in name else slice(None)
    return {
        place: tuple(torch.cat([m[which][place][unit] for m in made]) for which in (1, 2))
        for place in borders
    }


@schemes
def test_thresholds_per_layer_survive_saving(case, name, tmp_path):
    model, thresholds = load(case.export(name)), [0.3, 0.55, 0.7, 0.4, 0.5, 0.6]
    thresholds = thresholds[: len(model.config.places)]
    model.set_thresholds(thresholds)
    model.save_pretrained(tmp_path / "again")
    borders, (ids, mask) = _borders(case, name, thresholds), pad(case.prompts, "left")
    for routed in (model, load(tmp_path / "again")):
        with torch.no_grad():
            logits = routed(ids, attention_mask=mask, position_ids=positions(mask)).logits
        for row, prompt in enumerate(case.prompts):
            expected = case.formula(name, prompt, borders=borders)[0]
            assert relative(logits[row][mask[row].bool()], expected) < 2e-5
    assert not torch.equal(logits, case.model(name)(ids, attention_mask=mask).logits)


@pytest.mark.parametrize("capacity", [0.8, [0.4, 0.6, 0.2, 0.8, 0.4, 0.6]])
@schemes
def test_every_layer_reaches_its_capacity(case, name, capacity):
    model = load(case.export(name))
    ids, mask = pad(case.prompts, "right")
    routers = len(model.config.places)
    if isinstance(capacity, list):
        capacity = capacity[:routers]
    model.set_capacity(capacity, ids, mask, scope="layer")
    decided = _decided(case, name, model.config.routing["threshold"])
    targets = capacity if isinstance(capacity, list) else [capacity] * routers
    for (kept, logits), target in zip(decided.values(), targets, strict=True):
        wanted = math.floor(target * len(kept) + 0.5)
        last = logits.sort(descending=True).values[wanted - 1]
        ties = int((logits >= last - 1e-5).sum()) - wanted  # equal tokens, in the first layer
        assert int(kept.sum()) == wanted + ties


@pytest.mark.parametrize("name", ["attn_sequence", "mlp_token", "block_token_selected"])
def test_the_layers_mean_reaches_the_capacity(case, name, tmp_path):
    model = load(case.export(name))
    ids, mask = pad(case.prompts, "right")
    model.set_capacity(0.6, ids, mask, scope="model")
    model.save_pretrained(tmp_path)
    thresholds = load(tmp_path).config.routing["threshold"]
    kept = torch.cat([masks for masks, _ in _decided(case, name, thresholds).values()])
    # Moving the threshold can keep one unit of each layer more or fewer, hardly more at once.
    assert abs(kept.mean() - 0.6) <= 4 / len(kept)
    assert len(set(thresholds)) == 1


@pytest.mark.parametrize("scope", ["layer", "model"])
@tokens
def test_a_border_is_between_groups_of_equal_scores(case, name, scope):
    """In the first layer a token's score is its own, wherever it stands: no rounding may decide."""
    model = load(case.export(name))
    tokens = torch.tensor([11, 23, 42, 58, 77]).repeat(16)
    ids = tokens[torch.randperm(80, generator=torch.Generator().manual_seed(1))].view(4, 20)
    for capacity in (0.25, 0.33, 0.5, 0.66, 0.75):
        model.set_capacity(capacity, ids, scope=scope)
        places = model.config.places
        borders = {(i, target): model.model.layers[i].logit_borders[target] for i, target in places}
        with torch.no_grad():
            together = model(ids).logits
            decided = model.model.record.decisions[places[0]][0]
            for token in tokens[:5]:
                assert len(decided[ids == token].unique()) == 1
            for row, text in zip(together, ids, strict=True):
                assert relative(model(text[None]).logits[0], row) < 2e-5
                expected = case.formula(name, text.tolist(), borders=borders)[0]
                assert relative(row, expected) < 2e-5


def test_one_threshold_for_all_replaces_those_of_the_layers(case):
    model = load(case.export("block_token_all"))
    ids, mask = pad(case.prompts, "left")
    model.set_capacity(0.6, ids, mask, scope="model")
    wanted = model.config.routing["threshold"]
    assert len(set(wanted)) == 1
    model.set_thresholds([0.0, 0.3, 1.0])
    model.set_capacity(0.6, ids, mask, scope="model")
    assert model.config.routing["threshold"] == wanted


def test_capacity_one_is_the_dense_model(case):
    model = load(case.export("attn_token_selected"))
    ids, mask = pad(case.prompts, "left")
    for scope in ("layer", "model"):
        model.set_capacity(1.0, ids, mask, scope=scope)
        with torch.no_grad():
            for prompt in case.prompts:
                expected = case.dense(torch.tensor([prompt])).logits
                assert relative(model(torch.tensor([prompt])).logits, expected) < 2e-5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model, ids: model.set_thresholds([0.5]), "one per routed layer"),
        (lambda model, ids: model.set_thresholds(1.5), "from 0 to 1"),
        (lambda model, ids: model.set_capacity(1.5, ids), "from 0 to 1"),
        (lambda model, ids: model.set_capacity([0.5], ids), "one per routed layer"),
        (lambda model, ids: model.set_capacity([0.5] * 3, ids, scope="model"), "scope"),
    ],
)
def test_thresholds_and_capacities_that_mean_nothing_are_refused(case, call, message):
    model = load(case.export("attn_sequence"))
    with pytest.raises(ValueError, match=message):
        call(model, torch.tensor([case.prompts[0]]))
    assert model.config.routing["threshold"] == 0.5


# The report


@schemes
def test_the_report_counts_what_was_kept_and_what_the_cache_saved(case, name):
    model = load(case.export(name))
    with pytest.raises(ValueError, match="not been called"):
        model.routing_report()
    ids, mask = pad(case.prompts, "left")
    with torch.no_grad():
        dense = case.dense(ids, attention_mask=mask, use_cache=True).past_key_values
        cache = model(ids, attention_mask=mask, position_ids=positions(mask)).past_key_values
    report, masks = model.routing_report(), case.masks(name)
    assert report["granularity"] == formula.SCHEMES[name]["granularity"]
    unit = slice(0, 1) if "sequence" in name else slice(None)
    for layer in ROUTED:
        entry = report["layers"][layer]
        units = {}
        for _, target in (place for place in masks[0] if place[0] == layer):
            units[target] = torch.cat([m[layer, target][unit] for m in masks])
        if len(units) > 1:
            own = {target: (entry[target]["kept"], entry[target]["units"]) for target in units}
            assert own == {target: (int(n.sum()), len(n)) for target, n in units.items()}
        units = torch.cat(list(units.values()))
        assert (entry["kept"], entry["units"]) == (int(units.sum()), len(units))
        assert entry["capacity"] == entry["kept"] / entry["units"]
        assert entry["cache_bytes"] == _bytes(cache.layers[layer])
        saved = _bytes(dense.layers[layer]) - _bytes(cache.layers[layer])
        assert entry["cache_bytes_saved"] == saved
    assert report["kept"] == sum(entry["kept"] for entry in report["layers"].values())
    saves = name.endswith("selected") or name in (
        "attn_sequence", "block_sequence", "parts_sequence",
    )  # fmt: skip
    assert (report["cache_bytes_saved"] > 0) == saves


def test_the_report_of_a_generation_has_the_cache_at_its_end(case):
    model = load(case.export("block_token_selected"))
    prompt = torch.tensor([case.prompts[0]])
    made = model.generate(prompt, return_dict_in_generate=True, max_new_tokens=6, eos_token_id=None)
    entries = model.routing_report()["layers"]
    for layer in ROUTED:
        assert entries[layer]["cache_bytes"] == _bytes(made.past_key_values.layers[layer])
    assert sum(entry["cache_bytes_saved"] for entry in entries.values()) > 0


def _bytes(layer):
    return sum(t.numel() * t.element_size() for t in (layer.keys, layer.values))


@tokens
def test_the_report_of_a_generation_covers_all_its_steps(case, name):
    prompt, model = case.prompts[0], case.model(name)
    made = model.generate(
        torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False, eos_token_id=None
    )
    computed = made[0, :-1].tolist()  # the last token is made, not read
    masks, report = case.formula(name, computed)[1], model.routing_report()
    for (layer, target), mask in masks.items():
        entry = report["layers"][layer]
        own = entry.get(target, entry)
        assert (own["kept"], own["units"]) == (int(mask.sum()), len(computed))


# What is refused


def _compiled(model, ids):
    torch.compile(model, backend="eager")(ids)


REFUSED = {
    "static cache": lambda m, ids: m(ids, past_key_values=StaticCache(m.config, 64)),
    "torch.compile": _compiled,
    "output_attentions": lambda m, ids: m(ids, output_attentions=True),
    "4 dims": lambda m, ids: m(ids, attention_mask=torch.ones(1, 1, 8, 8)),
    "packed": lambda m, ids: m(
        ids, position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]]), use_cache=False
    ),
    "cu_seq_lens": lambda m, ids: m(ids, cu_seq_lens_q=torch.tensor([0, 4, 8])),
    "batch has 2": lambda m, ids: m(
        ids.repeat(2, 1), past_key_values=m(ids, use_cache=True).past_key_values
    ),
}
REFUSED_FOR_SEQUENCES = {
    "prefill_chunk_size": lambda m, ids: m.generate(ids, prefill_chunk_size=3),
    "assisted decoding": lambda m, ids: m.generate(ids, prompt_lookup_num_tokens=2),
}


@pytest.mark.parametrize("reason", REFUSED)
@pytest.mark.parametrize("name", ["attn_sequence", "mlp_sequence", "block_token_selected"])
def test_what_cannot_be_right_is_refused_with_the_reason(case, name, reason):
    pattern = "StaticCache" if reason == "static cache" else reason
    # torch.compile wraps what stops it in an error of its own
    error = RuntimeError if reason == "torch.compile" else ValueError
    ids = torch.arange(3, 11)[None]
    with torch.no_grad(), pytest.raises((error, ValueError), match=pattern):
        REFUSED[reason](case.model(name), ids)


@pytest.mark.parametrize("reason", REFUSED_FOR_SEQUENCES)
@sequences
def test_a_decision_that_would_not_be_the_prompts_is_refused(case, name, reason):
    with pytest.raises(ValueError, match=reason):
        REFUSED_FOR_SEQUENCES[reason](case.model(name), torch.arange(3, 11)[None])


def test_a_routing_mask_for_tokens_is_refused(case):
    ids = torch.arange(3, 11)[None]
    with pytest.raises(ValueError, match="routing_mask"):
        case.model("mlp_token")(ids, routing_mask=torch.ones_like(ids))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"granularity": "attention_sequence"}, "must be one of attn_sequence"),
        ({"layers": [0, 4]}, "must be from 0 to 3"),
        ({"threshold": [0.5]}, "one per routed layer"),
        ({"keys_values": "all"}, "keys_values"),
        ({"bias": 1}, "routing.bias = 1: must be true or false"),
        ({"bias": "no"}, "routing.bias = 'no': must be true or false"),
        ({"bias": None}, "routing.bias = None: must be true or false"),
        *(
            ({"stand_in_rank": rank}, rf"routing.stand_in_rank = {rank!r}: .* from 1 to 4096")
            for rank in ("x", 0, -1, 2.5, True, [32], 5000)
        ),
    ],
)
def test_a_routing_entry_this_file_cannot_run_is_refused(case, change, message):
    model = case.model("attn_sequence")
    routing = {**model.config.routing, **change}
    with pytest.raises(ValueError, match=message.replace("[32]", r"\[32\]")):
        type(model.config)(num_hidden_layers=4, routing=routing)


def test_an_empty_cache_of_any_making_is_taken(case):
    ids = torch.tensor([case.prompts[0]])
    model = case.model("attn_sequence")
    with torch.no_grad():
        expected = model(ids).logits
        for cache in (DynamicCache(), DynamicCache(config=case.dense.config)):
            assert torch.equal(model(ids, past_key_values=cache).logits, expected)


@pytest.mark.parametrize("name", ["attn_sequence", "block_token_selected"])
def test_perplexity_and_capacity_of_an_export_equal_the_formula(case, name):
    from megatron_mod.data.chat import Sample
    from megatron_mod.evaluation.huggingface_backend import HuggingFaceBackend
    from megatron_mod.evaluation.perplexity import perplexity
    from megatron_mod.evaluation.rows import Row

    samples = [
        Sample(ids=p, labelled=[i >= len(p) // 2 for i in range(len(p))], source=str(p))
        for p in case.prompts
    ]
    nll, count, decided = 0.0, 0, {place: [] for place in _places(case, name)}
    for sample in samples:
        start, made = len(sample.ids) // 2, None
        if "sequence" in name:  # pooling: prompt
            prompt_masks = case.formula(name, sample.ids[:start])[1]
            made = {i: m[:1].expand(len(sample.ids)) for i, m in prompt_masks.items()}
        logits, masks, _ = case.formula(name, sample.ids, masks=made)
        targets = torch.tensor(sample.ids[start:])
        nll += float(
            torch.nn.functional.cross_entropy(logits[start - 1 : -1], targets) * len(targets)
        )
        count += len(targets)
        for place, mask in masks.items():
            decided[place].append(mask[:1] if "sequence" in name else mask)
    tokenizer = SimpleNamespace(eos_token_id=2, name_or_path="")
    backend = HuggingFaceBackend(case.model(name), tokenizer)
    quality = perplexity(backend, [Row.labelled(sample) for sample in samples])
    assert quality.perplexity == pytest.approx(math.exp(nll / count), rel=1e-4)
    assert quality.tokens == count
    assert quality.capacity == pytest.approx([float(torch.cat(m).mean()) for m in decided.values()])
