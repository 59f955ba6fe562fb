"""Exports whose routers keep a number of tokens exactly: by the causal rule, and by the true
top-k."""

from __future__ import annotations

import functools
import json

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from megatron_mod.evaluation.work import Work
from megatron_mod.routing.scheme import Place
from tests.helpers import exact, experts, formula
from tests.helpers.counted import products
from tests.helpers.exported import load, pad, positions, relative

NEW = 6
# In texts of 3 to 11 tokens a number of none, one, half of them (odd numbers rounded up), and all.
CAPACITY = {0: 0.5, 1: 0.04, 2: 0.1, 3: 1.0}
LENGTHS = (5, 11, 8, 3, 9)
CASES = {
    "block_predictor": ("llama", {"tie_word_embeddings": True}, {"bias": True}),
    "block_auxiliary_loss": ("qwen3", {}, {"threshold": 0.6}),
    "block_predictor_sliding": ("mistral", {"sliding_window": 5}, {}),
    "block_predictor_experts": (*experts.FAMILIES["mixtral"], {}),
    "attn_predictor": ("qwen3", {"tie_word_embeddings": True}, {}),
    "attn_auxiliary_loss": ("llama", {}, {"bias": True}),
    "mlp_predictor": ("llama", {}, {}),
    "mlp_auxiliary_loss": ("qwen3", {}, {}),
}
cases = pytest.mark.parametrize("name", CASES)
STORING = [name for name in CASES if not name.startswith("mlp") and "sliding" not in name]


class Exports:
    """Of each case the dense model, its routers, the export and some prompts; each made once."""

    def __init__(self, folder) -> None:
        self.folder = folder
        generator = torch.Generator().manual_seed(5)
        self.prompts = [torch.randint(3, 128, (n,), generator=generator).tolist() for n in LENGTHS]

    @functools.cache  # noqa: B019 (lives as long as its module's tests)
    def get(self, name: str):
        family, changes, settings = CASES[name]
        hf = formula.save_model(self.folder / f"dense_{name}", family, **changes)
        plain = name.removesuffix("_sliding").removesuffix("_experts")
        target, causal = plain.split("_", 1)
        routers = exact.draw(target, causal, CAPACITY, **settings)
        return formula.load_dense(hf), routers, exact.save(self.folder / name, hf, routers)

    @functools.cache  # noqa: B019 (lives as long as its module's tests)
    def loaded(self, name: str, attention: str):
        return load(self.get(name)[2], attn_implementation=attention)

    def model(self, name: str, selection: str = "causal", *, attention: str = "sdpa"):
        """To call, and not to change but for its selection."""
        model = self.loaded(name, attention)
        model.set_selection(selection)
        return model

    def formula(self, name: str, ids, *, top_k: bool):
        dense, routers, _ = self.get(name)
        return exact.forward(dense, ids, routers, top_k=top_k)


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    return Exports(tmp_path_factory.mktemp("top_k"))


def call(model, prompts, side, **settings):
    ids, mask = pad(prompts, side)
    with torch.no_grad():
        return model(
            ids, attention_mask=mask, position_ids=positions(mask), **settings
        ), mask.bool()


@pytest.mark.parametrize("selection", ["causal", "top_k"])
@cases
def test_logits_equal_the_formula(exports, name, selection):
    top_k = selection == "top_k"
    expected = [exports.formula(name, prompt, top_k=top_k) for prompt in exports.prompts]
    for attention in ("sdpa", "eager"):
        model = exports.model(name, selection, attention=attention)
        for side in ("left", "right"):
            output, mask = call(model, exports.prompts, side, use_cache=None if top_k else True)
            assert (output.past_key_values is None) == top_k
            for row, (logits, _, _) in enumerate(expected):
                assert relative(output.logits[row][mask[row]], logits) < 2e-5, (attention, side)
        for prompt, (logits, _, _) in zip(exports.prompts, expected, strict=True):
            with torch.no_grad():
                found = model(torch.tensor([prompt]), use_cache=False).logits[0]
            assert relative(found, logits) < 2e-5
    kept = {layer: [int(made[layer].sum()) for _, made, _ in expected] for layer in CAPACITY}
    if top_k:
        assert kept == {0: [3, 6, 4, 2, 5], 1: [0] * 5, 2: [1, 1, 1, 0, 1], 3: list(LENGTHS)}
    else:
        assert any(0 < n < length for n, length in zip(kept[0], LENGTHS, strict=True))


@cases
def test_of_equal_logits_the_first_tokens_are_kept(exports, name):
    model = exports.model(name, "top_k")
    same, mixed = [7] * 7, [7, 9, 7, 7, 9, 7, 9, 7]
    for side in ("left", "right"):
        _, mask = call(model, [same, mixed], side)
        kept = model.model.record.decisions[0, name.split("_")[0]][0]
        assert kept[0][mask[0]].tolist() == [True] * 4 + [False] * 3
        _, made, _ = exports.formula(name, mixed, top_k=True)
        assert torch.equal(kept[1][mask[1]], made[0])
        assert not kept[~mask].any()


@cases
def test_decoding_equals_the_whole_text_by_the_causal_rule(exports, name):
    model, more = exports.model(name), [9, 77, 30]
    output, mask = call(model, exports.prompts, "left", use_cache=True)
    cache, mask, steps = output.past_key_values, mask.long(), []
    for token in more:
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        with torch.no_grad():
            steps.append(
                model(
                    torch.full((len(mask), 1), token),
                    attention_mask=mask,
                    position_ids=positions(mask)[:, -1:],
                    past_key_values=cache,
                ).logits[:, -1]
            )
    for row, prompt in enumerate(exports.prompts):
        logits, _, _ = exports.formula(name, [*prompt, *more], top_k=False)
        found = torch.stack([step[row] for step in steps])
        assert relative(found, logits[-len(more) :]) < 2e-5


@cases
def test_generation(exports, name):
    dense, routers, _ = exports.get(name)
    model = exports.model(name)
    ids, mask = pad(exports.prompts, "left")
    settings = {"attention_mask": mask, "max_new_tokens": NEW, "eos_token_id": None}
    made = model.generate(ids, do_sample=False, **settings)
    for row, prompt in enumerate(exports.prompts):
        assert made[row, -NEW:].tolist() == exact.greedy(dense, prompt, routers, new=NEW)
    report = model.routing_report()
    assert report["units"] == len(CAPACITY) * (sum(LENGTHS) + len(LENGTHS) * (NEW - 1))
    for mode in ({"num_beams": 3, "num_return_sequences": 2}, {"do_sample": True}):
        found = []
        for use_cache in (True, False):
            torch.manual_seed(1)
            found.append(model.generate(ids, use_cache=use_cache, **mode, **settings))
        assert torch.equal(*found), mode


def test_generation_without_a_cache_can_run_the_true_top_k(exports):
    name = "block_predictor"
    dense, routers, _ = exports.get(name)
    model, prompt = exports.model(name, "top_k"), exports.prompts[1]
    settings = {"max_new_tokens": NEW, "eos_token_id": None, "do_sample": False}
    made = model.generate(torch.tensor([prompt]), use_cache=False, **settings)
    assert made[0, -NEW:].tolist() == exact.greedy(dense, prompt, routers, new=NEW, top_k=True)
    with pytest.raises(ValueError, match=r"use_cache=False.*set_selection\('causal'\)"):
        model.generate(torch.tensor([prompt]), **settings)


def test_a_cache_and_the_true_top_k_are_refused_together(exports):
    model, ids = exports.model("mlp_predictor", "top_k"), torch.tensor([exports.prompts[0]])
    for settings in ({"use_cache": True}, {"past_key_values": DynamicCache()}):
        with pytest.raises(ValueError, match=r"use_cache=False.*set_selection\('causal'\)"):
            model(ids, **settings)
    assert model(ids).past_key_values is None
    model.set_selection("causal")
    assert model(ids).past_key_values is not None
    with pytest.raises(ValueError, match="set_selection.*'causal' or 'top_k'"):
        model.set_selection("threshold")


def test_threshold_routers_have_no_selection(exports, tmp_path):
    hf = formula.save_model(tmp_path / "dense")
    routers = {1: torch.ones(1, 32)}
    folder = formula_export(tmp_path / "export", hf, routers)
    with pytest.raises(ValueError, match=r"set_selection.*thresholds.*router\.selection"):
        load(folder).set_selection("top_k")


def formula_export(folder, hf, routers):
    from tests.helpers.routed import save_export

    return save_export(folder, hf, routers, granularity="block_token", keys_values="selected")


@pytest.mark.parametrize("name", STORING)
def test_skipped_tokens_store_nothing(exports, name):
    model, target = exports.model(name), name.split("_")[0]
    token = 2 * 2 * 8 * 4  # bytes: keys and values of two heads
    for prompt in exports.prompts:
        with torch.no_grad():
            cache = model(torch.tensor([prompt])).past_key_values
        report = model.routing_report()["layers"]
        text = [*prompt, 9]
        _, made, _ = exports.formula(name, text, top_k=False)
        for layer, own in report.items():
            assert own["kept"] == int(made[layer][:-1].sum())
            assert own["cache_bytes"] == token * own["kept"]
            assert own["cache_bytes_saved"] == token * (len(prompt) - own["kept"])
        with torch.no_grad():
            model(torch.tensor([[9]]), past_key_values=cache)
        for layer in CAPACITY:
            assert model.model.record.decisions[layer, target][0].item() == bool(made[layer][-1])
            keys = cache.layers[layer].keys
            assert (0 if keys is None else keys.shape[2]) == int(made[layer].sum())


def counted(model, *inputs, **settings) -> tuple[int, dict]:
    with (
        torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter
    ):  # fmt: skip
        output = model(*inputs, logits_to_keep=1, **settings)
    kept = {Place(*k): v[0].flatten() for k, v in model.model.record.decisions.items()}
    return products(counter), kept, output.past_key_values


@pytest.mark.parametrize("selection", ["causal", "top_k"])
@cases
def test_counted_work_is_what_torch_counts(exports, name, selection):
    work = Work.of(json.loads((exports.get(name)[2] / "config.json").read_text()))
    model, ids = exports.model(name, selection), torch.tensor([exports.prompts[1]])
    length = ids.shape[1]
    found, kept, cache = counted(model, ids)
    scheme, unseen = work.routing.scheme, 0  # of queries and keys they do not see, hidden in torch
    for layer in range(work.arch.num_layers):
        at = torch.arange(length)
        if scheme.covers_attention:
            at = at[kept[layer, scheme.attention_target]]
        distance = at[:, None] - at
        hidden = (distance < 0) | (distance >= (work.arch.window_size or length))
        unseen += 4 * work.arch.query_channels * int(hidden.sum())
    assert found == work.prefill(length, kept) + unseen
    router = 2 * 32 + (2 * exact.SIZE * 33 if "predictor" in name else 0)
    everybody = {place: torch.ones(length, dtype=torch.bool) for place in kept}
    dense = Work(work.arch).prefill(length, {})
    assert work.prefill(length, everybody) == dense + len(CAPACITY) * router * length
    if selection == "top_k":
        return
    for token in (9, 77, 30):
        stored = {
            layer: [0 if keys is None else keys.shape[2]]
            for layer, keys in enumerate(layer.keys for layer in cache.layers)
            if scheme.covers_attention
        }
        found, step, cache = counted(model, torch.tensor([[token]]), past_key_values=cache)
        assert found == work.decode([length], step, stored)
        length += 1


@cases
def test_it_says_in_how_much_both_rules_agree(exports, name):
    model, agreed = exports.model(name, "top_k"), dict.fromkeys(CAPACITY, 0)
    call(model, exports.prompts, "left")
    for prompt in exports.prompts:
        _, made, other = exports.formula(name, prompt, top_k=True)
        for layer in CAPACITY:
            agreed[layer] += int((made[layer] == other[layer]).sum())
    report = model.routing_report()
    assert {layer: own["agreed"] for layer, own in report["layers"].items()} == agreed
    assert report["agreed"] == sum(agreed.values())
    assert report["agreement"] == report["agreed"] / (4 * sum(LENGTHS))
    model.set_selection("causal")
    call(model, exports.prompts, "left")
    assert "agreement" not in model.routing_report()


def test_thresholds_and_capacities_are_those_of_the_causal_rule(exports, tmp_path):
    model, reference = load(exports.get("block_predictor")[2]), {}
    ids, mask = pad(exports.prompts, "right")
    for selection in ("causal", "top_k"):
        model.set_selection(selection)
        model.set_capacity(0.5, ids, mask)
        reference[selection] = model.config.routing["threshold"]
    assert reference["causal"] == reference["top_k"]
    assert len(set(reference["causal"])) == len(CAPACITY), "each is held to its own"
    by_top_k, _ = call(model, exports.prompts, "right")
    model.set_thresholds(1.0)
    assert torch.equal(call(model, exports.prompts, "right")[0].logits, by_top_k.logits)
    model.save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["routing"] == {**model.config.routing, "layers": [0, 1, 2, 3]}
    again = load(tmp_path / "saved")
    assert again.model.selection == "causal"
    output, _ = call(again, exports.prompts, "right", use_cache=True)
    assert again.routing_report()["kept"] == 0
    assert all(layer.keys is None for layer in output.past_key_values.layers)
    again.set_thresholds(reference["causal"])
    call(again, exports.prompts, "right")
    assert again.routing_report()["capacity"] == pytest.approx(0.5, abs=0.03)


def test_routers_and_predictors_stay_in_float32(exports):
    model = load(exports.get("block_predictor")[2], dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        kept = torch.float32 if ".router." in name or ".predictor." in name else torch.bfloat16
        assert parameter.dtype == kept, name
    for selection in ("causal", "top_k"):
        model.set_selection(selection)
        logits = call(model, exports.prompts, "left")[0].logits
        assert logits.dtype == torch.bfloat16
        assert logits.isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"selection": "random"}, "routing.selection = 'random'"),
        ({"selection": "threshold"}, "routing.causal = 'predictor': must be null"),
        ({"causal": None}, "routing.causal = None"),
        ({"predictor_size": None}, "routing.predictor_size = None"),
        ({"predictor_size": True}, "routing.predictor_size = True"),
        ({"causal": "auxiliary_loss"}, "routing.predictor_size = 6: must be null"),
        ({"granularity": "attn_token+mlp_token"}, "routing.granularity"),
        ({"keys_values": "all"}, "routing.keys_values = 'all'"),
        ({"stand_in_rank": 2}, "routing.stand_in_rank = 2"),
        ({"work": [0.5, 1.0], "budget": 0.5}, "routing.work"),
        ({"capacity": [0.5]}, "routing.capacity"),
        ({"capacity": 0.5}, "routing.capacity"),
    ],
)
def test_a_routing_entry_that_cannot_run_is_refused(exports, change, message):
    config = exports.model("block_predictor").config
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        type(config)(**{**config.to_dict(), "routing": {**config.routing, **change}})
