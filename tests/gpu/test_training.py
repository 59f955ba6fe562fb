"""Trainings on the device take the steps that they take on the CPU."""

from __future__ import annotations

import pytest

from tests.distributed import resume_cases
from tests.gpu.where import long_on_cpu
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import DEFAULT, EXACT, Trainer, metrics

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("single_process"), long_on_cpu]

NEAR = 2e-3  # relative; after a step Adam makes much of what is near zero
STEPS = {"train__steps": 3, "train__global_batch_size": 8, "checkpoint__interval": 0}
TRAINED = {"train__trainable": "routers+stand_ins", "router__stand_in_rank": 4}
KINDS = {
    "published": {},
    "biases, stand-ins and a price": DEFAULT,
    "what is skipped is not computed": {**DEFAULT, "router__training_compute": "sparse"},
    "blocks of sequences": {**DEFAULT, "router__granularity": "block_sequence"},
    "stand-ins that train": {**DEFAULT, **TRAINED, "router__granularity": "mlp_token"},
    "packed": {**DEFAULT, "data__packing": "true", "router__keys_values": "selected"},
    "distilled": {**DEFAULT, "train__loss": "both"},
    "recomputed": {**DEFAULT, "train__recompute": "full"},
    "exactly k tokens": EXACT,
    "exactly k tokens, drawn to a threshold": {**EXACT, "router__causal": "auxiliary_loss"},
    "from a cache": {
        **DEFAULT, "router__layers": "[2,3]", "router__layers__deepest": None,
        "train__frozen_prefix": "cache",
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def trainer(tmp_path_factory, single_process):
    trainer = Trainer(tmp_path_factory.mktemp("trainer"), num_key_value_heads=2)
    trainer.write_distinct()
    return trainer


@pytest.fixture(scope="module")
def on_cpu(trainer):
    """Of each kind its run in a process that sees no GPU."""
    folder = trainer.folder / "cpu"
    jobs = [(None, {}, trainer.arguments(folder / k, **settings(folder, k))) for k in KINDS]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        run_ranks(resume_cases.trainings, jobs, world=1, folder=folder, seconds=900)
    return folder


def settings(folder, kind: str) -> dict:
    own = {**STEPS, **KINDS[kind]}
    if own.get("train__frozen_prefix") == "cache":
        own["train__prefix_cache"] = folder / "states"
    return own


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_is_the_cpus(trainer, on_cpu, kind):
    run = trainer.folder / "here" / kind
    summary = trainer.train(run, **settings(trainer.folder / "here", kind))
    lines, wanted = metrics(run), metrics(on_cpu / kind)
    assert len(lines) == len(wanted) == 3
    for ours, theirs in zip(lines, wanted, strict=True):
        for name in ("loss", "task_loss", "grad_norm", "capacity", "learning_rate"):
            assert ours[name] == pytest.approx(theirs[name], rel=NEAR, abs=1e-6), (name, ours)
    assert summary["train"]["frozen_parameters_changed"] == 0
