"""Models trained from scratch, dense ones and mixtures of experts, and what is routed of them with
them: the same at every topology, to rounding."""

from __future__ import annotations

import json

import pytest

from tests.distributed import resume_cases
from tests.helpers import tiny
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import metrics

STEPS = 8
TOPOLOGIES = {
    "parted": {"tensor": 2, "pipeline": 2},
    "data": {"pipeline": 2},  # and data 2
    "experts": {"pipeline": 2, "expert": 2},
}
DENSE = {
    "model_type": "qwen3", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip
MIXTURE = {
    **DENSE, "model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 32, "norm_topk_prob": True, "router_aux_loss_coef": 0.05,
}  # fmt: skip
TOP_K = {
    "router.granularity": "block_token", "router.selection": "top_k", "router.capacity": 0.25
}  # fmt: skip
NOOPS = {"router.granularity": "expert_token", "router.num_noop_experts": 2}
MODELS = {
    "mod": (DENSE, TOP_K, ("parted", "data")),
    "staged": (MIXTURE, TOP_K, ("experts",)),
    "integrated": (MIXTURE, NOOPS, ("experts", "parted")),
}


def arguments(folder, name: str, fields: dict, **changes: object) -> list[str]:
    settings = {
        "model.config": json.dumps(fields), "model.dtype": "float32",
        "router.layers": "{every: 2}",
        "data.train": folder / "text.jsonl", "data.format": "text",
        "data.tokenizer": folder / "tokenizer", "data.max_length": 32,
        "train.trainable": "all", "train.steps": STEPS, "train.global_batch_size": 8,
        "train.micro_batch_size": 2, "optimizer.lr": 0.003, "logging.tensorboard": "false",
        "checkpoint.save": folder / name, **changes,
    }  # fmt: skip
    return [f"--{name}={value}" for name, value in settings.items()]


@pytest.fixture(
    scope="module",
    params=[["mod"], pytest.param(["staged", "integrated"], marks=pytest.mark.slow)],
    ids=["mod", "mixtures"],
)
def runs(request, tmp_path_factory):
    """Folders of a model's runs, with one rank's; by the model's name."""
    root = tmp_path_factory.mktemp("runs")
    tiny.save_tokenizer(root / "tokenizer")
    texts = [f"text {n} {n * n % 97}: " + "abcdefghij"[n % 7 :] * (1 + n % 5) for n in range(96)]
    (root / "text.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    jobs, alone = [], []
    for model in request.param:
        fields, router, topologies = MODELS[model]
        alone.append((None, {}, arguments(root, f"{model} alone", fields, **router)))
        for name in topologies:
            degrees = TOPOLOGIES[name]
            changes = {
                **{f"parallel.{k}_model_parallel_size": n for k, n in degrees.items()},
                "parallel.use_distributed_optimizer": str(name != "parted").lower(),
            }
            asked = arguments(root, f"{model} {name}", fields, **router, **changes)
            jobs.append((None, degrees, asked))
    run_ranks(resume_cases.trainings, jobs, world=4, folder=root / "ranks", seconds=900)
    run_ranks(resume_cases.trainings, alone, world=1, folder=root / "rank", seconds=900)
    return {
        model: (root / f"{model} alone", [root / f"{model} {name}" for name in MODELS[model][2]])
        for model in request.param
    }


def test_the_losses_are_those_of_one_rank(runs):
    for model, (alone, shared) in runs.items():
        wanted = metrics(alone)
        assert wanted[-1]["loss"] < 0.9 * wanted[0]["loss"]
        near = 0.01 if model == "integrated" else 1e-6  # a gate may have two experts alike
        for run in shared:
            for line, one in zip(metrics(run), wanted, strict=True):
                for key in ("loss", "grad_norm", "load_balancing_loss"):
                    assert (key in one) == (key in line), run
                    if key in one:
                        assert line[key] == pytest.approx(one[key], rel=1e-3), (run, key)
                assert line["capacity"] == pytest.approx(one["capacity"], abs=near), run
