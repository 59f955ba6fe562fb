"""A training run calibrated at every topology, beside its own export."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from megatron_mod.checkpoint.manifest import ROUTERS
from megatron_mod.conversion.convert import export_routers, megatron_to_hf
from megatron_mod.conversion.routers import write_step
from megatron_mod.conversion.source import open_base, open_source
from megatron_mod.evaluation.perplexity import read_rows
from megatron_mod.evaluation.static import Greedy
from megatron_mod.parallel.topology import Topology
from tests.distributed import cases
from tests.helpers import formula, tiny
from tests.helpers.ranks import meet, run_ranks
from tests.helpers.text import write_lines

SCHEMES = ("attn_sequence", "block_token_all")
BOTH = {"tensor": 2, "pipeline": 2}
STAGES = {"pipeline": 2}  # the rest: data
QUICK = [(SCHEMES[1], BOTH)]
REST = [(SCHEMES[0], BOTH), (SCHEMES[1], STAGES)]
STAGED = [(SCHEMES[0], STAGES)]


def calibrated(load: Path, data: Path, topology: dict, save: Path | None = None) -> dict:
    """The report of one calibration, without what it was asked."""
    from megatron_mod.calibration.budget import BudgetRequest
    from megatron_mod.calibration.calibrate import calibrate

    request = BudgetRequest(
        str(load), str(data), capacity=0.5, scope="layer", curve=(0.7,), batch_size=3,
        save=save and str(save), **topology,
    )  # fmt: skip
    report = calibrate(request, meet(**topology))
    del report["request"], report["timed_prompts_mean_tokens"]
    return report


def removed(load: Path, data: Path, ranks: Topology) -> list:
    """All places in the order of greedy removal, on so few rows that some ranks get none."""
    from megatron_mod.calibration.routed import load_routed

    model = load_routed(load, ranks, dtype="float32", batch_size=2)
    rows = read_rows(data, model.backend.tokenizer, max_length=64)[:2]
    return Greedy(model.backend, rows, work=model.work).first(len(model.backend.places))


def on_ranks(folder: Path, data: Path, asked: list[tuple[str, dict]]) -> tuple[list, list]:
    """Of each scheme and topology its report, and its order of removal."""
    reports = [
        calibrated(folder / name, data, topology, folder / f"{name}-copy")
        for name, topology in asked
    ]
    return reports, [removed(folder / name, data, meet(**topology)) for name, topology in asked]


@pytest.mark.parametrize(
    "asked",
    [QUICK, *(pytest.param(asked, marks=pytest.mark.slow) for asked in (REST, STAGED))],
    ids=["quick", "rest", "stages"],
)
def test_a_run_is_calibrated_as_its_export_is(tmp_path, asked, single_process):
    hf = tiny.save_tokenizer(
        tiny.save_llama(tmp_path / "hf", vocab_size=tiny.VOCAB, num_key_value_heads=2)
    )
    cases.convert(hf, tmp_path / "base")
    rows = [{"prompt": f"{n}{n * 7} why?" * 3, "completion": f"so {n * n}"} for n in range(12)]
    data = write_lines(tmp_path / "data.jsonl", rows)
    generator = torch.Generator().manual_seed(6)
    base = open_base(tmp_path / "base")
    expected = {}
    for name in SCHEMES:
        weights = {
            layer: {"router.weight": torch.randn(1, 32, generator=generator)} for layer in (0, 1, 3)
        }
        routing = cases.routing_config(
            layers=(0, 1, 3), capacity=(0.5,) * 3, **formula.SCHEMES[name]
        )
        where = {"base": str(base.path), "fingerprint": base.fingerprint()}
        write_step(tmp_path / name, routing, weights, **where)
        megatron_to_hf(tmp_path / name, tmp_path / f"{name}-export")
        expected[name] = in_this_process(
            tmp_path / f"{name}-export", data, None, scope="layer", curve=(0.7,)
        )

    one = Topology(tensor=1, pipeline=1, data=1)
    order = [removed(tmp_path / f"{name}-export", data, one) for name, _ in asked]
    ranks = run_ranks(on_ranks, tmp_path, data, asked, world=4, folder=tmp_path / "ranks")
    for found, orders in ranks:
        assert orders == order
        for report, (name, _) in zip(found, asked, strict=True):
            for point, wanted in (
                (report["chosen"], expected[name]["chosen"]),
                (report["curve"][0], expected[name]["curve"][0]),
                (report["before"], expected[name]["before"]),
            ):
                assert point["thresholds"] == pytest.approx(wanted["thresholds"], abs=1e-4)
                assert point["capacity_per_layer"] == wanted["capacity_per_layer"]
                assert point["static_removed_layers"] == wanted["static_removed_layers"]
                assert point["counted_speedup"] == wanted["counted_speedup"]
                for key in ("perplexity", "static_perplexity"):
                    assert point[key] == pytest.approx(wanted[key], rel=1e-4)
                assert point["prefill_speedup"] is None

    for name, _ in asked:
        copy, wanted = tmp_path / f"{name}-copy", expected[name]["chosen"]["thresholds"]
        assert open_source(copy).routing.threshold == pytest.approx(tuple(wanted), abs=1e-4)
        megatron_to_hf(copy, tmp_path / f"{name}-again")
        config = json.loads((tmp_path / f"{name}-again" / "config.json").read_text())
        assert config["routing"]["threshold"] == pytest.approx(wanted, abs=1e-4)
        with pytest.raises(ValueError, match="--routers-only: the layers' thresholds differ"):
            export_routers(copy, tmp_path / f"{name}-published")
        assert open_source(tmp_path / name).routing.threshold == 0.5, "the original is as it was"


def test_routers_beside_a_base_move_with_their_base(tmp_path, single_process):
    hf = tiny.save_tokenizer(tiny.save_llama(tmp_path / "hf", vocab_size=tiny.VOCAB))
    cases.convert(hf, tmp_path / "base")
    base = open_base(tmp_path / "base")
    weights = {layer: {"router.weight": torch.randn(1, 32)} for layer in (1, 2)}
    where = {"base": "..", "fingerprint": base.fingerprint()}
    write_step(base.path / ROUTERS, cases.routing_config(), weights, **where)
    rows = [{"prompt": f"{n} why?", "completion": f"so {n * n}"} for n in range(12)]
    data = write_lines(tmp_path / "data.jsonl", rows)
    for save in (None, tmp_path / "copy"):
        report = in_this_process(base.path, data, save)
        thresholds = tuple(report["chosen"]["thresholds"])
        assert open_source(save or base.path).routing.threshold == thresholds


def in_this_process(load: Path, data: Path, save: Path | None, **settings) -> dict:
    from megatron_mod.calibration.budget import BudgetRequest
    from megatron_mod.calibration.calibrate import calibrate

    settings = {"curve": (), "save": save and str(save), **settings}
    request = BudgetRequest(str(load), str(data), capacity=0.5, **settings)
    return calibrate(request, Topology(tensor=1, pipeline=1, data=1))


def test_a_perplexity_needs_an_export(tmp_path):
    from megatron_mod.calibration.budget import BudgetRequest

    (tmp_path / "latest").write_text("step_00000001\n")
    data = write_lines(tmp_path / "data.jsonl", [])
    with pytest.raises(ValueError, match="is for exports; give --capacity, or export"):
        BudgetRequest(str(tmp_path), str(data), max_perplexity_increase="1%")
