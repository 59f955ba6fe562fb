"""Going on with a distributed optimizer's state, whatever part of it a rank owns.

Megatron starts every parameter at a multiple of 64 elements and pads their sum to one of 128 before
it deals them out, so that of the tiny model's routers (32 elements) two ranks own one each of two,
two each of four, and the first one alone a single one.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from megatron_mod.checkpoint.distributed import load_tensors
from megatron_mod.checkpoint.manifest import read_manifest
from tests.distributed import resume_cases
from tests.end_to_end.test_resume import spoil
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import Trainer, metrics

STEPS = 4
EVERY = {
    "router__layers__deepest": None, "checkpoint__interval": 1, "checkpoint__keep": 0,
    "train__micro_batch_size": 1, "train__steps": STEPS,
}  # fmt: skip
SEVERAL, LAST, ONE = (
    {"router__layers": layers, **EVERY} for layers in ("[0,1,2,3]", "[2,3]", "[2]")
)
DISTRIBUTED = {"parallel__use_distributed_optimizer": True}


@pytest.fixture(scope="module")
def trainer(tmp_path_factory, single_process):
    return Trainer(tmp_path_factory.mktemp("trainer"))


def job(trainer: Trainer, run: Path, settings: dict, *, after: Path | None = None, **degrees: int):
    """For ``resume_cases.trainings``: a run, in one go or going on from step 1 of another."""
    parallel = {f"parallel__{name}_model_parallel_size": size for name, size in degrees.items()}
    return after, degrees, trainer.arguments(run, **settings, **parallel)


def saved(run: Path, step: int) -> tuple[dict, dict]:
    """Tensors and run state of a step."""
    folder = run / f"step_{step:08d}" / "state"
    return load_tensors(folder), read_manifest(folder.parent)["progress"]


def require_equal(run: Path, whole: Path) -> None:
    """To the last bit, at every step, routers and moments included."""
    assert metrics(run) == metrics(whole)
    for step in range(1, STEPS + 1):
        (tensors, common), (wanted, wanted_common) = saved(run, step), saved(whole, step)
        assert common["optimizer_steps"] == wanted_common["optimizer_steps"] == step
        assert tensors.keys() == wanted.keys()
        assert any(key.startswith("optimizer.state.exp_avg_sq.") for key in tensors)
        assert all(torch.equal(tensors[key], wanted[key]) for key in tensors), step


def require_close(run: Path, whole: Path) -> None:
    """To rounding, and with the number of steps that were taken."""
    for line, wanted in zip(metrics(run), metrics(whole), strict=True):
        for key in ("loss", "task_loss", "grad_norm", "capacity", "learning_rate"):
            assert line[key] == pytest.approx(wanted[key], rel=1e-4), (run, key)
    assert saved(run, STEPS)[1]["optimizer_steps"] == STEPS


@pytest.mark.slow  # the other test of this kind has ranks that own nothing besides
def test_ranks_with_several_routers_go_on_to_the_last_bit(trainer, tmp_path):
    whole, again, plain, alone = (tmp_path / name for name in ("whole", "again", "plain", "alone"))
    jobs = [
        job(trainer, whole, SEVERAL | DISTRIBUTED),
        job(trainer, again, SEVERAL | DISTRIBUTED, after=whole),
        job(trainer, plain, SEVERAL, after=whole),
    ]
    run_ranks(resume_cases.trainings, jobs, world=2, folder=tmp_path / "ranks", seconds=500)
    require_equal(again, whole)
    require_close(plain, whole)
    shutil.copytree(whole, alone)
    for step in range(2, STEPS + 1):
        shutil.rmtree(alone / f"step_{step:08d}")
    trainer.train(alone, **SEVERAL)
    require_close(alone, whole)


@pytest.mark.slow
def test_ranks_that_own_nothing_save_and_go_on(trainer, tmp_path):
    """A pipeline stage without routers, and shards of the data ranks that are padding alone."""
    stage, one = tmp_path / "stage", tmp_path / "one"
    jobs = [
        job(trainer, stage, LAST | DISTRIBUTED, pipeline=2),
        job(trainer, tmp_path / "stage-again", LAST | DISTRIBUTED, after=stage, pipeline=2),
        job(trainer, one, ONE | DISTRIBUTED),
        job(trainer, tmp_path / "one-again", ONE | DISTRIBUTED, after=one),
        job(trainer, tmp_path / "one-stage", ONE | DISTRIBUTED, after=one, pipeline=2),
    ]
    run_ranks(resume_cases.trainings, jobs, world=4, folder=tmp_path / "ranks", seconds=500)
    require_equal(tmp_path / "stage-again", stage)
    require_equal(tmp_path / "one-again", one)
    require_close(tmp_path / "one-stage", one)


@pytest.mark.parametrize("settings", [ONE, ONE | DISTRIBUTED], ids=["plain", "distributed"])
def test_an_optimizer_that_took_no_step_yet_is_saved(trainer, tmp_path, monkeypatch, settings):
    run = tmp_path / "run"
    with monkeypatch.context() as patched:
        spoil(patched, 1, 2)
        trainer.train(run, **settings)
    assert [saved(run, n)[1]["optimizer_steps"] for n in (1, 2, 3, STEPS)] == [0, 0, 1, 2]
    shutil.copytree(run, tmp_path / "again")
    for step in range(3, STEPS + 1):
        shutil.rmtree(tmp_path / "again" / f"step_{step:08d}")
    trainer.train(tmp_path / "again", **settings)
    assert metrics(tmp_path / "again") == metrics(run)
