"""The batch scripts: what they start, on which ranks, and what they refuse."""

from __future__ import annotations

import os

import pytest

from megatron_mod.process import MISTAKE
from tests.helpers import tiny
from tests.helpers.jobs import Job
from tests.helpers.runs import metrics
from tests.helpers.slurm import SCRIPTS, Batch, played, run, sbatch
from tests.slurm.test_survival import routers

TWO_NODES = ("--nodes=2", "--ntasks-per-node=1")
TENSOR = {"parallel__tensor_model_parallel_size": 2}


@pytest.mark.parametrize(
    ("launcher", "per_node", "settings"),
    [
        ("srun", 1, TENSOR),
        ("torchrun", 1, TENSOR),
        ("srun", 2, TENSOR),
        ("torchrun", 2, {"train__micro_batch_size": 1}),
    ],
)
def test_ranks_on_two_nodes_train_as_under_plain_torchrun(
    trainer, tmp_path, launcher, per_node, settings
):
    plain, run_ = tmp_path / "plain", tmp_path / "run"
    job = Batch(
        "pretrain_router.sbatch", *trainer.arguments(run_, **settings), folder=tmp_path,
        options=("--nodes=2", f"--ntasks-per-node={per_node}"), LAUNCHER=launcher,
    )  # fmt: skip
    printed = job.ends()
    assert job.status() == 0, printed
    assert f"{2 * per_node} rank(s) on cpu" in printed
    Job(
        trainer.arguments(plain, **settings), ranks=2 * per_node, log=tmp_path / "plain.log"
    ).finish()
    assert metrics(run_) == metrics(plain)
    assert routers(run_) == routers(plain)


def test_models_are_converted_and_evaluated_in_jobs(tmp_path):
    hf = tiny.save_tokenizer(tiny.save_llama(tmp_path / "hf", vocab_size=tiny.VOCAB))
    (tmp_path / "text.txt").write_text("abcd " * 40)
    jobs = [
        ("convert.sbatch", (), ("--hf-path", hf, "--save", "base")),
        ("evaluate.sbatch", TWO_NODES, ("--load", "base", "--tensor", 2, "--max-length", 64,
         "--perplexity", "text.txt", "--json", "report.json")),
        ("convert.sbatch", (), ("--load", "base", "--save", "back")),
    ]  # fmt: skip
    for script, options, arguments in jobs:
        job = Batch(script, *arguments, folder=tmp_path, options=options)
        printed = job.ends()
        assert job.status() == 0, printed
    assert (tmp_path / "report.json").exists()
    assert (tmp_path / "back" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--nodes=2", "--ntasks-per-node=2", "--cpus-per-task=2"),
         ["0 0 4 2 2", "1 1 4 2 2", "2 0 4 2 2", "3 1 4 2 2"]),
        (("--nodes=2", "--gpus-per-node=2"), ["0 0 4 2 1", "1 1 4 2 1", "2 0 4 2 1", "3 1 4 2 1"]),
        (("--nodes=1", "--ntasks-per-node=2", "--gpus-per-task=1"), ["0 0 2 2 1", "1 1 2 2 1"]),
    ],
)  # fmt: skip
def test_one_rank_a_gpu_or_a_task(tmp_path, options, expected):
    python = played(
        tmp_path / "python",
        "flock lock echo $RANK $LOCAL_RANK $WORLD_SIZE $LOCAL_WORLD_SIZE $OMP_NUM_THREADS >>ranks",
    )
    environment = {"PYTHON": python, "OMP_NUM_THREADS": ""}
    job = Batch("pretrain_router.sbatch", folder=tmp_path, options=options, **environment)
    printed = job.ends()
    assert job.status() == 0, printed
    assert sorted((tmp_path / "ranks").read_text().splitlines()) == expected


def refused(job: Batch, message: str) -> None:
    printed = job.ends()
    assert job.status() == MISTAKE, printed
    said = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert len(said) == 1, printed
    assert "Traceback" not in printed
    assert message in said[0]
    assert job.field("Restarts") == "0"


@pytest.mark.parametrize("launcher", ["srun", "torchrun"])
def test_more_ranks_than_the_allocation_has(trainer, tmp_path, launcher):
    arguments = trainer.arguments(
        tmp_path / "run", **TENSOR, parallel__pipeline_model_parallel_size=2
    )
    job = Batch(
        "pretrain_router.sbatch", *arguments, folder=tmp_path / "job", options=TWO_NODES,
        LAUNCHER=launcher,
    )  # fmt: skip
    refused(job, "= 4 does not divide the 2 ranks started; start a multiple of 4 (sbatch --nodes")
    assert not (tmp_path / "run").exists()
    assert os.listdir(tmp_path / "job") == ["log"]


@pytest.mark.parametrize(
    ("options", "environment", "message"),
    [
        ((), {"LAUNCHER": "mpirun"}, "LAUNCHER = mpirun: must be srun or torchrun"),
        ((), {"VENV": "/no/such"}, "VENV = /no/such: is no virtual environment"),
        ((), {"VENV": "/v", "CONTAINER_IMAGE": "/i"}, "VENV = /v would be ignored in a container"),
        ((), {"CONTAINER_MOUNTS": "/data"}, "CONTAINER_MOUNTS = /data would be ignored without"),
        (("--nodes=2", "--ntasks=3"), {}, "different numbers of tasks (2,1)"),
    ],
)
def test_settings_that_cannot_be_meant(tmp_path, options, environment, message):
    job = Batch("pretrain_router.sbatch", folder=tmp_path, options=options, **environment)
    refused(job, message)
    assert os.listdir(tmp_path) == ["log"]


def test_a_conversion_on_two_nodes(tmp_path):
    refused(Batch("convert.sbatch", folder=tmp_path, options=("--nodes=2",)), "give --nodes 1")


def test_an_unknown_partition(tmp_path):
    script = SCRIPTS / "pretrain_router.sbatch"
    done = sbatch("--partition=nowhere", script, folder=tmp_path)
    assert done.returncode == 1
    assert "invalid partition specified: nowhere" in done.stderr
    assert not os.listdir(tmp_path)


def test_a_folder_that_the_nodes_do_not_share(trainer, tmp_path):
    """The second node has another disk where the first one writes."""
    python = played(
        tmp_path / "python",
        f"""
        [ "${{RANK:-0}}" = 1 ] || exec $real "$@"
        exec unshare --mount --uts bash -c '
            hostname elsewhere; mount -t tmpfs none {tmp_path}/disk; exec "$0" "$@"' $real "$@"
        """,
    )
    (tmp_path / "disk").mkdir()
    job = Batch(
        "pretrain_router.sbatch", *trainer.arguments(tmp_path / "disk" / "runs" / "run"),
        folder=tmp_path / "job", options=TWO_NODES, PYTHON=python,
    )  # fmt: skip
    refused(job, "is not seen on elsewhere (rank 1); give a folder on a file system that all nodes")
    assert not os.listdir(tmp_path / "disk")


def test_a_container_gets_its_image_and_what_it_sees(tmp_path):
    """srun is played: pyxis is not here."""
    (tmp_path / "srun").write_text('#!/bin/bash\nprintf "%s\\n" "$@" >arguments\n')
    (tmp_path / "srun").chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "CONTAINER_IMAGE": "/images/torch.sqsh",
        "CONTAINER_MOUNTS": "/models", "PYTHON": "python3", "SRUN_OPTIONS": "--mpi=none -v",
    }  # fmt: skip
    job = Batch("pretrain_router.sbatch", "--config", "a b", folder=tmp_path, **environment)
    printed = job.ends()
    assert job.status() == 0, printed
    given = (tmp_path / "arguments").read_text().splitlines()
    assert "--container-image=/images/torch.sqsh" in given
    root = SCRIPTS.parents[1]
    assert f"--container-mounts={root}:{root},{tmp_path}:{tmp_path},/models" in given
    assert given[-4:] == ["python3", f"{root}/launch/pretrain_router.py", "--config", "a b"]
    assert {"--mpi=none", "-v"} < set(given)


@pytest.mark.parametrize("script", ["convert", "pretrain_router", "evaluate"])
def test_outside_of_slurm(tmp_path, script):
    outside = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_JOB")}
    done = run("bash", SCRIPTS / f"{script}.sbatch", cwd=tmp_path, env=outside)
    assert done.returncode == MISTAKE
    assert done.stderr.startswith(f"error: {script}.sbatch is a batch job: submit it with: sbatch ")
    assert done.stderr.count("\n") == 1
    assert not done.stdout
    assert not os.listdir(tmp_path)
