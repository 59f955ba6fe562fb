"""The ideal beside which an export's time is put, and who is timed when."""

from __future__ import annotations

import math
import random
from types import SimpleNamespace

import pytest
import torch
from transformers.utils import ModelOutput

from megatron_mod.benchmark.inference_speed import (
    Pair,
    decisions_of,
    decode_bytes,
    hold,
    kept_share,
    prefill_flops,
)
from megatron_mod.evaluation import speed
from megatron_mod.evaluation.rows import Row
from megatron_mod.evaluation.work import Work
from megatron_mod.hf.cache_mod import CACHE
from megatron_mod.model.architecture import Architecture
from megatron_mod.report import quickstart
from megatron_mod.routing.config import RoutingConfig
from megatron_mod.routing.scheme import Place
from tests.helpers import formula, tiny
from tests.helpers.routed import save_export

QUERY, KEY, MLP = 2 * 8 * 8, 2 * 8 * 4, 3 * 8 * 16  # weights of a layer of the model below
LAYER = QUERY + KEY + MLP
OUTPUT, ROUTER = 8 * 10, 8
PAIR, STORED = 4 * 8, 2 * 4  # operations of a query with a key; numbers that a token stores


def work_of(granularity: str, *, window: int | None = None, **settings) -> Work:
    """Two layers, the second routed: hidden 8, 2 heads of 4 channels, 1 group, MLP 16."""
    arch = Architecture(
        num_layers=2, hidden_size=8, ffn_hidden_size=16, num_attention_heads=2,
        num_query_groups=1, kv_channels=4, vocab_size=10, max_sequence_length=32,
        layernorm_epsilon=1e-5, rotary_base=1e4, tied_embeddings=True, window_size=window,
    )  # fmt: skip
    return Work(arch, RoutingConfig(granularity, (1,), (0.5,), **settings))


def flags(*rows: str) -> torch.Tensor:
    """``flags("x.", "..")``: a row each, ``x`` for kept."""
    return torch.tensor([[mark == "x" for mark in row] for row in rows])


def test_operations_of_a_batch():
    """Rows of three tokens: one keeps the first and the third, the other none."""
    made = {Place(1, "block"): flags("x.x", "...")}
    dense = 2 * 3 * LAYER + 6 * PAIR + 2 * OUTPUT
    router = 3 * 2 * ROUTER
    found = prefill_flops(work_of("block_token", keys_values="selected"), made, length=3)
    assert found == 2 * (dense + router) + 2 * 2 * LAYER + 3 * PAIR
    found = prefill_flops(work_of("block_token", keys_values="all"), made, length=3)
    assert found == 2 * (dense + router) + 2 * 2 * (QUERY + MLP) + 6 * 2 * KEY + 4 * PAIR
    made = {Place(1, "attn"): flags("x", ".")[:, 0]}
    found = prefill_flops(work_of("attn_sequence"), made, length=3)
    assert found == 2 * (dense + router) + 2 * 3 * (LAYER + MLP) + 6 * PAIR


def test_bytes_of_decode_steps():
    """After "x.x" and "...", steps that keep row 0, then nobody; the mean of the two."""

    def found(work: Work) -> float:
        (place,) = work.routing.places
        prefill, *steps = (
            {place: flags(*rows)} for rows in (("x.x", "..."), ("x", "."), (".", "."))
        )
        return decode_bytes(work, prefill, steps, length=3, element_size=4)

    always = OUTPUT + LAYER + ROUTER + 7 * STORED  # the dense layer holds 6 tokens, then 8
    kept = LAYER + 2 * STORED
    assert found(work_of("block_token", keys_values="selected")) == 4 * (always + kept / 2)
    kept = LAYER + 3 * STORED + KEY  # without the attention, keys and values are still made
    assert found(work_of("block_token", keys_values="all")) == 4 * (always + kept / 2)
    kept = LAYER + 7 * STORED + 7 * STORED + LAYER - MLP  # every step attends
    assert found(work_of("mlp_token")) == 4 * (always + kept / 2)


def test_bytes_of_a_sequence_that_skips():
    prefill = {Place(1, "attn"): flags("x", ".")[:, 0]}
    found = decode_bytes(work_of("attn_sequence"), prefill, [prefill] * 3, length=3, element_size=2)
    assert found == 2 * (OUTPUT + 2 * LAYER + ROUTER + 8 * STORED + 4 * STORED)


def test_a_window_forgets_what_was_kept():
    """Of "xx..." a window of 4 leaves the last three places to the next token, all skipped."""
    prefill, step = ({Place(1, "attn"): flags(row)} for row in ("xx...", "x"))
    work = work_of("attn_token", keys_values="selected", window=4)
    found = decode_bytes(work, prefill, [step, step], length=5, element_size=1)
    assert found == OUTPUT + 2 * LAYER + ROUTER + 3 * STORED + (0 + 1) * STORED / 2


class Recorder:
    """In a model's place: notes who is called with what."""

    device = "cpu"

    def __init__(self, name: str, calls: list) -> None:
        self.name, self.calls = name, calls

    def __call__(self, ids, **given):
        self.calls.append((self.name, tuple(ids.shape), given[CACHE]))
        cache = (given[CACHE] or 0) + ids.shape[1]
        return ModelOutput(logits=torch.zeros(len(ids), 1, 5), **{CACHE: cache})


def test_models_take_turns_and_the_first_changes():
    calls = []
    models = [Recorder("a", calls), Recorder("b", calls)]
    timings = speed.compare(models, [torch.ones(3, 7).long()], prefills=2, new_tokens=3)
    assert len(timings) == 2
    assert [name for name, *_ in calls] == [*"ba", *"ba", *"ba", *"ab", *"ba", *"ab", *"ba"]
    assert [(shape, cache) for _, shape, cache in calls[::2]] == [
        ((3, 7), None), ((3, 1), 7),  # warming up
        ((3, 7), None), ((3, 7), None),
        ((3, 1), 7), ((3, 1), 8), ((3, 1), 9),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "granularity", ["attn_sequence+mlp_sequence", "mlp_sequence", "block_token"]
)
@pytest.mark.parametrize("batch", [1, 3])
def test_random_weights_keep_what_is_asked(granularity, batch):
    pair = Pair.of_shape("tiny", granularity, dtype=torch.bfloat16)
    ids = pair.prompts(batch, 40)
    assert ids.shape == (batch, 40)
    assert len(ids.unique(dim=0)) == batch
    for capacity in (0.5, 0.0, 1.0):
        hold(pair.routed, capacity, ids)
        with torch.no_grad(), decisions_of(pair.routed) as made:
            pair.routed(ids)
        assert kept_share(made) == pytest.approx(capacity, abs=0.01)
    dense = dict(pair.dense.named_parameters())
    for name, parameter in pair.routed.named_parameters():
        if "router" in name:
            assert parameter.dtype == torch.float32
        else:
            assert parameter.dtype == torch.bfloat16
            assert parameter.data_ptr() == dense[name].data_ptr()
    with torch.no_grad():  # all is kept now
        assert torch.equal(pair.routed(ids).logits, pair.dense(ids).logits)


@pytest.mark.parametrize("name", ["attn_sequence", "parts_token_selected", "block_token_all"])
def test_a_row_is_about_the_decisions_of_the_timed_calls(name, tmp_path):
    """Decided anew by the formula, on prompts and on what follows them."""
    batch, context, new = 3, 20, 4
    hf = tiny.save_tokenizer(formula.save_model(tmp_path / "hf", vocab_size=tiny.VOCAB))
    dense, scheme = formula.load_dense(hf), formula.SCHEMES[name]
    places = formula.places((0, 2), scheme["granularity"])
    empty = {place: torch.zeros(1, 32) for place in places}
    plain = save_export(tmp_path / "plain", hf, empty, **scheme)
    prompts = Pair.of_folders(hf, plain, dtype=torch.float32).prompts(batch, context)
    assert prompts.shape == (batch, context)
    assert len(prompts.unique(dim=0)) == batch
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        routers = formula.mixed_routers(dense, prompts.tolist(), (0, 2), generator, **scheme)
    export = save_export(tmp_path / "export", hf, routers, **scheme)
    pair = Pair.of_folders(hf, export, dtype=torch.float32)
    row = pair.measure(batch, context, repetitions=1, new_tokens=new)

    work, plain = (Work.of(model.config.to_dict()) for model in (pair.routed, pair.dense))
    texts, masks = [], []
    for prompt in prompts.tolist():
        text = prompt + formula.greedy(dense, prompt, routers, new=new, **scheme)
        seen = prompt if work.routing.scheme.per_sequence else text
        with torch.no_grad():
            made = formula.forward(dense, seen, routers, **scheme)[1]
        if work.routing.scheme.per_sequence:
            made = {place: mask[:1].expand(len(text)) for place, mask in made.items()}
        texts.append(text)
        masks.append({Place(*place): mask.bool() for place, mask in made.items()})
    first = [{place: mask[:context] for place, mask in made.items()} for made in masks]
    flops = sum(work.prefill(context, kept) for kept in first)
    assert row["prefill"]["ideal"] == batch * plain.prefill(context, {}) / flops
    assert row["capacity"] == pytest.approx(
        float(torch.stack([kept for made in first for kept in made.values()]).float().mean())
    )
    read = whole = 0
    for at in range(context, context + new):
        kept = {Place(*n): torch.stack([made[n][at] for made in masks]) for n in routers}
        offered = scheme.get("keys_values") == "all"
        held = {
            layer: [at if offered else int(made[layer, target][:at].sum()) for made in masks]
            for layer, target in routers
            if target != "mlp"
        }
        read += work.decode_bytes([at] * batch, kept, held, element_size=4)
        whole += plain.decode_bytes([at] * batch, {}, {}, element_size=4)
    assert row["decode"]["ideal"] == whole / read > 1
    for phase in ("prefill", "decode"):
        found = row[phase]
        assert found["speedup"] == found["dense_s"] / found["routed_s"]
        assert found["share"] == found["speedup"] / found["ideal"]
        reached = 1 - found["routed_s"] / found["dense_s"]
        assert found["saving_share"] == pytest.approx(reached / (1 - 1 / found["ideal"]))


def times(median: float, noise: float, count: int, seed: int) -> list[float]:
    generator = random.Random(seed)
    return [median * math.exp(generator.gauss(0, noise)) for _ in range(count)]


@pytest.mark.parametrize(("pairs", "place"), [(7, None), (8, 0), (12, 1), (20, 3)])
def test_an_interval_lies_between_ratios_that_chance_allows(pairs, place):
    """Twice the chance that so few of ``pairs`` throws of a coin show heads is at most 0.01, and
    with one more it is not: 2 / 2**8, 2 * (1 + 12) / 2**12, 2 * (1 + 20 + 190 + 1140) / 2**20."""
    ratios = [1 + n / 100 for n in range(1, pairs + 1)]
    slow = [2.0 * ratio for ratio in ratios[::2] + ratios[1::2]]
    found = speed.speedup(slow, [2.0] * pairs)
    assert found.pairs == pairs
    assert found.ratio == pytest.approx(1 + (pairs + 1) / 200)
    if place is None:
        assert (found.low, found.high, found.is_measurable) == (None, None, False)
    else:
        assert found.low == pytest.approx(ratios[place])
        assert found.high == pytest.approx(ratios[-1 - place])
        assert found.is_measurable


def test_chance_is_not_told_as_a_speedup():
    """Two series of one kind, with the noise that a shared machine has."""
    told = [
        speed.speedup(times(2.4, 0.15, 20, seed), times(2.4, 0.15, 20, 10_000 + seed))
        for seed in range(300)
    ]
    assert sum(not 0.97 < found.ratio < 1.03 for found in told) > 100  # as would have been printed
    assert sum(found.is_measurable for found in told) <= 9


def test_a_speedup_is_told_and_what_both_feel_does_not_hide_it():
    for seed in range(100):
        felt = [1 + (n % 7) / 2 for n in range(20)]
        slow = [a * b for a, b in zip(times(1.05, 0.005, 20, seed), felt, strict=True)]
        fast = [a * b for a, b in zip(times(1.0, 0.005, 20, 10_000 + seed), felt, strict=True)]
        found = speed.speedup(slow, fast)
        assert found.is_measurable
        assert 1.03 < found.low < found.high < 1.07


def test_the_quickstart_says_when_there_is_no_difference():
    def shown(dense: list[float], routed: list[float]) -> tuple[dict, str]:
        timings = [speed.Timing(times, [1.0]) for times in (dense, routed)]
        found = quickstart.beside(timings, "prefill")
        return found, quickstart.in_words(found)

    found, words = shown([1.1] * 10 + [0.9] * 10, [1.0] * 20)
    assert not found["is_measurable"]
    assert words == "no difference measurable (0.90x to 1.10x at 99 %, 20 pairs)"
    found, words = shown([1.2, 1.3, 1.25, 1.25] * 5, [1.0] * 20)
    assert found["speedup"] == found["dense_s"] / found["routed_s"] == 1.25
    assert words == "1.25x (1.20x to 1.30x at 99 %, 20 pairs)"
    assert shown([1.5], [1.0])[1] == "no difference measurable in 1 pairs"


def test_the_quickstart_times_the_text_that_it_scores(monkeypatch):
    """Longer samples eight at a time, and the answers to single questions."""
    rows = [Row([n] * (20 + n), context=5 + n, labels=[]) for n in range(32)]
    asked = []

    def compare(models, prompts, **how):
        asked.append((models, [prompt.tolist() for prompt in prompts], how))
        return [speed.Timing([1.0], [1.0])] * 2

    monkeypatch.setattr(quickstart.speed, "compare", compare)
    monkeypatch.setattr(quickstart, "prefill_work", lambda *given: (0.5, 1.25))
    config = SimpleNamespace(max_position_embeddings=speed.NEW_TOKENS + 11)
    dense = SimpleNamespace(config=config)
    found = quickstart.measure_speed(dense, "routed", None, rows)
    (models, batches, _), (_, questions, _) = asked
    assert models == [dense, "routed"]
    assert batches == [[[n] * 36 for n in some] for some in (range(24, 32), range(16, 24))]
    assert questions == [[[n] * min(5 + n, 11)] for n in range(2, 32, 4)]
    assert (found["context_tokens"], found["prefill"]["batch"]) == (36, 8)
    assert (found["capacity"], found["counted"]) == (0.5, 1.25)
