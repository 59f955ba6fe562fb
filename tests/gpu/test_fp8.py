"""Products by frozen weights in FP8: near those in bfloat16, of any number of tokens, and again the
same after a resume."""

from __future__ import annotations

import pytest
import torch

from megatron_mod.conversion.restore import restore_model
from megatron_mod.conversion.source import open_source
from megatron_mod.evaluation.parity import FP8_STEP, megatron_logits, prompt_batch
from megatron_mod.model import fp8
from megatron_mod.parallel.topology import ONE_RANK
from tests.gpu.where import only_cuda
from tests.helpers.runs import Trainer, metrics

pytestmark = [pytest.mark.gpu, only_cuda]
ENGINE = "transformer_engine"


@pytest.fixture(autouse=True)
def has_fp8():
    if reason := fp8.why_not(ENGINE):
        pytest.skip(reason)


@pytest.mark.parametrize("granularity", ["attn_token", "mlp_token", "block_token"])
@pytest.mark.parametrize("keys_values", ["all", "selected"])
def test_logits_of_a_run(tmp_path, single_process, granularity, keys_values):
    if granularity == "mlp_token" and keys_values == "selected":
        pytest.skip("an MLP has no keys")
    trainer, run = Trainer(tmp_path), tmp_path / "run"
    trainer.train(
        run,
        model__fp8="hybrid",
        model__dtype="bfloat16",
        router__granularity=granularity,
        router__keys_values=keys_values if granularity != "mlp_token" else None,
        train__steps=2,
    )
    batch = prompt_batch([[5, 6, 7, 8, 9, 10, 11], [13, 14, 15]])
    found = {}
    for name, settings in {
        "as trained": {},
        "hybrid": {"implementation": ENGINE, "fp8": "hybrid"},
        "bfloat16": {"implementation": ENGINE},
    }.items():
        model, _ = restore_model(open_source(run), ONE_RANK, dtype=torch.bfloat16, **settings)
        (logits,) = megatron_logits(model, [batch])
        found[name] = logits.float()[0, :7]
    assert torch.equal(found["as trained"], found["hybrid"])
    assert not torch.equal(found["bfloat16"], found["hybrid"])
    difference = (found["bfloat16"] - found["hybrid"]).norm() / found["bfloat16"].norm()
    assert difference <= FP8_STEP


def test_a_run_that_goes_on_is_the_one_in_one_go(tmp_path, single_process):
    trainer = Trainer(tmp_path)
    settings = {"model__fp8": "hybrid", "model__dtype": "bfloat16", "checkpoint__interval": 2}
    trainer.train(tmp_path / "whole", train__steps=4, **settings)
    for steps in (2, 4):
        trainer.train(tmp_path / "parts", train__steps=steps, **settings)
    whole, parts = (metrics(tmp_path / name) for name in ("whole", "parts"))
    assert [line["loss"] for line in whole] == [line["loss"] for line in parts]
    plain = {**settings, "model__fp8": None}
    trainer.train(tmp_path / "plain", train__steps=4, **plain)
    for ours, theirs in zip(whole, metrics(tmp_path / "plain"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.05)
