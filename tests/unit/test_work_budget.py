"""A budget of work: what it counts, and that a training ends there on text it has not seen."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
import torch

from megatron_mod.calibration.calibrate import calibrate
from megatron_mod.calibration.routed import load_routed
from megatron_mod.calibration.search import Calibration
from megatron_mod.checkpoint.manifest import read_manifest, resolve_step
from megatron_mod.config import cli
from megatron_mod.config.budget import BudgetRequest
from megatron_mod.conversion.convert import megatron_to_hf
from megatron_mod.conversion.routers import write_published
from megatron_mod.conversion.source import open_base
from megatron_mod.evaluation.perplexity import read_rows
from megatron_mod.evaluation.work import Work
from megatron_mod.model.cost import workload
from megatron_mod.parallel.topology import ONE_RANK
from megatron_mod.process import Stopped
from megatron_mod.routing.config import RoutingConfig
from megatron_mod.training import loop
from megatron_mod.training.plan import prepare
from tests.helpers.runs import DEFAULT, Trainer, metrics, saved

LENGTHS = (7, 19, 40)
READ = {"dtype": "float32", "max_length": 64, "batch_size": 20, "pooling": None}


def write(path: Path, *, seed: int, samples: int = 100) -> Path:
    letters = random.Random(seed)
    rows = [
        {
            "prompt": "".join(letters.choices("abcdefgh", k=letters.randint(4, 30))),
            "completion": "".join(letters.choices("stuvwxyz", k=letters.randint(4, 20))),
        }
        for _ in range(samples)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def trainer(tmp_path_factory, single_process):
    made = Trainer(tmp_path_factory.mktemp("trainer"))
    write(made.text, seed=1)
    made.unseen = write(made.folder / "unseen.jsonl", seed=2)
    return made


def settings(**changes) -> dict:
    return {
        **DEFAULT, "router__layers.deepest": None, "router__layers": "all", "router__work": 0.7,
        "router__granularity": "block_token", "router__stand_in_rank": 4, "train__steps": 8,
        "train__global_batch_size": 12, "train__micro_batch_size": 4, "optimizer__lr": 0.01,
        "checkpoint__interval": 0, "optimizer__average_fraction": 0.0, **changes,
    }  # fmt: skip


def counted_work(run: Path, data: Path) -> tuple[float, list[float]]:
    """The share of the dense model's operations on a text, and each place's capacity."""
    model = load_routed(run, ONE_RANK, **READ)
    rows = read_rows(data, model.backend.tokenizer, max_length=64)
    calibration = Calibration(model.backend, rows, model.work, scope="model")
    point = calibration.at(model.backend.thresholds)
    return point.flops / calibration.dense_flops, list(point.capacity)


@pytest.mark.parametrize(
    "changes",
    [
        {
            "router__granularity": "attn_token+mlp_token",
            "router__keys_values": "selected",
            "router__work": 0.6,
        },
        pytest.param(
            {"router__granularity": "block_sequence", "router__training_compute": "sparse"},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["apart", "sequence"],
)
def test_a_budget_is_met_on_text_not_seen(trainer, tmp_path, changes):
    run, wanted = tmp_path / "run", changes.get("router__work", 0.7)
    data = {"data__validation": trainer.unseen, "train__validation_interval": 8}
    summary = trainer.train(run, **settings(**changes, **data))
    work, capacity = counted_work(run, trainer.unseen)
    assert work == pytest.approx(wanted, abs=0.02)
    *steps, validation = metrics(run)
    assert validation["validation_work"] == pytest.approx(work, abs=0.005)
    assert [steps[0]["work_target"], steps[4]["work_target"]] == pytest.approx(
        [1, wanted], abs=0.01
    )
    assert summary["work_target"] == wanted
    assert summary["work_last"] == steps[-1]["work"] == pytest.approx(wanted, abs=0.06)
    assert all(step["capacity_target"] is None for step in steps)
    routing = RoutingConfig.from_dict(read_manifest(resolve_step(run))["routing"])
    assert routing.work == wanted
    assert list(routing.capacity) == pytest.approx(capacity, abs=0.1)
    assert max(routing.capacity) - min(routing.capacity) > 0.3, "the budget is shared unevenly"


def test_one_router_serves_a_range_of_budgets(trainer, tmp_path, monkeypatch):
    """Set on the export without data, and the same in Megatron; gone on from to the last bit."""
    run, export, low, high = tmp_path / "run", tmp_path / "export", 0.6, 0.95
    monkeypatch.setattr(loop, "TOKENS", 1500)
    ranged = settings(router__work=f"[{low}, {high}]", router__keys_values="selected")
    ranged |= {"optimizer__average_fraction": 0.5, "train__steps": 6}
    with pytest.raises(Stopped):
        trainer.train(run, **ranged, train__exit_interval=3)
    capacity = read_manifest(resolve_step(run))["routing"]["capacity"]
    assert capacity == metrics(run)[-1]["capacity"], "as it is found so far"
    trainer.train(run, **ranged)
    trainer.train(tmp_path / "whole", **ranged)
    assert metrics(run) == metrics(tmp_path / "whole")
    found, wanted = saved(run), saved(tmp_path / "whole")
    assert all(found[key] == wanted[key] for key in wanted if not key.startswith("random."))
    assert np.frombuffer(found["decoder.layers.1.router.work_weight"], np.float32).any()
    targets = [step["work_target"] for step in metrics(run)[3:]]
    assert max(targets) - min(targets) > 0.05
    assert all(low <= target <= high for target in targets)
    routing = RoutingConfig.from_dict(read_manifest(resolve_step(run))["routing"])
    assert (routing.work, routing.budget) == ((low, high), low)

    with pytest.raises(
        ValueError, match=r"serve budgets from 0.6 to 0.95; set it to \[0.6, 0.95\]"
    ):
        trainer.train(tmp_path / "other", **{**ranged, "router__work": 0.8}, model__routers=run)
    alone = replace(routing, stand_in_rank=None)
    with pytest.raises(ValueError, match="--routers-only: routers that serve a range of budgets"):
        write_published(tmp_path, alone, {}, {})

    megatron_to_hf(run, export)
    ours, theirs = (load_routed(f, ONE_RANK, **READ) for f in (run, export))
    rows = read_rows(trainer.unseen, theirs.backend.tokenizer, max_length=64)
    perplexities = []
    for work in (low, 0.7, high):  # the first, as it is exported; one between two knots
        theirs.backend.model.set_work(work)
        for router in ours.backend.model.routers().values():
            router.position = routing.position(work)
        points = []
        for model in (ours, theirs):
            calibration = Calibration(model.backend, rows, model.work, scope="model")
            points.append(calibration.at(model.backend.thresholds))
        assert points[0].perplexity == pytest.approx(points[1].perplexity, rel=1e-4)
        assert points[1].flops / calibration.dense_flops == pytest.approx(work, abs=0.03)
        perplexities.append(points[1].perplexity)
    model, labels = theirs.backend.model, sum(row.num_labels for row in rows)
    for work, perplexity in ((low, perplexities[0]), (high, perplexities[-1])):
        model.set_work(work)  # and nothing else is asked for in between
        seen = theirs.backend.observe(rows, thresholds=theirs.backend.thresholds)
        nats = -sum(one.score.log_probability for one in seen)
        assert math.exp(nats / labels) == pytest.approx(perplexity, rel=1e-6)
    with pytest.raises(ValueError, match=r"routing.budget = 0.5: must be from 0.6 to 0.95"):
        model.set_work(0.5)
    model.save_pretrained(tmp_path / "again")
    again = type(model).from_pretrained(tmp_path / "again")
    assert again.config.routing["budget"] == high
    ids = torch.tensor([rows[0].ids])
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    assert again.routing_report()["kept"] == model.routing_report()["kept"]


def test_low_budgets_are_drawn_more_often():
    drawn = [loop.drawn_budget((0.6, 1.0), seed=3, step=step) for step in range(1, 1001)]
    assert drawn[6] == loop.drawn_budget((0.6, 1.0), seed=3, step=7)
    assert 0.6 <= min(drawn) < 0.61
    assert 0.99 < max(drawn) <= 1.0
    assert 450 < sum(work < 0.7 for work in drawn) < 550, "half of them in the lowest quarter"


def test_a_run_is_calibrated_for_any_budget(trainer, tmp_path):
    """One that was trained for something else, on other text."""
    run, data = tmp_path / "run", write(tmp_path / "few.jsonl", seed=3, samples=20)
    untrained = {"router__init": "zeros", "train__steps": 2, "router__capacity_warmup_fraction": 0}
    trainer.train(run, **settings(router__work=None, router__capacity=0.9, **untrained))
    options = {"work": 0.8, "curve": (), "batch_size": 20, "max_length": 64, "samples": 0}
    report = calibrate(BudgetRequest(str(run), str(data), **options), ONE_RANK)
    work, _ = counted_work(run, data)
    assert report["chosen"]["work"] == pytest.approx(work)
    assert 0.78 < work <= 0.8
    assert report["request"]["work"] == 0.8


@pytest.mark.parametrize(
    ("granularity", "keys_values"),
    [
        ("attn_token", "all"),
        ("block_token", "all"),
        ("attn_token+mlp_token", "all"),
        ("block_token", "selected"),
        ("attn_token+mlp_token", "selected"),
        ("mlp_token", None),
        ("attn_sequence", None),
        ("attn_sequence+mlp_sequence", None),
    ],
)
def test_what_is_counted_is_what_evaluation_counts(trainer, granularity, keys_values):
    """Of any decisions; of selected keys as many pairs as if kept tokens lay evenly."""
    routing = RoutingConfig(
        granularity, (0, 2), (0.5, 0.5), keys_values=keys_values, stand_in_rank=3
    )
    places, by_sequence = len(routing.places), routing.scheme.per_sequence
    arch = open_base(trainer.base).arch
    counted, exact = workload(arch, routing, LENGTHS), Work(arch, routing)
    generator, flops = torch.Generator().manual_seed(4), 0
    kept, valid = torch.zeros(2, places, 3, dtype=torch.float64).unbind()
    rates = torch.linspace(0.3, 0.8, places)[:, None]
    for length in LENGTHS:
        made = torch.rand(places, length, generator=generator) < rates
        if by_sequence:
            made = made[:, :1].expand(-1, length)
        flops += exact.prefill(length, dict(zip(routing.places, made, strict=True)))
        seen = torch.arange(1, length + 1)
        for sums, which in ((kept, made), (valid, torch.ones_like(made))):
            units = which[:, :1] if by_sequence else which
            sums += torch.stack([units.sum(1), which.sum(1), (which * seen).sum(1)], 1)
    assert valid[0].tolist() == list(counted.sizes)
    assert counted.dense == sum(exact.prefill(length, {}) for length in LENGTHS)
    share = float(counted.costs.spent(kept, valid).sum() / counted.costs.spent(valid, valid).sum())
    near = 0.01 if keys_values == "selected" else 1e-12
    assert counted.work(share) == pytest.approx(flops / counted.dense, rel=near)
    assert counted.share(counted.work(share)) == pytest.approx(share)
    even = counted.even_capacity(counted.work(share))
    at_even = float(
        counted.costs.spent(valid * even, valid).sum() / counted.costs.spent(valid, valid).sum()
    )
    assert at_even == pytest.approx(share)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"router__capacity": 0.5}, r"router.capacity = 0.5 and router.work = 0.7: both say what"),
        ({"router__work": 1.2}, r"router.work = 1.2: must be above 0 and at most 1"),
        ({"router__work": "[0.9, 0.6]"}, r"router.work = \[0.9, 0.6\]: a list must hold two"),
        ({"router__work": "[0.6]"}, r"router.work = \[0.6\]: a list must hold two budgets"),
        ({"router__scope": "layer"}, "router.scope = layer: has no meaning for router.work = 0.7"),
        (
            {"router__bias": "false", "router__init": "zeros", "router__capacity_loss_weight": 1.0},
            "router.bias = false: nothing but biases holds router.work = 0.7",
        ),
        (
            {"router__capacity_loss_weight": 0.3},
            "router.capacity_loss_weight = 0.3: is a penalty on capacity, and router.work = 0.7",
        ),
    ],
)
def test_what_cannot_hold_a_budget_is_refused(trainer, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        cli.parse(trainer.arguments(tmp_path / "run", **settings(**changes)))


def test_a_budget_that_cannot_be_met_says_what_the_least_is(trainer, tmp_path):

    def refused(**changes) -> str:
        with pytest.raises(ValueError) as caught:
            prepare(cli.parse(trainer.arguments(tmp_path / "run", **settings(**changes))))
        return str(caught.value)

    said = refused(router__work=0.5, router__granularity="attn_token")
    least = float(said.partition(" leaves ")[2].split()[0])
    assert 0.7 < least < 0.9
    assert said.startswith("router.work = 0.5: skipping everything that is routed, attn_token on 4")
    assert "router.keys_values: selected" in said
    plan = prepare(
        cli.parse(
            trainer.arguments(
                tmp_path / "run",
                **settings(router__work=least + 0.001, router__granularity="attn_token"),
            )
        )
    )
    assert fmean(plan.routing.capacity) < 0.02


@pytest.mark.slow
@pytest.mark.parametrize("work", [0.8, "[0.6, 0.95]"])
def test_adapters_train_on_routers_that_hold_a_budget(trainer, tmp_path, work):
    """These stay as they are, at whatever share of the work they leave on the text."""
    routers, run = tmp_path / "routers", tmp_path / "run"
    parts = {"router__granularity": "attn_token+mlp_token", "router__work": work}
    trainer.train(routers, **settings(**parts, train__steps=3))
    adapters = {"train__trainable": "lora", "lora__rank": 2, "model__routers": routers}
    words = trainer.arguments(run, **settings(train__steps=2), **adapters)
    config = cli.parse([word for word in words if not word.startswith("--router.")])
    plan, manifest = prepare(config), read_manifest(resolve_step(routers))
    assert list(plan.routing.capacity) == manifest["routing"]["capacity"]
    loop.train(config, plan)
    before, after = saved(routers), saved(run)
    kept = [key for key in after if ".router." in key and not key.startswith("average.")]
    assert kept
    for key in kept:
        assert after[key] == before.get(f"average.{key}", before[key]), key
    assert any(np.frombuffer(after[key], np.float32).any() for key in after if key.endswith(".b"))
    assert 0 < metrics(run)[-1]["work"] < 1
