"""Calibrated thresholds against the formula on Hugging Face's dense model."""

from __future__ import annotations

import json
import math
import random
import re
from pathlib import Path
from statistics import fmean
from string import ascii_letters

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from megatron_mod.calibration import export_timing
from megatron_mod.calibration.budget import BudgetRequest
from megatron_mod.calibration.calibrate import calibrate
from megatron_mod.evaluation.load import load_backend
from megatron_mod.evaluation.perplexity import perplexity, read_rows
from megatron_mod.parallel.topology import Topology
from megatron_mod.routing.config import logit_border
from tests.helpers import formula, tiny
from tests.helpers.routed import save_export
from tests.helpers.text import write_lines
from tests.helpers.thinned import pairs
from tests.helpers.tools import run_tool

ONE = Topology(tensor=1, pipeline=1, data=1)
LAYERS, SAMPLES = (0, 1, 2), 24
ROUNDING = 1e-4


@pytest.fixture(scope="module")
def case(tmp_path_factory, single_process):
    """Dense folder, conversations, and an export of random routers per scheme."""
    folder = tmp_path_factory.mktemp("calibrate")
    hf = tiny.save_llama(folder / "hf", vocab_size=tiny.VOCAB, num_key_value_heads=2)
    tiny.save_tokenizer(hf)
    letters = random.Random(3)
    rows = [
        {"prompt": "".join(letters.choices(ascii_letters, k=30 + n)), "completion": f"{n * n}!"}
        for n in range(SAMPLES)
    ]
    data = write_lines(folder / "data.jsonl", rows)
    generator = torch.Generator().manual_seed(6)
    routers = {layer: torch.randn(1, 32, generator=generator) for layer in LAYERS}
    exports = {
        name: save_export(
            folder / name,
            hf,
            {
                place: routers[place[0]] * (-1 if place[1] == "mlp" else 1)
                for place in formula.places(LAYERS, settings["granularity"])
            },
            **settings,
        )
        for name, settings in formula.SCHEMES.items()
    }
    return hf, data, exports


def places_of(scheme: str) -> list[tuple[int, str]]:
    return formula.places(LAYERS, formula.SCHEMES[scheme]["granularity"])


@pytest.fixture(autouse=True)
def few_prompts(monkeypatch):
    """What is timed does not matter here."""
    monkeypatch.setattr(export_timing, "PROMPTS", 2)
    monkeypatch.setattr(export_timing, "NEW_TOKENS", 1)


def run(case, scheme: str, save: Path | None = None, **settings) -> dict:
    _, data, exports = case
    request = BudgetRequest(
        load=str(exports[scheme]),
        data=str(data),
        save=save and str(save),
        **{"curve": (), "batch_size": 5, **settings},
    )
    return calibrate(request, ONE)


def by_formula(case, scheme: str, thresholds: list[float]) -> tuple[list[float], float]:
    """Each router's capacity and the perplexity at these thresholds."""
    hf, data, exports = case
    dense, settings = formula.load_dense(hf), formula.SCHEMES[scheme]
    weights = load_file(exports[scheme] / "model.safetensors")
    routers = {}
    for layer, target in places_of(scheme):
        name = formula.name_of("router.weight", target, settings["granularity"])
        routers[layer, target] = weights[f"model.layers.{layer}.{name}"]
    borders = dict(zip(routers, map(logit_border, thresholds), strict=True))
    kept, units, nats, labels = torch.zeros(len(routers)), 0, 0.0, 0
    for row in read_rows(data, AutoTokenizer.from_pretrained(hf), max_length=128):
        masks, by_sequence = None, scheme.endswith("sequence")
        with torch.no_grad():
            if by_sequence:
                _, made, _ = formula.forward(
                    dense, row.ids[: row.context], routers, borders=borders, **settings
                )
                masks = {place: mask[:1].expand(len(row.ids)) for place, mask in made.items()}
            logits, made, _ = formula.forward(
                dense, row.ids, routers, masks=masks, borders=borders, **settings
            )
        decided = torch.stack([made[place] for place in routers])
        kept += decided[:, 0] if by_sequence else decided.sum(1)
        units += 1 if by_sequence else len(row.ids)
        asked = torch.tensor(row.labels)
        nats += float(torch.nn.functional.cross_entropy(logits, asked, reduction="sum"))
        labels += int((asked >= 0).sum())
    return (kept / units).tolist(), math.exp(nats / labels)


def check(case, scheme: str, point: dict) -> None:
    capacity, perplexity = by_formula(case, scheme, point["thresholds"])
    assert point["capacity_per_layer"] == pytest.approx(capacity, abs=1e-6)
    assert point["perplexity"] == pytest.approx(perplexity, rel=ROUNDING)
    removed = point["static_removed_layers"]
    places, parted = places_of(scheme), "+" in formula.SCHEMES[scheme]["granularity"]
    names = [f"{layer}.{target}" if parted else layer for layer, target in places]
    _, static = by_formula(case, scheme, [float(name in removed) for name in names])
    assert point["static_perplexity"] == pytest.approx(static, rel=ROUNDING)
    assert point["static_method"] == "greedy"
    assert point["static_capacity"] == pytest.approx(1 - len(removed) / len(places))


@pytest.mark.parametrize(("scheme", "scope"), pairs(4, formula.SCHEMES, ("layer", "model")))
def test_a_capacity_is_met(case, scheme, scope, tmp_path):
    report = run(case, scheme, tmp_path / "new", capacity=0.5, scope=scope)
    chosen = report["chosen"]
    check(case, scheme, chosen)
    check(case, scheme, report["before"])
    routers = len(places_of(scheme))
    assert report["before"]["thresholds"] == [0.5] * routers
    # What all samples begin with is decided alike, so some tokens come in groups of as many.
    unit = 1 / SAMPLES if scheme.endswith("sequence") else SAMPLES / report["tokens"]
    assert chosen["capacity"] == pytest.approx(0.5, abs=unit)
    if scope == "layer":
        assert chosen["capacity_per_layer"] == pytest.approx([0.5] * routers, abs=unit)
    else:
        assert len(set(chosen["thresholds"])) == 1
    _, dense = by_formula(case, scheme, [0.0] * routers)
    assert report["dense_perplexity"] == pytest.approx(dense, rel=ROUNDING)
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    assert config["routing"]["threshold"] == chosen["thresholds"]
    before = json.loads((case[2][scheme] / "config.json").read_text())
    assert {**config, "routing": None} == {**before, "routing": None}
    assert before["routing"]["threshold"] == 0.5, "the original is as it was"
    weights = [(folder / "model.safetensors") for folder in (tmp_path / "new", case[2][scheme])]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert json.loads((tmp_path / "new" / "calibration.json").read_text()) == report
    assert (tmp_path / "new" / "calibration.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(("scope", "capacity"), [("layer", 0.35), ("model", 0.7)])
@pytest.mark.parametrize("scheme", ["attn_sequence", "mlp_token", "block_token_selected"])
def test_an_export_sets_the_same_thresholds_on_the_same_text(
    case, scheme, capacity, scope, tmp_path
):
    """``set_capacity`` on one batch of what the command reads row by row."""
    _, data, exports = case
    report = run(case, scheme, tmp_path / "new", capacity=capacity, scope=scope)
    backend = load_backend(exports[scheme], ONE, dtype="float32")
    rows = read_rows(data, backend.tokenizer, max_length=128)
    texts = [row.ids[: row.context] if scheme.endswith("sequence") else row.ids for row in rows]
    ids = torch.zeros(len(texts), max(map(len, texts)), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(texts):
        ids[row, : len(text)], mask[row, : len(text)] = torch.tensor(text), 1
    backend.model.set_capacity(capacity, ids, mask, scope=scope)
    borders = [logit_border(t) for t in backend.model.config.routing["threshold"]]
    wanted = [logit_border(t) for t in report["chosen"]["thresholds"]]
    assert borders == pytest.approx(wanted, rel=1e-5, abs=1e-5)
    assert 0 < report["chosen"]["capacity"] < 1


def test_a_model_that_was_observed_decides_as_before(case):
    """At other thresholds, to choose among them; it goes on with its own."""
    _, data, exports = case
    backend = load_backend(exports["attn_token_all"], ONE, dtype="float32")
    rows = read_rows(data, backend.tokenizer, max_length=128)
    own, before = backend.thresholds, perplexity(backend, rows)
    backend.observe(rows, thresholds=[0.0, 1.0, 0.0])
    assert backend.thresholds == own
    assert perplexity(backend, rows).perplexity == before.perplexity


def test_static_removal_is_greedy_and_does_as_much_work(case, tmp_path):
    report = run(case, "attn_token_all", tmp_path / "new", capacity=0.1, curve=(0.7, 0.4))
    everything = (
        1
        - 1
        / run(case, "attn_token_all", tmp_path / "none", capacity=0.0)["chosen"][
            "static_counted_speedup"
        ]
    )
    order: list[int] = []
    for _ in LAYERS:
        cost = {
            layer: by_formula(
                case, "attn_token_all", [float(at in (*order, layer)) for at in LAYERS]
            )[1]
            for layer in LAYERS
            if layer not in order
        }
        order.append(min(cost, key=cost.get))
    counts = []
    for point in (*report["curve"], report["chosen"]):
        saved = 1 - 1 / point["counted_speedup"]
        count = round(len(LAYERS) * saved / everything)
        assert point["static_removed_layers"] == sorted(order[:count])
        expected = 1 / (1 - everything * count / len(LAYERS))
        assert point["static_counted_speedup"] == pytest.approx(expected, rel=5e-3)  # routers
        counts.append(count)
    assert counts[0] < counts[-1] < len(LAYERS), "at a tenth of the capacity keys are still made"


def test_the_curve_passes_through_its_capacities(case, tmp_path):
    report = run(case, "block_token_all", tmp_path / "new", capacity=0.3, curve=(0.8, 0.6, 0.0))
    found = [point["capacity"] for point in report["curve"]]
    assert found == pytest.approx([0.8, 0.6, 0.0], abs=0.021)
    speedups = [point["counted_speedup"] for point in report["curve"]]
    assert speedups == sorted(speedups)
    for point in report["curve"]:
        check(case, "block_token_all", point)
        assert point["prefill_speedup"] > 0
        assert point["decode_speedup"] > 0


@pytest.mark.parametrize(
    ("scheme", "scope"), [("attn_sequence", "model"), ("block_token_selected", "layer")]
)
def test_a_speedup_is_met_in_counted_work(case, scheme, scope, tmp_path):
    wanted = 1.1 if scheme == "attn_sequence" else 1.4
    report = run(case, scheme, tmp_path / "new", speedup=wanted, scope=scope)
    found = report["chosen"]
    assert found["work"] == pytest.approx(1 / found["counted_speedup"])
    others = [] if report["instead"] is None else [report["instead"]]
    assert bool(others) == (report["chosen_by"] == "one price")
    assert all(found["perplexity"] < other["perplexity"] for other in others)
    check(case, scheme, found)
    assert wanted <= found["counted_speedup"] <= wanted * 1.1


@pytest.mark.parametrize("scheme", ["attn_sequence", "attn_token_selected"])
def test_a_perplexity_is_kept(case, scheme, tmp_path):
    half = run(case, scheme, tmp_path / "half", capacity=0.5)
    assert half["chosen"]["perplexity"] > 1.02 * half["dense_perplexity"], "not a case at all"
    report = run(case, scheme, tmp_path / "new", max_perplexity_increase="1 %")
    check(case, scheme, report["chosen"])
    assert report["chosen"]["perplexity"] <= 1.01 * report["dense_perplexity"]


def test_a_text_is_cut_into_windows(case, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("What is two and two? Four, says everybody in Paris. " * 9)
    exports = case[2]
    settings = {"data": str(text), "curve": (), "max_length": 40}
    save = str(tmp_path / "new")
    request = BudgetRequest(str(exports["attn_token_all"]), capacity=0.5, save=save, **settings)
    report = calibrate(request, ONE)
    assert (report["samples"], report["pooling"]) == (12, None)
    request = BudgetRequest(str(exports["attn_sequence"]), capacity=0.5, **settings)
    with pytest.raises(ValueError, match="a text has no prompts"):
        calibrate(request, ONE)


def test_untrained_routers_cannot_be_held_to_a_capacity(case, tmp_path):
    hf, data, _ = case
    zeros = {layer: torch.zeros(1, 32) for layer in LAYERS}
    export = save_export(tmp_path / "export", hf, zeros)
    before = (export / "config.json").read_bytes()
    with pytest.raises(ValueError, match=r"--capacity 0.5: the nearest .* is 1.000"):
        calibrate(BudgetRequest(str(export), str(data), capacity=0.5), ONE)
    assert (export / "config.json").read_bytes() == before
    assert not (export / "calibration.json").exists()


def test_more_than_all_that_is_routed_cannot_be_saved(case, tmp_path):
    with pytest.raises(ValueError, match=r"--speedup 3: skipping everything in the 3 routed"):
        run(case, "mlp_token", tmp_path / "new", speedup=3.0)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"capacity": 1.5}, "--capacity 1.5: must be 0 to 1"),
        ({"speedup": 1.0}, "--speedup 1: must be above 1"),
        ({"max_perplexity_increase": "0.01"}, "0.01: write a percentage"),
        ({"capacity": 0.5, "curve": (2.0,)}, "--curve 2: must be"),
        ({"capacity": 0.5, "samples": -1}, "--samples -1"),
        ({"capacity": 0.5, "data": "nowhere"}, "--data nowhere: no such file"),
        ({"capacity": 0.5, "save": "/"}, "--save /: already exists"),
        ({"capacity": 0.5, "tensor": 2}, "--tensor 2: a Hugging Face folder"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(case, settings, message):
    request = {"load": str(case[2]["mlp_token"]), "data": str(case[1]), **settings}
    with pytest.raises(ValueError, match=message):
        BudgetRequest(**request)


def test_a_model_without_routers_is_refused(case):
    with pytest.raises(ValueError, match="has no routers"):
        calibrate(BudgetRequest(str(case[0]), str(case[1]), capacity=0.5), ONE)


def test_the_command_changes_an_export_in_place_and_evaluation_sees_it(
    case, tmp_path, monkeypatch, capsys
):
    hf, data, exports = case
    weights = load_file(exports["block_token_all"] / "model.safetensors")
    routers = {layer: weights[f"model.layers.{layer}.router.weight"] for layer in LAYERS}
    settings = formula.SCHEMES["block_token_all"]
    export = save_export(tmp_path / "export", hf, routers, **settings)
    first = BudgetRequest(str(export), str(data), capacity=0.7, curve=())
    again = BudgetRequest(str(export), str(data), capacity=0.4, curve=())
    assert calibrate(again, ONE)["chosen"] != calibrate(first, ONE)["chosen"]
    words = ("--load", export, "--data", data, "--capacity", 0.4, "--curve")
    capsys.readouterr()
    assert run_tool(monkeypatch, "calibrate_router", *words) == 0
    (reached,) = re.findall(r"--capacity 0.4: capacity (\S+);", capsys.readouterr().out)
    backend = load_backend(export, ONE, dtype="float32")
    rows = read_rows(data, backend.tokenizer, max_length=128)
    capacity = fmean(perplexity(backend, rows).capacity)
    assert capacity == pytest.approx(float(reached), abs=1e-3)
    assert capacity == pytest.approx(0.4, abs=0.02)


@pytest.mark.parametrize("budgets", [{}, {"capacity": 0.5, "speedup": 1.1}])
def test_one_budget_must_be_given(budgets):
    names = "exactly one of --capacity --speedup --max-perplexity-increase"
    with pytest.raises(ValueError, match=names):
        BudgetRequest("export", "data.jsonl", **budgets)
