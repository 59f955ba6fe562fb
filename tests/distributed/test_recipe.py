"""A whole training as it is by default, stand-ins, importance, borders, price and end included: the
same at every topology to rounding, and gone on from to the last bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_mod.checkpoint.distributed import load_tensors
from megatron_mod.checkpoint.manifest import read_manifest
from tests.distributed import resume_cases
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import DEFAULT, Trainer, metrics

STEPS = 4
TENSOR = {"parallel__tensor_model_parallel_size": 2, "parallel__sequence_parallel": "true"}
PIPELINE = {"parallel__pipeline_model_parallel_size": 2}
CONTEXT = {"parallel__context_parallel_size": 2}
DISTRIBUTED = {"parallel__use_distributed_optimizer": "true"}
TOKENS = {
    "router__granularity": "block_token", "router__keys_values": "selected",
    "router__stand_in_rank": 4, "router__work": "[0.7, 0.9]",
}  # fmt: skip
SEQUENCES = {
    "router__granularity": "block_sequence", "router__pooling": "all", "router__scope": "layer",
    "train__loss": "both", "train__trainable": "routers+stand_ins", "router__stand_in_rank": 4,
    "optimizer__average_fraction": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def trainer(tmp_path_factory, single_process):
    made = Trainer(tmp_path_factory.mktemp("trainer"), tie_word_embeddings=True)
    made.write_distinct()
    return made


def job(trainer: Trainer, run: Path, changes: dict, parallel: dict, *, after: Path | None = None):
    degrees = {
        name: parallel.get(f"parallel__{name}_{kind}_size", 1)
        for name, kind in (
            ("tensor", "model_parallel"), ("pipeline", "model_parallel"), ("context", "parallel")
        )
    }  # fmt: skip
    settings = {
        **DEFAULT, "router__layers": "[2,3]", "router__layers__deepest": None,
        "train__steps": STEPS, "train__global_batch_size": 8, "optimizer__lr": 0.01,
        "checkpoint__interval": 1, "checkpoint__keep": 0, **changes, **parallel,
    }  # fmt: skip
    return after, degrees, trainer.arguments(run, **settings)


def state(run: Path, step: int) -> tuple[dict, dict]:
    folder = run / f"step_{step:08d}"
    return load_tensors(folder / "state"), read_manifest(folder)["progress"]


def weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    """Routers, biases and what the stand-ins make of things, averages included."""
    tensors, found = state(run, step)[0], {}
    for key, tensor in tensors.items():
        if key.startswith(("random.", "optimizer.")):
            continue
        if key.endswith("stand_in.down.weight"):
            name = key.removesuffix("down.weight")
            found[name] = tensors[f"{name}up.weight"] @ tensor
        elif not key.endswith("stand_in.up.weight"):
            found[key] = tensor
    return found


ELSEWHERE = {
    "tokens-pipeline": (TOKENS, PIPELINE),
    "tokens-context": (TOKENS, CONTEXT),
}
MORE = {
    "tokens-tensor": (TOKENS, TENSOR),
    "tokens-data": (TOKENS, DISTRIBUTED),
    "sequences-context": (SEQUENCES, CONTEXT),
}


@pytest.fixture(scope="module")
def runs(trainer, tmp_path_factory):
    """Both kinds at one rank, and each at several topologies; and what goes on from some."""
    root = tmp_path_factory.mktemp("runs")
    jobs = [
        *(job(trainer, root / name, *how) for name, how in ELSEWHERE.items()),
        job(trainer, root / "sequences-data", SEQUENCES, DISTRIBUTED),
        job(
            trainer, root / "sequences-again", SEQUENCES, DISTRIBUTED,
            after=root / "sequences-data",
        ),
        job(
            trainer, root / "sequences-elsewhere", SEQUENCES, TENSOR,
            after=root / "sequences-data",
        ),
    ]  # fmt: skip
    run_ranks(resume_cases.trainings, jobs, world=2, folder=root / "ranks", seconds=900)
    alone = [
        job(trainer, root / "tokens", TOKENS, {}),
        job(trainer, root / "sequences", SEQUENCES, {}),
    ]
    run_ranks(resume_cases.trainings, alone, world=1, folder=root / "rank", seconds=900)
    return root


@pytest.mark.slow
@pytest.mark.parametrize("name", [*ELSEWHERE, "sequences-data", "sequences-elsewhere"])
def test_a_whole_training_is_the_same_elsewhere(runs, name):
    require_same(runs / name, runs / name.partition("-")[0])


@pytest.mark.slow
def test_a_whole_training_is_the_same_at_every_topology(trainer, runs, tmp_path):
    jobs = [job(trainer, tmp_path / name, *how) for name, how in MORE.items()]
    run_ranks(resume_cases.trainings, jobs, world=2, folder=tmp_path / "ranks", seconds=900)
    for name in MORE:
        require_same(tmp_path / name, runs / name.partition("-")[0])


def require_same(run: Path, one: Path) -> None:
    for line, wanted in zip(metrics(run), metrics(one), strict=True):
        for key in ("loss", "task_loss", "grad_norm", "capacity", "work", "learning_rate"):
            assert line[key] == pytest.approx(wanted[key], rel=1e-3, abs=1e-5), (line["step"], key)
    for step in range(1, STEPS + 1):
        found, wanted = weights(run, step), weights(one, step)
        assert found.keys() == wanted.keys()
        for key in wanted:
            size = wanted[key].abs().max()
            assert (found[key] - wanted[key]).abs().max() <= 1e-3 * size + 1e-5, (step, key)
        prices = [state(r, step)[1]["controller"]["price"] for r in (run, one)]
        assert prices[0] == pytest.approx(prices[1], rel=1e-2, abs=1e-4)
        assert prices[1][0]


@pytest.mark.slow
def test_a_run_goes_on_to_the_last_bit(runs):
    whole, again = runs / "sequences-data", runs / "sequences-again"
    assert metrics(again) == metrics(whole)
    for step in range(1, STEPS + 1):
        (tensors, progress), (wanted, wanted_progress) = state(again, step), state(whole, step)
        assert progress["controller"] == wanted_progress["controller"]
        assert tensors.keys() == wanted.keys()
        assert all(torch.equal(tensors[key], wanted[key]) for key in tensors), step


@pytest.mark.slow
def test_what_is_kept_is_kept_once(runs):
    """Fixed stand-ins neither have moments nor an average, nor do they change."""
    first, last = (state(runs / "tokens", step)[0] for step in (1, STEPS))
    fixed = [key for key in last if "stand_in" in key]
    assert sorted(fixed) == sorted(
        f"decoder.layers.{layer}.stand_in.{name}"
        for layer in (2, 3)
        for name in ("down.weight", "up.weight", "up.bias")
    )
    assert all(torch.equal(first[key], last[key]) for key in fixed)
    assert "average.decoder.layers.2.router.bias" in last
    first, last = (state(runs / "sequences", step)[0] for step in (1, STEPS))
    assert not torch.equal(*(t["decoder.layers.2.stand_in.up.weight"] for t in (first, last)))
    assert "optimizer.state.exp_avg.decoder.layers.2.stand_in.up.bias" in last
