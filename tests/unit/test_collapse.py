"""Whatever the learning rate, weight or seed: the capacity that was asked for is reached, and no
step on the way there skips everything."""

from __future__ import annotations

import json
import random
from statistics import fmean

import pytest

from megatron_mod.training import step
from tests.helpers.runs import DEFAULT, Trainer, metrics


@pytest.fixture(scope="module")
def trainer(tmp_path_factory, single_process):
    made = Trainer(tmp_path_factory.mktemp("trainer"))
    letters = random.Random(3)
    rows = [
        {
            "prompt": "".join(letters.choices("abcdefgh", k=6 + n % 7)),
            "completion": "".join(letters.choices("stuvwxyz", k=6 + n % 5)),
        }
        for n in range(20)
    ]
    made.text.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return made


def train(trainer, run, **changes) -> tuple[list[float], list[float]]:
    """Mean capacity of each step, and the capacity of each layer in the end, on all samples."""
    settings = {
        **DEFAULT, "router__stand_in_rank": 4, "train__steps": 10, "checkpoint__interval": 0,
        "train__validation_interval": 100, "data__validation": trainer.text, **changes,
    }  # fmt: skip
    trainer.train(run, **settings)
    lines = metrics(run)
    steps = [fmean(line["capacity"]) for line in lines if "capacity" in line]
    return steps, lines[-1]["validation_capacity"]


LAYER = {"router__scope": "layer"}
SEQUENCE = {"router__granularity": "block_sequence"}
ZEROS = {"router__init": "zeros", "router__stand_in": "none", "router__stand_in_rank": None}


CASES = {
    "auto": {"router__capacity_loss_weight": "auto"},
    "heavy": {"router__capacity_loss_weight": 100.0, "train__seed": 2},
    "light_by_layer": {
        "router__capacity_loss_weight": 0.01, **LAYER, "router__granularity": "block_token",
    },
    "distilled": {
        "train__seed": 3, **LAYER, "router__granularity": "mlp_token", "train__loss": "distill",
    },
    "zeros": {"router__threshold": 0.7, **ZEROS},
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "lr"),
    [
        ("auto", 1e-5),
        pytest.param("auto", 1e-3, marks=pytest.mark.slow),
        ("auto", 1e-1),
        pytest.param("heavy", 1e-5, marks=pytest.mark.slow),
        ("heavy", 1e-1),
        ("light_by_layer", 1e-1),
        pytest.param("distilled", 1e-5, marks=pytest.mark.slow),
        pytest.param("zeros", 1e-3, marks=pytest.mark.slow),
        ("zeros", 1e-1),
    ],
)
def test_tokens_end_at_the_capacity_that_is_asked_for(trainer, tmp_path, changes, lr):
    changes = CASES[changes]
    steps, found = train(trainer, tmp_path / "run", optimizer__lr=lr, **changes)
    assert min(steps) > 0.1
    assert fmean(found) == pytest.approx(0.5, abs=0.05)
    if "router__scope" in changes:
        assert found == pytest.approx([0.5, 0.5], abs=0.05)


@pytest.mark.parametrize(
    ("lr", "changes"), [(1e-5, {**SEQUENCE, **LAYER}), (1e-1, SEQUENCE)], ids=["layer", "model"]
)
def test_a_few_sequences_a_step_are_enough(trainer, tmp_path, lr, changes):
    steps, found = train(trainer, tmp_path / "run", optimizer__lr=lr, **changes)
    assert min(steps) > 0
    assert fmean(found) == pytest.approx(0.5, abs=0.15)


@pytest.mark.parametrize(
    "changes",
    [
        {"train__steps": 1},
        {"train__steps": 2},
        {"router__capacity_warmup_fraction": 0.0, "train__steps": 4},
        {"router__capacity": "[0.2,0.8]", "router__scope": "layer"},
        {"router__capacity": 1.0, "train__steps": 3},
    ],
    ids=["one_step", "two_steps", "at_once", "by_layer", "everything"],
)
def test_however_short_the_way_is(trainer, tmp_path, changes):
    steps, found = train(trainer, tmp_path / "run", **changes)
    assert steps[0] == 1.0
    assert min(steps) > 0
    wanted = json.loads(str(changes.get("router__capacity", 0.5)))
    if isinstance(wanted, list):
        assert found == pytest.approx(wanted, abs=0.05)
    else:
        assert fmean(found) == pytest.approx(wanted, abs=0.05)


@pytest.mark.parametrize("lr", [pytest.param(1e-3, marks=pytest.mark.slow), 1e-1])
@pytest.mark.parametrize("changes", [{}, LAYER], ids=["model", "layer"])
def test_every_step_keeps_about_its_target(trainer, tmp_path, changes, lr):
    steps, _ = train(trainer, tmp_path / "run", optimizer__lr=lr, **changes)
    targets = [1 - 0.5 * min(number / 5, 1.0) for number in range(10)]
    assert steps == pytest.approx(targets, abs=0.12)


def test_some_of_a_steps_units_are_enough(trainer, tmp_path, monkeypatch):
    """Of larger batches every n-th unit's inputs are noted, without favour for places in a row."""
    monkeypatch.setattr(step, "NOTED", 30)
    steps, _ = train(trainer, tmp_path / "run", optimizer__lr=1e-1)
    assert fmean(steps[5:]) == pytest.approx(0.5, abs=0.08)
