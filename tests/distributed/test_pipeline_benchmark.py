"""What the benchmark of pipeline cuts runs: the same training at both."""

from __future__ import annotations

import json

import pytest

from megatron_mod.config.pipeline_benchmark import PipelineBenchmark
from tests.distributed import cases
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import Trainer


def test_both_cuts_train_alike(single_process, tmp_path):
    trainer = Trainer(tmp_path / "trainer", num_hidden_layers=6)
    settings = {
        "hf_path": str(trainer.hf), "data": str(trainer.text), "granularity": "block_token",
        "deepest": None, "max_length": 64, "global_batch_size": 6, "micro_batch_size": 2,
        "repeats": 2, "dtype": "float32",
    }  # fmt: skip
    result, other = run_ranks(cases.both_cuts, settings, world=2, folder=tmp_path / "ranks")
    assert other["layers"] == result["layers"]
    assert result["layers"]["even"] == [3, 3]
    first, last = result["layers"]["auto"]
    assert first > 3
    assert first + last == 6
    assert result["loss_max_rel"] < 1e-5
    assert result["speedup_predicted"] > 1
    assert [len(steps) for steps in result["steps"].values()] == [2, 2]
    assert json.loads(json.dumps(result)) == result


def test_it_needs_a_pipeline(single_process, tmp_path):
    trainer = Trainer(tmp_path)
    with pytest.raises(ValueError, match="--pipeline 1: must be at least 2"):
        PipelineBenchmark(hf_path=str(trainer.hf), data=str(trainer.text), pipeline=1)
