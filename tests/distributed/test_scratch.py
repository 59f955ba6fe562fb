"""A model trained from scratch, its routers with it: the same at every topology, to rounding."""

from __future__ import annotations

import json

import pytest

from tests.distributed import resume_cases
from tests.helpers import tiny
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import metrics

STEPS = 20
TOPOLOGIES = {
    "parted": {"tensor": 2, "pipeline": 2},
    "data": {"pipeline": 2},  # and data 2
}


def arguments(folder, name: str, **changes: object) -> list[str]:
    fields = {
        "model_type": "qwen3", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    }  # fmt: skip
    settings = {
        "model.config": json.dumps(fields), "model.dtype": "float32",
        "router.granularity": "block_token", "router.layers": "{every: 2}",
        "router.selection": "top_k", "router.capacity": 0.25,
        "data.train": folder / "text.jsonl", "data.format": "text",
        "data.tokenizer": folder / "tokenizer", "data.max_length": 32,
        "train.trainable": "all", "train.steps": STEPS, "train.global_batch_size": 8,
        "train.micro_batch_size": 2, "optimizer.lr": 0.003, "logging.tensorboard": "false",
        "checkpoint.save": folder / name, **changes,
    }  # fmt: skip
    return [f"--{name}={value}" for name, value in settings.items()]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    tiny.save_tokenizer(root / "tokenizer")
    texts = [f"text {n} {n * n % 97}: " + "abcdefghij"[n % 7 :] * (1 + n % 5) for n in range(96)]
    (root / "text.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    jobs = [
        (None, degrees, arguments(root, name, **{
            **{f"parallel.{k}_model_parallel_size": n for k, n in degrees.items()},
            "parallel.use_distributed_optimizer": str(name == "data").lower(),
        }))
        for name, degrees in TOPOLOGIES.items()
    ]  # fmt: skip
    run_ranks(resume_cases.trainings, jobs, world=4, folder=root / "ranks", seconds=900)
    alone = [(None, {}, arguments(root, "alone"))]
    run_ranks(resume_cases.trainings, alone, world=1, folder=root / "rank", seconds=900)
    return root


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_the_losses_are_those_of_one_rank(runs, name):
    wanted = metrics(runs / "alone")
    assert wanted[-1]["loss"] < 0.9 * wanted[0]["loss"]
    for line, one in zip(metrics(runs / name), wanted, strict=True):
        for key in ("loss", "grad_norm"):
            assert line[key] == pytest.approx(one[key], rel=1e-3), (line["step"], key)
        assert line["capacity"] == pytest.approx(one["capacity"], abs=1e-6)
