"""Counted work beside what torch's counter sees an export compute, and bytes beside its tensors."""

from __future__ import annotations

import json

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from megatron_mod.evaluation.work import Work
from megatron_mod.routing.scheme import Place
from tests.helpers import experts, formula, tiny
from tests.helpers.counted import products
from tests.helpers.routed import save_export

LENGTH, ROUTED, RANK = 12, (1, 2), 3


@pytest.fixture(scope="module", params=["llama", "mistral"])
def dense(request, tmp_path_factory):
    changes = {"num_key_value_heads": 2}
    if request.param == "mistral":
        changes["sliding_window"] = 5
    return tiny.save_model(tmp_path_factory.mktemp("work") / "hf", request.param, **changes)


@pytest.fixture(scope="module", params=experts.FAMILIES)
def mixture(request, tmp_path_factory):
    kind, changes = experts.FAMILIES[request.param]
    return tiny.save_model(tmp_path_factory.mktemp("work") / "hf", kind, **changes)


def unseen_pairs(work: Work, kept: dict[int, torch.Tensor]) -> int:
    """Operations on pairs of a query and a key it does not see, which torch computes and hides."""
    routing, total = work.routing, 0
    everyone = torch.ones(LENGTH, dtype=torch.bool)
    at = torch.arange(LENGTH)
    for layer in range(work.arch.num_layers):
        queries = keys = everyone
        attention = (layer, routing.scheme.attention_target)
        if attention in kept:
            queries = kept[attention]
            keys = everyone if routing.keys_values == "all" else queries
            if not queries.any():
                continue
        distance = at[queries][:, None] - at[keys]
        seen = (distance >= 0) & (distance < (work.arch.window_size or LENGTH))
        total += int(seen.logical_not().sum())
    return 4 * work.arch.num_attention_heads * work.arch.kv_channels * total


def prefilled(folder, generator: torch.Generator) -> tuple[dict, FlopCounterMode]:
    """An export's decisions on a prefill of random tokens, and what torch counted of it."""
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    ids = torch.randint(3, 100, (1, LENGTH), generator=generator)
    with (
        torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter
    ):  # fmt: skip
        model(ids, use_cache=False, logits_to_keep=1)
    return model.model.record.decisions, counter


@pytest.mark.parametrize("scheme", formula.SCHEMES)
@pytest.mark.parametrize("threshold", [0.5, 0.0, 1.0], ids=["some", "all", "none"])
def test_prefill_is_what_torch_counts(dense, scheme, threshold, tmp_path):
    generator = torch.Generator().manual_seed(5)
    routing = {"bias": True, "stand_in_rank": RANK, "threshold": threshold}
    routing |= formula.SCHEMES[scheme]
    granularity = routing["granularity"]
    places = formula.places(ROUTED, granularity)
    routers = {place: torch.randn(1, 32, generator=generator) for place in places}
    if scheme.endswith("sequence"):  # one keeps and one skips
        routers |= {(2, target): -routers[1, target] for target in formula.targets_of(granularity)}
    sizes = 32, RANK, generator
    more = {layer: formula.bias_and_stand_in(*sizes, granularity) for layer in ROUTED}
    for added in more.values():
        for name in [name for name in added if name.endswith("bias") and "router" in name]:
            added[name].fill_(0.1)
    folder = save_export(tmp_path / "export", dense, routers, more, **routing)
    made, counter = prefilled(folder, generator)
    kept = {Place(*place): made[place][0].flatten().expand(LENGTH) for place in places}
    work = Work.of(json.loads((folder / "config.json").read_text()))
    assert products(counter) == work.prefill(LENGTH, kept) + unseen_pairs(work, kept)


@pytest.mark.parametrize("scheme", ["mlp_token", "block_token_selected", "expert_token"])
@pytest.mark.parametrize("threshold", [0.5, 0.0, 1.0], ids=["some", "all", "none"])
def test_prefill_of_a_mixture_is_what_torch_counts(mixture, scheme, threshold, tmp_path):
    settings = {**formula.SCHEMES, **formula.EXPERT_SCHEMES}[scheme]
    generator = torch.Generator().manual_seed(5)
    places = formula.places(ROUTED, settings["granularity"])
    rows = experts.count(formula.load_dense(mixture)) if scheme == "expert_token" else 1
    routers = {place: torch.randn(rows, 32, generator=generator) for place in places}
    folder = save_export(tmp_path / "export", mixture, routers, threshold=threshold, **settings)
    made, counter = prefilled(folder, generator)
    kept = {Place(*place): made[place][0].flatten() for place in places}
    work = Work.of(json.loads((folder / "config.json").read_text()))
    assert products(counter) == work.prefill(LENGTH, kept) + unseen_pairs(work, kept)


def test_a_dense_model_decodes_with_all_it_has(dense):
    work = Work.of(json.loads((dense / "config.json").read_text()))
    model = AutoModelForCausalLM.from_pretrained(dense)
    matrices = sum(
        p.numel() for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name
    )
    stored = min(7, (work.arch.window_size or 99) - 1)
    cache = 2 * 4 * work.arch.num_query_groups * work.arch.kv_channels * stored
    for batch in (1, 3):
        found = work.decode_bytes([7] * batch, {}, {}, element_size=4)
        assert found == 4 * (matrices + batch * cache)


def test_what_nobody_keeps_is_not_read(dense):
    work = Work.of(json.loads((dense / "config.json").read_text()))
    arch = work.arch
    key = 2 * 32 * arch.num_query_groups * arch.kv_channels
    weights = {
        "attn": 2 * 32 * arch.num_attention_heads * arch.kv_channels + key,
        "mlp": 3 * 32 * arch.ffn_hidden_size,
    }
    weights["block"] = weights["attn"] + weights["mlp"]
    everything = work.decode_bytes([0, 0], {}, {}, element_size=1)
    none, one = torch.tensor([False, False]), torch.tensor([True, False])
    for name, settings in formula.SCHEMES.items():
        routed = routed_work(arch, **settings)
        places = routed.routing.places
        spared = sum(weights[place.target] for place in places)
        offered = key if settings.get("keys_values") == "all" else 0
        found = routed.decode_bytes(
            [0, 0], dict.fromkeys(places, none), {1: [0, 0]}, element_size=1
        )
        assert found == everything + 32 * len(places) - spared + offered, name
        found = routed.decode_bytes([0, 0], dict.fromkeys(places, one), {1: [0, 0]}, element_size=1)
        assert found == everything + 32 * len(places), name
        routed = routed_work(arch, stand_in_rank=RANK, **settings)
        for kept, extra in ((none, 64 * RANK), (one, 64 * RANK), (~none, 0)):
            plain, extra = routed_work(arch, **settings), extra * len(places)
            step = [0, 0], dict.fromkeys(places, kept), {1: [0, 0]}
            more = routed.decode_bytes(*step, element_size=2)
            assert more == plain.decode_bytes(*step, element_size=2) + 2 * extra, name


def test_a_removed_layer_makes_no_keys(dense):
    """With the threshold 1 all that its target holds is left out; a router that merely keeps nobody
    still makes the keys and values that ``all`` promises."""
    arch = Work.of(json.loads((dense / "config.json").read_text())).arch
    query, key = (2 * 32 * heads * arch.kv_channels for heads in
                  (arch.num_attention_heads, arch.num_query_groups))  # fmt: skip
    mlp = 3 * 32 * arch.ffn_hidden_size
    seen = sum(min(n + 1, arch.window_size or LENGTH) for n in range(LENGTH))
    pairs = 4 * arch.num_attention_heads * arch.kv_channels * seen
    flops = {"attn": 2 * LENGTH * (query + key) + pairs, "mlp": 2 * LENGTH * mlp}
    flops["block"] = flops["attn"] + flops["mlp"]
    weights = {"attn": query + key, "mlp": mlp, "block": query + key + mlp}
    cache = 2 * 3 * arch.num_query_groups * arch.kv_channels
    everything = 4 * (2 * LENGTH * (query + key + mlp) + pairs) + 2 * 32 * arch.vocab_size
    read = 4 * (query + key + mlp + cache) + 32 * arch.vocab_size
    nobody = torch.zeros(LENGTH, dtype=torch.bool)
    for name, settings in formula.SCHEMES.items():
        offers = settings.get("keys_values") == "all"
        work = routed_work(arch, **settings)
        places = work.routing.places
        targets = [place.target for place in places]
        found, kept = work.at([1.0] * len(places)), dict.fromkeys(places, nobody)
        saved = everything + sum(2 * 32 * LENGTH - flops[target] for target in targets)
        assert found.prefill(LENGTH, kept) == saved, name
        assert work.prefill(LENGTH, kept) == saved + 2 * LENGTH * key * offers, name
        step = [3], dict.fromkeys(places, nobody[:1]), {1: [3]}
        saved = read + sum(32 - weights[target] for target in targets)
        saved -= cache * (targets != ["mlp"])
        assert found.decode_bytes(*step, element_size=1) == saved, name
        assert work.decode_bytes(*step, element_size=1) == saved + key * offers, name


def routed_work(arch, **routing) -> Work:
    from megatron_mod.routing.config import RoutingConfig

    routers = len(formula.targets_of(routing["granularity"]))
    return Work(arch, RoutingConfig(layers=(1,), capacity=(0.5,) * routers, **routing))
