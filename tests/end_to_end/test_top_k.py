"""Training with a number of tokens that is kept exactly, as a user starts it."""

from __future__ import annotations

import json

import pytest

from megatron_mod.config import cli
from tests.helpers.runs import EXACT, Trainer, metrics, saved


@pytest.fixture(scope="module")
def trainer(tmp_path_factory, single_process):
    return Trainer(tmp_path_factory.mktemp("top_k"))


def validated(trainer, **changes) -> dict:
    data = {"data__validation": trainer.text, "train__validation_interval": 3}
    return {**EXACT, **data, **changes}


@pytest.mark.parametrize("granularity", ["block_token", "attn_token", "mlp_token"])
def test_a_run_says_how_both_rules_do(trainer, tmp_path, granularity):
    run = tmp_path / "run"
    trainer.train(run, **validated(trainer, router__granularity=granularity))
    lines = metrics(run)
    steps = [line for line in lines if "loss" in line]
    for line in steps:
        assert line["capacity_mean"] == pytest.approx(0.25, abs=0.06)  # of whole tokens
        assert 0 <= line["causal_agreement"] <= 1
        assert line["causal_loss"] > 0
        assert line["loss"] == line["task_loss"]  # a predictor costs it nothing
    assert steps[-1]["causal_loss"] < steps[0]["causal_loss"]
    (first, last) = [line for line in lines if "validation_loss" in line]
    for line in (first, last):
        assert line["validation_capacity_mean"] == pytest.approx(0.25, abs=0.06)
        assert line["validation_loss_causal"] > 0
        assert 0 < line["causal_agreement"] <= 1


def test_an_auxiliary_loss_is_part_of_the_loss(trainer, tmp_path):
    run = tmp_path / "run"
    causal = {"router__causal": "auxiliary_loss", "router__causal_loss_weight": 0.5}
    trainer.train(run, **EXACT, **causal)
    for line in metrics(run):
        expected = line["task_loss"] + 0.5 * line["causal_loss"]
        assert line["loss"] == pytest.approx(expected, rel=1e-6)


def test_all_tokens_are_kept_at_first_if_asked_for(trainer, tmp_path):
    run = tmp_path / "run"
    trainer.train(run, **{**EXACT, "router__capacity_warmup_fraction": 0.6, "train__steps": 5})
    means = [line["capacity_mean"] for line in metrics(run)]
    assert means[0] == 1.0
    assert means[:4] == sorted(means[:4], reverse=True)
    assert means[3:] == pytest.approx([0.25, 0.25], abs=0.06)


def test_a_bias_starts_where_the_model_was_dense(trainer, tmp_path):
    """With all tokens and scores of nearly one, the first loss is nearly the dense model's."""
    losses = {}
    for name, changes in {
        "dense": {"router__capacity": 1.0, "router__bias": "true"},
        "none": {"router__capacity": 1.0, "router__bias": "false"},
    }.items():
        trainer.train(tmp_path / name, **{**EXACT, **changes, "train__steps": 1})
        losses[name] = metrics(tmp_path / name)[0]["task_loss"]
    trainer.train(
        tmp_path / "threshold", router__granularity="block_token", router__capacity=1.0,
        router__pooling=None, train__steps=1,
    )  # fmt: skip
    dense = metrics(tmp_path / "threshold")[0]["task_loss"]
    assert abs(losses["dense"] - dense) < 0.5 * abs(losses["none"] - dense)


@pytest.mark.parametrize("selection", ["top_k", "random"])
def test_a_run_that_goes_on_is_the_run_in_one_go(trainer, tmp_path, selection):
    changes = {**EXACT, "router__selection": selection, "router__capacity_warmup_fraction": 0.5}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    trainer.train(whole, **changes)
    with pytest.raises(Exception, match="exit_interval"):
        trainer.train(parts, **changes, train__exit_interval=4)
    trainer.train(parts, **changes)
    assert saved(parts) == saved(whole)
    assert metrics(parts) == metrics(whole)


def test_lots_change_with_the_steps(trainer, tmp_path):
    """With a learning rate of nothing, only the lots can change a loss on the same samples."""
    run = tmp_path / "run"
    changes = {**EXACT, "router__selection": "random", "train__global_batch_size": 20}
    trainer.train(run, **{**changes, "optimizer__lr": 1e-30, "train__steps": 2})
    (first, second) = [line["task_loss"] for line in metrics(run)]
    assert first != pytest.approx(second, rel=1e-4)


def test_a_next_training_starts_from_what_was_learnt(trainer, tmp_path):
    trainer.train(tmp_path / "first", **EXACT)
    trainer.train(
        tmp_path / "next", **EXACT, model__routers=tmp_path / "first", train__steps=1,
        optimizer__lr=1e-30,
    )  # fmt: skip
    last = json.loads((tmp_path / "first" / "summary.json").read_text())
    assert last
    first, more = (metrics(tmp_path / name) for name in ("first", "next"))
    assert more[0]["causal_loss"] < first[0]["causal_loss"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"router__granularity": "attn_sequence"}, "router.granularity = attn_sequence"),
        ({"router__granularity": "attn_token+mlp_token"}, "choose one of attn_token, mlp_token"),
        ({"router__work": 0.8, "router__capacity": None}, "router.work = 0.8"),
        ({"router__stand_in": "linear"}, "router.stand_in = linear"),
        ({"router__training_compute": "dense"}, "router.training_compute = dense"),
        ({"router__init": "zeros"}, "router.init = zeros"),
        ({"router__keys_values": "all"}, "router.keys_values = all"),
        ({"router__capacity_loss_weight": 0.1}, "router.capacity_loss_weight = 0.1"),
        ({"router__scope": "layer"}, "router.scope = layer"),
        ({"router__causal_loss_weight": 0.1}, "router.causal_loss_weight = 0.1"),
        ({"router__selection": "random", "router__causal": "predictor"}, "knows no scores"),
        ({"router__selection": "random", "router__threshold": 0.6}, "router.threshold = 0.6"),
        ({"router__selection": "threshold", "router__causal": "predictor"}, "router.causal"),
    ],
)
def test_what_has_no_meaning_is_refused(trainer, tmp_path, changes, message):
    with pytest.raises(ValueError, match="set router.selection to") as refused:
        cli.parse(trainer.arguments(tmp_path / "run", **{**EXACT, **changes}))
    assert message in str(refused.value)
