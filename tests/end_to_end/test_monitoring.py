"""What a training leaves of itself: records, TensorBoard, Weights & Biases, its starts."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from megatron_mod.checkpoint import folders
from megatron_mod.config import cli
from megatron_mod.monitoring import environment, tensorboard
from megatron_mod.monitoring.json_lines import read_log
from megatron_mod.training import metrics as metrics_module
from tests.helpers.runs import Trainer, metrics

STEPS, LAYERS = 6, (1, 2)


@pytest.fixture(scope="module")
def trainer(tmp_path_factory, single_process):
    return Trainer(tmp_path_factory.mktemp("monitoring"))


@pytest.fixture(scope="module")
def whole(trainer):
    run = trainer.folder / "whole"
    trainer.train(run, logging__timers="true", **VALIDATED)
    return run


@pytest.fixture
def stopped(whole, tmp_path):
    """The same run killed after step 6, in the middle of a record, with step 4 saved last."""
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    shutil.rmtree(run / "step_00000006")
    (run / "summary.json").unlink()
    (event_file,) = (run / "tensorboard").iterdir()
    event_file.write_bytes(event_file.read_bytes()[:-7])
    return run


VALIDATED = {"data__validation_split": 0.2, "train__validation_interval": 3}


def records(run: Path) -> list[dict]:
    return [record for _, record in read_log(run / "metrics.jsonl")[0]]


def points(run: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard itself reads, by tag."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(run / "tensorboard"))
    found.Reload()
    by_tag = defaultdict(list)
    for tag in found.Tags()["scalars"]:
        by_tag[tag] = [(event.step, event.value) for event in found.Scalars(tag)]
    return by_tag


def test_records_say_how_a_step_went(trainer, whole):
    steps = [record for record in records(whole) if "loss" in record]
    assert len(steps) == STEPS
    for record in steps:
        assert record["loss"] == pytest.approx(record["task_loss"] + record["penalty"], rel=1e-6)
        assert 0 <= record["capacity_target"] <= 1
        assert 0 < record["memory_allocated"][0] <= record["memory_peak"][0]
        assert record["share_of_peak"] is None, "no peak of a CPU is known"
        assert {"data", "forward_backward", "forward", "backward", "optimizer"} <= set(
            record["seconds"]
        )
        within = record["seconds"]["forward"] + record["seconds"]["backward"]
        assert 0 < within <= record["seconds"]["forward_backward"]
    assert any(record["penalty"] for record in steps)
    assert "checkpoint" in steps[2]["seconds"], "which step 2 was followed by"
    validations = [record for record in records(whole) if "validation_loss" in record]
    assert [set(record["seconds"]) for record in validations] == [{"validation"}] * 2


@pytest.mark.parametrize("compute", ["dense", "sparse"])
def test_work_is_that_of_the_documents_and_what_they_keep(trainer, tmp_path, compute):
    from megatron_mod.model.cost import training_costs
    from megatron_mod.training.plan import make_loader, prepare

    settings = {
        "train__steps": 4, "logging__interval": 2, "router__training_compute": compute,
        "router__granularity": "attn_token", "router__pooling": None,
    }  # fmt: skip
    trainer.train(tmp_path / "run", **settings)
    config = cli.parse(trainer.arguments(tmp_path / "run", **settings))
    plan = prepare(config)
    loader = make_loader(config, plan, plan.train, data_rank=0)
    found = {record["step"]: record for record in records(tmp_path / "run")}
    assert list(found) == [1, 2, 4]

    def work(step: int, kept: list[float]) -> int:
        batch = loader.step(step - 1)
        lengths = [n for part in batch.micro_batches for row in part.documents for n in row]
        labels = batch.num_labels
        costs = training_costs(plan.base.arch, plan.routing, lengths, labels=labels, kept=kept)
        return sum(costs.layers) + costs.head

    record, before = found[2], found[1]
    seconds = (record["tokens"] - before["tokens"]) / record["tokens_per_second"]
    done = record["tflops_per_second"][0] * 1e12 * seconds
    assert done == pytest.approx(work(2, record["capacity"]), rel=1e-6)
    seconds = (found[4]["tokens"] - record["tokens"]) / found[4]["tokens_per_second"]
    done = found[4]["tflops_per_second"][0] * 1e12 * seconds
    if compute == "dense":
        assert done == pytest.approx(work(3, [1, 1]) + work(4, [1, 1]), rel=1e-6)
    else:
        assert 0 < done < work(3, [1, 1]) + work(4, [1, 1])


def test_a_step_that_is_not_recorded_asks_no_rank_for_anything(trainer, tmp_path, monkeypatch):
    asked = []
    ask = metrics_module.of_every_rank
    monkeypatch.setattr(metrics_module, "of_every_rank", lambda v: asked.append(1) or ask(v))
    trainer.train(tmp_path / "run", logging__interval=3)
    assert len(asked) == len(records(tmp_path / "run")) == 3


def test_tensorboard_has_every_record(whole):
    found, steps = points(whole), [record for record in records(whole) if "loss" in record]
    expected = [(record["step"], pytest.approx(record["loss"])) for record in steps]
    assert found["loss/total"] == expected
    for place, layer in enumerate(LAYERS):
        shares = [(record["step"], pytest.approx(record["capacity"][place])) for record in steps]
        assert found[f"routed_layers/layer_{layer}"] == shares
    assert [step for step, _ in found["loss/validation"]] == [3, 6]
    assert {"optimizer/grad_norm", "performance/tokens_per_second"} <= set(found)


def test_a_run_that_goes_on_has_each_point_once(trainer, whole, stopped):
    trainer.train(stopped, logging__timers="true", **VALIDATED)
    assert metrics(stopped) == metrics(whole)
    found, expected = points(stopped), points(whole)
    assert set(found) == set(expected)
    assert len(list((stopped / "tensorboard").iterdir())) == 2
    for tag in ("loss/total", "loss/validation", "capacity/mean", "routed_layers/layer_2"):
        assert found[tag] == expected[tag]


def test_tensorboard_can_be_off_and_a_finished_run_adds_nothing(trainer, whole, tmp_path):
    trainer.train(tmp_path / "run", logging__tensorboard="false", train__steps=1)
    assert not (tmp_path / "run" / "tensorboard").exists()
    before = sorted(path.name for path in whole.rglob("*"))
    starts = environment.read_starts(whole)
    trainer.train(whole, logging__timers="true", **VALIDATED)
    assert sorted(path.name for path in whole.rglob("*")) == before
    assert environment.read_starts(whole) == starts


@pytest.fixture
def full_for_tensorboard(monkeypatch):
    append = folders.append

    def refuse(path: Path, content: bytes) -> None:
        append(path, content)
        raise ValueError(f"{path}: could not be written: the disk is full.")

    monkeypatch.setattr(tensorboard, "append", refuse)


@pytest.mark.usefixtures("full_for_tensorboard")
def test_what_cannot_be_recorded_is_told(trainer, tmp_path, capsys):
    with pytest.raises(ValueError, match=r"tensorboard.*could not be written: the disk is full"):
        trainer.train(tmp_path / "stop")
    trainer.train(tmp_path / "continue", checkpoint__on_save_error="continue")
    said = capsys.readouterr().out
    assert said.count("is not recorded: ") == STEPS
    assert len(records(tmp_path / "continue")) == STEPS


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in for the library, of what is asked of it."""
    module = ModuleType("wandb")
    module.__spec__ = SimpleNamespace()
    module.starts, module.logged, module.ends, module.breaks_at = [], [], [], None
    module.Settings = lambda **settings: settings

    def log(values: dict, step: int) -> None:
        if step == module.breaks_at:
            raise ConnectionResetError("Connection lost")
        module.logged.append((step, values))

    def init(**settings: object) -> SimpleNamespace:
        module.starts.append(settings)
        return SimpleNamespace(
            log=log, finish=lambda exit_code: module.ends.append(exit_code), offline=True,
            dir=str(Path(settings["dir"], "wandb", "offline-run", "files")), url=None,
        )  # fmt: skip

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_weights_and_biases_goes_on_with_the_same_run(trainer, wandb, tmp_path, capsys):
    run = tmp_path / "run"
    settings = {"logging__wandb": "offline", "logging__wandb_name": "mine"}
    trainer.train(run, **settings, train__steps=2, optimizer__average_fraction=0)
    trainer.train(run, **settings, train__steps=4, optimizer__average_fraction=0)
    first, second = wandb.starts
    assert first["id"] == second["id"]
    assert (first["mode"], first["name"], first["project"]) == ("offline", "mine", "megatron_mod")
    assert first["resume"] == "allow"
    assert [step for step, _ in wandb.logged] == [1, 2, 3, 4]
    assert {"loss/total", "routed_layers/layer_1"} <= set(wandb.logged[0][1])
    assert wandb.ends == [0, 0]
    assert f"`wandb sync {run}/wandb/offline-run` sends it" in capsys.readouterr().out


def test_weights_and_biases_that_breaks_is_told(trainer, wandb, tmp_path, capsys):
    wandb.breaks_at = 3
    with pytest.raises(ValueError, match=r"logging.wandb = true: takes no more .*Connection lost"):
        trainer.train(tmp_path / "stop", logging__wandb="true")
    trainer.train(
        tmp_path / "on", logging__wandb="true", checkpoint__on_save_error="continue"
    )  # fmt: skip
    assert "warning: step 3 is not recorded: logging.wandb" in capsys.readouterr().out
    assert len(records(tmp_path / "on")) == STEPS
    wandb.init = lambda **settings: 1 / 0
    with pytest.raises(ValueError, match=r"does not start \(division by zero\); log in"):
        trainer.train(tmp_path / "none", logging__wandb="online")


@pytest.mark.skipif("wandb" in sys.modules or shutil.which("wandb"), reason="wandb is installed")
def test_weights_and_biases_has_to_be_installed(trainer, tmp_path):
    with pytest.raises(ValueError, match=r"logging.wandb = offline: wandb is not installed; pip"):
        trainer.train(tmp_path / "run", logging__wandb="offline")
    assert not (tmp_path / "run").exists()


def test_what_it_takes_to_repeat_a_run_is_stored(trainer, stopped, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "417")
    monkeypatch.setenv("HF_TOKEN", "a secret")
    monkeypatch.setenv("SLURM_JWT", "another secret")
    trainer.train(stopped, logging__timers="true", train__timeout=3, **VALIDATED)
    text = (stopped / environment.FILE).read_text()
    first, second = json.loads(text)
    assert (first["after_step"], second["after_step"]) == (0, 4)
    assert second["configuration"]["train"]["timeout"] == 3
    assert second["versions"]["megatron-core"] is not None
    assert second["ranks"][0]["host"] == os.uname().nodename
    assert second["command"].startswith(sys.executable)
    assert second["slurm"] == {"SLURM_JOB_ID": "417"}
    assert "secret" not in text
    from megatron_mod.report.page import render
    from megatron_mod.report.run import read_run

    page = render(read_run(stopped), None, defaultdict(str))
    assert "job 417" in page
    assert f"torch {second['versions']['torch']}" in page


def test_a_commit_is_of_the_code_that_runs(tmp_path):
    assert environment.git(tmp_path) is None
    run = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*run, "init", "-q"], check=True)
    (tmp_path / "file").write_text("1")
    subprocess.run([*run, "add", "."], check=True)
    subprocess.run([*run, "commit", "-qm", "one"], check=True)
    found = environment.git(tmp_path)
    assert len(found["commit"]) == 40
    assert found["clean"]
    (tmp_path / "file").write_text("2")
    assert environment.git(tmp_path) == {**found, "clean": False}
    (tmp_path / "inner").mkdir()
    assert environment.git(tmp_path / "inner") is None, "a folder that somebody's repository holds"
