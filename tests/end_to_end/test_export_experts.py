"""Exports of mixtures of experts, and of routers on their experts, against the formula: logits,
generation, what is computed, thresholds, the report, and what gates say."""

from __future__ import annotations

import functools
import math
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.helpers import experts, formula
from tests.helpers.exported import (
    ROUTED,
    SCHEMES,
    Exports,
    decode,
    load,
    pad,
    positions,
    prefill,
    relative,
)

NEW = 6
FAMILIES = {
    **experts.FAMILIES,
    "mixtral_sliding": ("mixtral", {**experts.FAMILIES["mixtral"][1], "sliding_window": 4}),
    "olmoe_clipped": (
        "olmoe", {**experts.FAMILIES["olmoe"][1], "clip_qkv": 0.7, "num_key_value_heads": 2},
    ),
}  # fmt: skip
# What is told apart by how attention is computed, and what by the mixture.
SOME = ("attn_sequence", "attn_token_selected", "mlp_token", "block_token_all")
CASES = [(family, name) for family in experts.FAMILIES for name in (*SOME, "expert_token")]
CASES += [("mixtral_sliding", name) for name in ("attn_sequence", "block_token_selected")]
CASES += [("olmoe_clipped", "attn_token_all")]
CASES += [("qwen3_moe", name) for name in SCHEMES if ("qwen3_moe", name) not in CASES]
cases = pytest.mark.parametrize(("family", "name"), CASES)
families = pytest.mark.parametrize("family", experts.FAMILIES)
by_expert = pytest.mark.parametrize("name", formula.EXPERT_SCHEMES)


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    @functools.cache
    def make(family):
        kind, changes = FAMILIES[family]
        return Exports(tmp_path_factory.mktemp(family), kind, plain=False, **changes)

    return make


@pytest.mark.parametrize("family", FAMILIES)
def test_the_formula_without_routers_is_the_dense_model(exports, family):
    case = exports(family)
    with torch.no_grad():
        for prompt in case.prompts:
            found, _, _ = formula.forward(case.dense, prompt, {}, granularity="attn_token")
            assert relative(found, case.dense(torch.tensor([prompt])).logits[0]) < 2e-5


@cases
def test_logits_equal_the_formula(exports, family, name):
    case = exports(family)
    expected = [case.formula(name, prompt)[0] for prompt in case.prompts]
    further = [case.formula(name, [*prompt, 9])[0][-1] for prompt in case.prompts]
    for attention in ("sdpa", "eager"):
        model = case.model(name, attention)
        for side in ("left", "right"):
            output, mask = prefill(model, case.prompts, side, use_cache=side == "left")
            for row, logits in enumerate(expected):
                found = output.logits[row][mask[row].bool()]
                assert relative(found, logits) < 2e-5, (attention, side)
            if side == "left" and "sequence" not in name:
                last = decode(model, output.past_key_values, mask)
                for row, logits in enumerate(further):
                    assert relative(last[row], logits) < 2e-5, (attention, "decode")
        with torch.no_grad():
            for prompt, logits in zip(case.prompts, expected, strict=True):
                assert relative(model(torch.tensor([prompt])).logits[0], logits) < 2e-5


@cases
def test_greedy_generation_equals_the_formula_step_by_step(exports, family, name):
    case = exports(family)
    ids, mask = pad(case.prompts, "left")
    made = case.model(name).generate(
        ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, eos_token_id=None
    )
    for row, prompt in enumerate(case.prompts):
        assert made[row, -NEW:].tolist() == case.greedy(name, prompt, NEW)


@families
def test_a_sequences_decision_may_see_some_tokens_only(exports, family):
    """A mask names them, and without a cache a generation's steps see the prompt alone."""
    case, name = exports(family), "block_sequence"
    model = case.model(name)
    for prompt in case.prompts:
        ids, length = torch.tensor([prompt]), len(prompt)
        shown = (torch.arange(length) < length // 2)[None]
        masks = case.formula(name, prompt[: length // 2])[1]
        masks = {place: made[:1].expand(length) for place, made in masks.items()}
        with torch.no_grad():
            found = model(ids, routing_mask=shown).logits[0]
        assert relative(found, case.formula(name, prompt, masks=masks)[0]) < 2e-5
        made = model.generate(
            ids, max_new_tokens=NEW, do_sample=False, use_cache=False, eos_token_id=None
        )
        assert made[0, -NEW:].tolist() == case.greedy(name, prompt, NEW)


@families
@by_expert
def test_the_cache_may_be_reordered_repeated_and_cropped(exports, family, name):
    case = exports(family)
    model = case.model(name)
    _, mask = pad(case.prompts, "left")

    def cache():
        return prefill(model, case.prompts, use_cache=True)[0].past_key_values

    plain, order = decode(model, cache(), mask), torch.tensor([3, 3, 0, 4, 1])
    changed = cache()
    changed.reorder_cache(order)
    torch.testing.assert_close(decode(model, changed, mask[order]), plain[order])
    changed = cache()
    changed.batch_repeat_interleave(2)
    twice = torch.arange(5).repeat_interleave(2)
    torch.testing.assert_close(decode(model, changed, mask[twice]), plain[twice])
    changed = cache()
    decode(model, changed, mask, token=77)
    changed.crop(-1)
    torch.testing.assert_close(decode(model, changed, mask), plain)


# Counted work. Two operations a product.


def work(model, ids, mask, cache=None):
    """FLOPs of each layer's mixture: of its gate, its router and each of its experts."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        output = model(
            ids, attention_mask=mask, position_ids=positions(mask)[:, -ids.shape[1] :],
            past_key_values=cache, use_cache=True,
        )  # fmt: skip
    counts, found = counter.get_flop_counts(), []
    for index, layer in enumerate(model.model.layers):
        stem = f"{type(model).__name__}.model.layers.{index}"

        def of(name, stem=stem):
            return sum(counts.get(f"{stem}.{name}", {}).values())

        block = f"{layer.names.mixture}"
        numbers = range(len(layer.mixture.experts))
        own = [of(f"{block}.experts.{number}") for number in numbers]
        found.append({"gate": of(f"{block}.gate"), "router": of("router"), "experts": own})
    return found, output.past_key_values


def sent(case, name, texts, part):
    """Tokens that each layer's gate sees, and that each expert is sent and computes, by the
    formula: of each text's tokens in ``part``."""
    dense, layers = case.dense, range(case.dense.config.num_hidden_layers)
    inputs, hooks = {}, []
    count = experts.count(dense)
    seen, assigned = [0 for _ in layers], torch.zeros(len(layers), 2, count, dtype=torch.long)
    blocks = [experts.block_of(layer) for layer in dense.model.layers]
    for index, layer in enumerate(dense.model.layers):
        hooks.append(
            layer.post_attention_layernorm.register_forward_hook(
                lambda _, __, output, index=index: inputs.__setitem__(index, output)
            )
        )
    for text in texts:
        _, masks, _ = case.formula(name, text)
        for index in layers:
            read = inputs[index][0]
            own = experts.gate(blocks[index], read)[1]
            kept = own.clone()
            if (place := (index, "expert")) in masks:
                kept[own] = masks[place].bool()
            for target in ("mlp", "block"):
                if (place := (index, target)) in masks:
                    kept &= masks[place].bool()[:, None]
            seen[index] += int(kept.any(-1)[part].sum()) if "expert" not in name else len(own[part])
            assigned[index] += torch.stack([own[part].sum(0), kept[part].sum(0)])
    for hook in hooks:
        hook.remove()
    return seen, assigned


@families
@pytest.mark.parametrize("name", ["mlp_token", "block_token_selected", *formula.EXPERT_SCHEMES])
def test_counted_work_is_that_of_what_is_kept(exports, family, name):
    """At prefill and decode, without padding, which the layers that have no router compute."""
    case = exports(family)
    model, config = case.model(name), case.dense.config
    size = getattr(config, "moe_intermediate_size", config.intermediate_size)
    for prompt in case.prompts:
        cache, mask = None, torch.ones(1, len(prompt) + 1, dtype=torch.long)
        text = [*prompt, 9]
        for part, stop in ((slice(0, -1), -1), (slice(-1, None), None)):
            ids = torch.tensor([text[part]])
            found, cache = work(model, ids, mask[:, :stop], cache)
            seen, assigned = sent(case, name, [text], part)
            for index, layer in enumerate(found):
                gate = 2 * config.hidden_size * experts.count(case.dense)
                assert layer["gate"] == gate * seen[index]
                computed = [6 * config.hidden_size * size * int(n) for n in assigned[index, 1]]
                assert layer["experts"] == computed
                rows = experts.count(case.dense) if "expert" in name else 1
                router = 2 * config.hidden_size * rows * ids.shape[1] * (index in ROUTED)
                assert layer["router"] == router


@families
@by_expert
def test_skipped_pairs_are_not_gathered_and_padding_is_not_computed(exports, family, name):
    """Of a padded batch the rows that enter each expert are its kept pairs' alone."""
    case, entered = exports(family), {}
    model = load(case.export(name))
    for index in ROUTED:
        for number, expert in enumerate(model.model.layers[index].mixture.experts):
            expert.register_forward_pre_hook(
                lambda _, inputs, key=(index, number): entered.__setitem__(key, len(inputs[0]))
            )
    prefill(model, case.prompts)
    _, assigned = sent(case, name, case.prompts, slice(None))
    for index in ROUTED:
        kept = assigned[index, 1].tolist()
        assert 0 < sum(kept) < int(assigned[index, 0].sum())
        assert {n: entered.get((index, n), 0) for n in range(len(kept))} == dict(enumerate(kept))


# Thresholds and the report


@families
@by_expert
def test_thresholds_keep_all_or_nothing(exports, family, name):
    case = exports(family)
    model = load(case.export(name))
    for threshold, border in ((0.0, -math.inf), (1.0, math.inf)):
        model.set_thresholds(threshold)
        output, mask = prefill(model, case.prompts, use_cache=True)
        report = model.routing_report()
        assert report["capacity"] == 1.0 - threshold
        last = decode(model, output.past_key_values, mask)
        borders = dict.fromkeys(model.config.places, border)
        for row, prompt in enumerate(case.prompts):
            expected = case.formula(name, [*prompt, 9], borders=borders)[0]
            assert relative(output.logits[row][mask[row].bool()], expected[:-1]) < 2e-5
            assert relative(last[row], expected[-1]) < 2e-5
            if not threshold:
                dense = case.dense(torch.tensor([prompt])).logits[0]
                assert relative(output.logits[row][mask[row].bool()], dense) < 2e-5


@families
@pytest.mark.parametrize("capacity", [0.7, [0.25, 0.5, 0.8]])
def test_every_layer_reaches_its_capacity_of_assigned_pairs(exports, family, capacity, tmp_path):
    case, name = exports(family), "expert_token"
    model = load(case.export(name))
    ids, mask = pad(case.prompts, "right")
    model.set_capacity(capacity, ids, mask, scope="layer")
    model.save_pretrained(tmp_path / "again")
    shares = capacity if isinstance(capacity, list) else [capacity] * len(ROUTED)
    for routed in (model, load(tmp_path / "again")):
        output, mask = prefill(routed, case.prompts)
        layers = routed.routing_report()["layers"]
        for index, share in zip(ROUTED, shares, strict=True):
            assert abs(layers[index]["kept"] - share * layers[index]["units"]) <= 1
        thresholds = routed.config.routing["threshold"]
        logits = [math.log(t / (1 - t)) for t in thresholds]
        borders = dict(zip(routed.config.places, logits, strict=True))
        for row, prompt in enumerate(case.prompts):
            expected = case.formula(name, prompt, borders=borders)[0]
            assert relative(output.logits[row][mask[row].bool()], expected) < 2e-5


@families
def test_one_threshold_for_all_layers_reaches_the_capacity(exports, family):
    model = load(exports(family).export("expert_token"))
    ids, mask = pad(exports(family).prompts, "left")
    model.set_capacity(0.6, ids, mask, scope="model")
    assert len(set(model.config.routing["threshold"])) == 1
    model(ids, attention_mask=mask)
    assert model.routing_report()["capacity"] == pytest.approx(0.6, abs=0.03)


@families
@by_expert
def test_the_report_counts_each_experts_tokens(exports, family, name):
    case = exports(family)
    model = load(case.export(name))
    prefill(model, case.prompts)
    report = model.routing_report()
    _, assigned = sent(case, name, case.prompts, slice(None))
    for index in ROUTED:
        entry, counted = report["layers"][index], assigned[index].tolist()
        assert [entry["tokens_assigned"], entry["tokens_executed"]] == counted
        assert (entry["units"], entry["kept"]) == tuple(map(sum, counted))
        assert entry["capacity"] == entry["kept"] / entry["units"]
    assert report["kept"] == sum(entry["kept"] for entry in report["layers"].values())
    prompt = case.prompts[0]
    made = model.generate(
        torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False, eos_token_id=None
    )
    _, assigned = sent(case, name, [made[0, :-1].tolist()], slice(None))  # the last is not read
    for index, entry in model.routing_report()["layers"].items():
        assert [entry["tokens_assigned"], entry["tokens_executed"]] == assigned[index].tolist()


@families
def test_perplexity_and_experts_counts_equal_the_formula(exports, family):
    """Of texts whose first routed layer is the second one: what is below it runs once."""
    from megatron_mod.data.chat import Sample
    from megatron_mod.evaluation.huggingface_backend import HuggingFaceBackend
    from megatron_mod.evaluation.perplexity import perplexity
    from megatron_mod.evaluation.rows import Row
    from tests.helpers.routed import save_export

    case, name = exports(family), "expert_token"
    samples = [Sample(ids=p, labelled=[True] * len(p), source=str(p)) for p in case.prompts]
    nll, tokens = 0.0, 0
    for prompt in case.prompts:
        logits = case.formula(name, prompt)[0][:-1]
        targets = torch.tensor(prompt[1:])
        nll += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
        tokens += len(targets)
    tokenizer = SimpleNamespace(eos_token_id=2, name_or_path="")
    backend = HuggingFaceBackend(case.model(name), tokenizer, batch_size=2)
    rows = [Row.labelled(sample) for sample in samples]
    quality = perplexity(backend, rows)
    assert quality.perplexity == pytest.approx(math.exp(nll / tokens), rel=1e-4)
    _, assigned = sent(case, name, case.prompts, slice(None))
    for place, counts in backend.experts().items():
        assert counts.flip(0).tolist() == assigned[place.layer].tolist()
    shares = [float(n[1].sum() / n[0].sum()) for n in assigned[list(ROUTED)]]
    assert quality.capacity == pytest.approx(shares)
    routers = {n: own for (n, _), own in case.routers(name).items() if n > 0}
    export = save_export(case.folder / "later", case.hf, routers, granularity="expert_token")
    backend = HuggingFaceBackend(load(export), tokenizer, batch_size=2)
    for thresholds in ([0.5, 0.5], [0.2, 0.7], [0.5, 0.5]):
        found = backend.observe(rows, thresholds=thresholds)
        borders = {n: math.log(t / (1 - t)) for n, t in zip(routers, thresholds, strict=True)}
        for prompt, observed in zip(case.prompts, found, strict=True):
            logits, _, asked = formula.forward(
                case.dense, prompt, routers, granularity="expert_token", borders=borders
            )
            for place, pairs in observed.logits.items():
                torch.testing.assert_close(
                    pairs.sort().values, asked[place.layer].sort().values, rtol=1e-4, atol=1e-4
                )
            targets = torch.tensor(prompt[1:])
            nll = torch.nn.functional.cross_entropy(logits[:-1], targets, reduction="sum")
            assert -observed.score.log_probability == pytest.approx(float(nll), rel=1e-4)


@families
def test_a_token_by_itself(exports, family):
    case = exports(family)
    with torch.no_grad():
        for name in ("expert_token", "mlp_token"):
            found = case.model(name)(torch.tensor([[7]])).logits[0]
            assert relative(found, case.formula(name, [7])[0]) < 2e-5


@families
def test_in_half_precision_routers_still_decide_in_fp32(exports, family):
    case = exports(family)
    model = load(case.export("expert_token"), dtype=torch.bfloat16)
    kinds = {name: p.dtype for name, p in model.named_parameters()}
    assert {kinds.pop(n) for n in list(kinds) if ".router." in n} == {torch.float32}
    assert set(kinds.values()) == {torch.bfloat16}
    found, mask = prefill(model, case.prompts)
    for row, prompt in enumerate(case.prompts):
        expected = case.formula("expert_token", prompt)[0]
        apart = (found.logits[row][mask[row].bool()].float() - expected).norm() / expected.norm()
        assert apart < 0.5  # a decision or two may fall otherwise


# No-op experts: one more row of the gate for each, and no routers


@pytest.fixture(scope="module")
def with_noops(exports, tmp_path_factory):
    """Of a family the export with no-op experts, and their gates' rows by layer."""
    from tests.helpers.routed import save_with_noops

    @functools.cache
    def make(family):
        case, generator = exports(family), torch.Generator().manual_seed(9)
        rows = {
            n: torch.randn(3, case.dense.config.hidden_size, generator=generator) for n in ROUTED
        }
        folder = tmp_path_factory.mktemp(f"{family}_noops") / "export"
        return save_with_noops(folder, case.hf, rows), rows

    return make


@families
def test_no_op_experts_are_chosen_and_return_nothing(exports, with_noops, family):
    case = exports(family)
    export, rows = with_noops(family)
    model = load(export)
    output, mask = prefill(model, case.prompts, use_cache=True)
    last = decode(model, output.past_key_values, mask)
    chosen = torch.zeros(len(ROUTED), experts.count(case.dense) + 3, dtype=torch.long)
    for row, prompt in enumerate(case.prompts):
        expected, _ = experts.with_noops(case.dense, [*prompt, 9], rows)
        assert relative(output.logits[row][mask[row].bool()], expected[:-1]) < 2e-5
        assert relative(last[row], expected[-1]) < 2e-5
        _, sent_to = experts.with_noops(case.dense, prompt, rows)
        chosen += torch.stack([sent_to[n].sum(0) for n in ROUTED])
    prefill(model, case.prompts)
    report = model.routing_report()
    for entry, counted in zip(report["layers"].values(), chosen, strict=True):
        assert entry["tokens_assigned"] == counted.tolist()
        assert entry["tokens_executed"] == [*counted[:-3].tolist(), 0, 0, 0]
        assert 0 < entry["kept"] == int(counted[:-3].sum()) < entry["units"]


def test_no_op_experts_have_no_thresholds(exports, with_noops):
    model, ids = load(with_noops("mixtral")[0]), torch.tensor([exports("mixtral").prompts[0]])
    for call in (lambda: model.set_thresholds(0.5), lambda: model.set_capacity(0.5, ids)):
        with pytest.raises(ValueError, match="no routers; their gates choose among 3 no-op"):
            call()
    with pytest.raises(ValueError, match="output_router_logits.*no-op"):
        model(ids, output_router_logits=True)


# What gates say, and the load-balancing loss made of it


@families
@pytest.mark.parametrize("name", ["attn_token_all", "expert_token"])
def test_the_balancing_loss_is_the_familys(exports, family, name):
    case = exports(family)
    model = load(case.export(name))
    model.set_thresholds(0.0)  # routers skip nothing, so that the dense model says the same
    ids, mask = pad(case.prompts, "right")
    labels = ids.masked_fill(~mask.bool(), -100)
    inputs = {
        "input_ids": ids, "attention_mask": mask, "labels": labels, "output_router_logits": True,
    }  # fmt: skip
    with torch.no_grad():
        expected, found = case.dense(**inputs), model(**inputs)
        assert len(found.router_logits) == len(expected.router_logits) == 4
        for own, theirs in zip(found.router_logits, expected.router_logits, strict=True):
            real = mask.flatten().bool()
            torch.testing.assert_close(own[real], theirs[real], rtol=1e-4, atol=1e-4)
        assert float(found.aux_loss) == pytest.approx(float(expected.aux_loss), rel=1e-5)
        assert float(found.loss) == pytest.approx(float(expected.loss), rel=1e-5)
        assert model(**{**inputs, "output_router_logits": False}).router_logits is None


@pytest.mark.parametrize("name", ["mlp_token", "block_token_all", "mlp_sequence"])
def test_gates_that_not_every_token_meets_give_no_balancing_loss(exports, name):
    case = exports("qwen3_moe")
    with pytest.raises(ValueError, match=r"output_router_logits: .* what is skipped meets no gate"):
        case.model(name)(torch.tensor([case.prompts[0]]), output_router_logits=True)


# What is refused


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("mixtral", {"renormalize": 1}, "renormalize = 1: must be true or false"),
        ("mixtral", {"granularity": "mlp_token", "renormalize": True}, "false with granularity"),
        ("mixtral", {"num_noop_experts": 0}, "num_noop_experts = 0: must be a whole number"),
        ("mixtral", {"granularity": "mlp_token", "num_noop_experts": 2}, "other than 'expert_tok"),
        ("mixtral", {"stand_in_rank": 4}, "stand_in_rank = 4: must be null"),
        ("mixtral", {"work": [0.5, 0.9], "budget": 0.5}, "budget = 0.5: must be null"),
        ("mixtral", {"threshold": [0.5]}, "one per routed layer"),
        ("llama", {}, "no mixtures of experts"),
    ],
)
def test_a_routing_entry_this_code_cannot_run_is_refused(family, change, message):
    from megatron_mod.hf import modeling_mod

    config = {"mixtral": modeling_mod.MoDMixtralConfig, "llama": modeling_mod.MoDLlamaConfig}
    routing = {"granularity": "expert_token", "layers": [0, 1], "threshold": 0.5, **change}
    with pytest.raises(ValueError, match=message):
        config[family](num_hidden_layers=4, routing=routing)
