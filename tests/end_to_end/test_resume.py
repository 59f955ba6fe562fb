"""Going on with a run, and what is broken on purpose."""

from __future__ import annotations

import errno
import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from megatron_mod.checkpoint.distributed import load_tensors
from megatron_mod.checkpoint.folders import only_writer
from megatron_mod.checkpoint.manifest import manifest_text
from megatron_mod.conversion import convert
from megatron_mod.conversion.routers import KEY, read_step
from megatron_mod.conversion.source import open_source
from megatron_mod.model.trainable import AVERAGE
from megatron_mod.routing.config import RoutingConfig
from megatron_mod.training import loop, run_folder
from megatron_mod.training.checkpoint import RANDOM
from tests.helpers.runs import DEFAULT, Trainer, metrics

pytestmark = pytest.mark.usefixtures("single_process")


@pytest.fixture(scope="module")
def trainer(tmp_path_factory, single_process):
    return Trainer(tmp_path_factory.mktemp("trainer"))


@pytest.fixture(scope="module")
def whole(trainer, tmp_path_factory):
    """Six steps in one go, all checkpoints kept."""
    run = tmp_path_factory.mktemp("whole") / "run"
    trainer.train(run)
    return run


@pytest.fixture
def stopped(whole, tmp_path):
    """The same run as a job killed in the middle of saving step 6 leaves it."""
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    (run / "step_00000006").rename(run / ".step_00000006.incomplete")
    (run / ".step_00000006.incomplete" / "megatron_mod.json").unlink()
    (run / "summary.json").unlink()
    with (run / "metrics.jsonl").open("a") as lines:
        lines.write('{"step": 7, "lo')
    return run


def saved(step: Path) -> tuple[dict, dict]:
    """Tensors and progress of a step folder, without times."""
    progress = json.loads((step / "megatron_mod.json").read_text())["progress"]
    for record in (progress["metrics"]["first"], progress["metrics"]["last"]):
        record.pop("tokens_per_second")
    for name in ("elapsed", "lines_xxh3_128"):
        progress["metrics"].pop(name)
    return load_tensors(step / "state"), progress


def test_a_resumed_run_equals_one_in_one_go(trainer, whole, stopped):
    summary = trainer.train(stopped)
    assert metrics(stopped) == metrics(whole)
    assert [line["step"] for line in metrics(stopped)] == [1, 2, 3, 4, 5, 6]
    assert [line["data_position"] for line in metrics(stopped)] == [4, 8, 12, 16, 20, 24]
    (tensors, common), (wanted, wanted_common) = (
        saved(run / "step_00000006") for run in (stopped, whole)
    )
    assert common == wanted_common
    assert common["controller"]["previous"] != [1.0, 1.0]
    assert tensors.keys() == wanted.keys()
    assert {key.split("decoder.")[0] for key in tensors if not key.startswith(RANDOM)} == {
        "", AVERAGE, "optimizer.state.exp_avg.", "optimizer.state.exp_avg_sq."
    }  # fmt: skip
    assert all(torch.equal(tensors[key], wanted[key]) for key in tensors)
    assert summary["train"]["loss_first"] == metrics(whole)[0]["task_loss"]
    assert not list(stopped.glob(".*"))


def test_the_end_exports_the_average_and_goes_on_from_the_routers(trainer, whole, stopped):
    """The mean of the last steps, from a run that saves each of them."""
    every = stopped.parent / "every"
    trainer.train(every, checkpoint__interval=1, checkpoint__keep=0)
    steps = [load_tensors(every / f"step_0000000{n}" / "state") for n in (2, 3, 4, 5, 6)]
    routing = RoutingConfig.from_dict(json.loads(
        (whole / "step_00000006" / "megatron_mod.json").read_text())["routing"])  # fmt: skip
    exported = read_step(whole / "step_00000006", routing)
    for layer, own in exported.items():
        key, weight = KEY.format(layer, "router.weight"), own["router.weight"]
        mean = torch.stack([step[key].double() for step in steps]).mean(0)
        assert torch.allclose(weight.double(), mean, rtol=1e-5)
        assert not torch.allclose(weight.double(), steps[-1][key].double(), rtol=1e-3)
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["train"]["loss_last"] == metrics(whole)[-1]["task_loss"]
    assert trainer.train(whole)["train"]["loss_last"] == summary["train"]["loss_last"]
    assert len(metrics(whole)) == 6, "a finished run is not run again"


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


DAMAGE = {
    "flipped": (flip, "state/__0_0.distcp", "its checksum differs"),
    "cut": (cut, "state/__0_0.distcp", "bytes instead of"),
    "removed": (Path.unlink, "state/metadata.json", "is missing"),
    "manifest": (cut, "megatron_mod.json", "megatron_mod.json"),
    "empty": (lambda p: p.write_bytes(b""), "megatron_mod.json", "not valid JSON"),
}


@pytest.mark.parametrize("kind", ["flipped", "cut", "removed", "empty"])
def test_a_damaged_file_is_named(trainer, stopped, kind):
    damage, name, message = DAMAGE[kind]
    path = stopped / "step_00000004" / name
    damage(path)
    with pytest.raises(ValueError) as caught:
        trainer.train(stopped)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)
    assert "checkpoint.on_corrupt" in str(caught.value)
    (stopped / "latest").write_text("step_00000004\n")
    with pytest.raises(ValueError, match=message):
        convert.megatron_to_hf(stopped, stopped.parent / "export")


def test_a_damaged_checkpoint_is_passed_over_on_request(trainer, whole, stopped, capsys):
    flip(stopped / "step_00000004" / "state" / "__0_0.distcp")
    trainer.train(stopped, checkpoint__on_corrupt="previous")
    printed = capsys.readouterr().out
    assert "__0_0.distcp" in printed
    assert "Going back to the step before" in printed
    assert "Going on after step 2" in printed
    assert metrics(stopped) == metrics(whole)
    assert (stopped / "step_00000004.corrupt").is_dir()
    assert (stopped / "latest").read_text() == "step_00000006\n"


def test_a_damaged_base_is_refused(trainer, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(trainer.base, base)
    flip(base / "state" / "__0_0.distcp")
    with pytest.raises(ValueError, match="__0_0.distcp: its content is not what was written"):
        trainer.train(tmp_path / "run", model__checkpoint=base)


def test_another_base_is_refused(trainer, stopped, tmp_path):
    hf = tmp_path / "other"
    shutil.copytree(trainer.hf, hf)
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-5}))
    convert.hf_to_megatron(hf, tmp_path / "base")
    with pytest.raises(ValueError, match="is not the base that the routers"):
        trainer.train(stopped, model__checkpoint=tmp_path / "base")
    with pytest.raises(ValueError, match="is not the base that the routers"):
        open_source(stopped / "step_00000004", base=tmp_path / "base")


def test_a_moved_base_is_found_where_it_is_now(trainer, stopped, whole, tmp_path):
    shutil.copytree(trainer.base, tmp_path / "base")
    trainer.train(stopped, model__checkpoint=tmp_path / "base")
    assert metrics(stopped) == metrics(whole)


CHANGED = {
    "optimizer.lr = 0.1": {"optimizer__lr": 0.1},
    "router.threshold = 0.6": {"router__threshold": 0.6},
    "train.steps = 3": {"train__steps": 3},
}


@pytest.mark.parametrize("message", CHANGED)
def test_other_settings_are_refused_by_name(trainer, stopped, message):
    with pytest.raises(ValueError, match=message):
        trainer.train(stopped, **CHANGED[message])
    assert (stopped / "step_00000004").is_dir()


def test_epochs_are_steps_counted_from_the_samples(trainer, whole, stopped, tmp_path, capsys):
    epochs = {"train__steps": None, "train__epochs": 1.2}  # of 20 documents, 4 a step
    trainer.train(stopped, **epochs)
    assert "6 steps of 4 sequences (train.epochs = 1.2)" in capsys.readouterr().out
    assert metrics(stopped) == metrics(whole)
    assert "train.epochs to go on" in (trainer.train(stopped, **epochs), capsys.readouterr().out)[1]
    with pytest.raises(ValueError, match=r"train.epochs = 1 \(5 steps\): .* already made 6 steps"):
        trainer.train(stopped, **{**epochs, "train__epochs": 1})
    weighted = {"data__train": f"{{{trainer.text}: 1.25}}", "train__epochs": 1}
    held_out = {"data__validation_split": 0.1, "train__validation_interval": 9}
    for number, (changes, steps) in enumerate(
        ((weighted, 7), ({"data__max_train_samples": 5}, 2), (held_out, 6))
    ):
        summary = trainer.train(tmp_path / str(number), **{**epochs, **changes})
        assert summary["train"]["steps"] == steps


def test_weights_that_leave_nothing_are_refused(trainer, tmp_path):
    with pytest.raises(ValueError, match="these weights leave none in an epoch"):
        trainer.train(tmp_path / "run", data__train=f"{{{trainer.text}: 0.01}}")


def test_other_text_is_refused(trainer, stopped):
    text = trainer.text.read_text()
    trainer.text.write_text(text.replace("ab", "ba", 1))
    try:
        with pytest.raises(ValueError, match="is not what the run .* was trained on"):
            trainer.train(stopped)
    finally:
        trainer.text.write_text(text)


def test_a_run_on_several_files_goes_on(trainer, tmp_path):
    second = tmp_path / "second.jsonl"
    second.write_text(trainer.text.read_text().replace("ab", "ef"))
    settings = {"data__train": f"[{trainer.text},{second}]", "optimizer__average_fraction": 0}
    trainer.train(tmp_path / "run", **settings, train__steps=2)
    trainer.train(tmp_path / "run", **settings, train__steps=4)
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3, 4]
    second.write_text(second.read_text().replace("ef", "fe", 1))
    with pytest.raises(ValueError, match="is not what the run .* was trained on"):
        trainer.train(tmp_path / "run", **settings, train__steps=6)


def test_a_folder_with_something_else_is_refused(trainer, tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(ValueError, match="already exists and holds no training run"):
        trainer.train(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_second_job_is_refused(trainer, stopped):
    held = only_writer(stopped, what="the first")
    with held, pytest.raises(ValueError, match="another process is writing"):
        trainer.train(stopped)
    assert (stopped / ".step_00000006.incomplete").is_dir(), "the first job's, left alone"


def test_only_the_newest_are_kept(trainer, tmp_path):
    trainer.train(tmp_path / "run", checkpoint__interval=1, checkpoint__keep=2)
    names = sorted(path.name for path in (tmp_path / "run").glob("step_*"))
    assert names == ["step_00000005", "step_00000006"]


@pytest.fixture
def full_disk(monkeypatch):
    """From step 4 on, files can be made, but not filled."""
    publish = run_folder.publish

    def refuse(partial: Path, path: Path) -> None:
        if path.name >= "step_00000004":
            raise OSError(errno.ENOSPC, "No space left on device")
        publish(partial, path)

    monkeypatch.setattr(run_folder, "publish", refuse)


@pytest.mark.usefixtures("full_disk")
def test_a_full_disk_stops_the_run(trainer, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(ValueError, match="step 4 could not be saved: the disk is full"):
        trainer.train(run)
    assert sorted(p.name for p in run.glob("*step_*")) == ["step_00000002"]
    assert (run / "latest").read_text() == "step_00000002\n"


@pytest.mark.usefixtures("full_disk")
def test_a_full_disk_may_be_waited_out(trainer, tmp_path, capsys):
    with pytest.raises(ValueError, match="step 6 could not be saved"):
        trainer.train(tmp_path / "run", checkpoint__on_save_error="continue")
    assert "step 4 could not be saved: the disk is full" in capsys.readouterr().out


def spoil(monkeypatch, *steps: int, gradient: bool = False) -> None:
    """Make the loss, or a router's gradient, of some steps something else than a number."""
    real, taken = loop.run_schedule, iter(range(1, 100))

    def run_schedule(chunk, model, batch, routing, *, controller, **more):
        result = real(chunk, model, batch, routing, controller=controller, **more)
        if controller is not None and next(taken) in steps:
            if gradient:
                next(iter(model.routers().values())).weight.main_grad[0, 3] = math.inf
            else:
                result.loss.fill_(math.nan)
        return result

    monkeypatch.setattr(loop, "run_schedule", run_schedule)


@pytest.mark.parametrize("gradient", [False, True])
def test_a_step_that_is_not_finite_is_skipped_and_counted(
    trainer, whole, tmp_path, monkeypatch, gradient
):
    spoil(monkeypatch, 2, gradient=gradient)
    summary = trainer.train(tmp_path / "run", checkpoint__interval=1, checkpoint__keep=0)
    assert summary["train"]["skipped_steps"] == 1
    lines = metrics(tmp_path / "run")
    assert lines[0] == metrics(whole)[0]
    assert lines[1]["skipped"] == "not finite"
    assert len(lines[1]["samples"]) == 4
    before, after = (
        load_tensors(tmp_path / "run" / f"step_0000000{n}" / "state", keep="decoder")
        for n in (1, 2)
    )
    own = {k for k in before if not k.startswith(AVERAGE)}
    assert all(torch.equal(before[key], after[key]) for key in own)


def test_too_many_in_a_row_stop_the_run_and_name_the_samples(trainer, tmp_path, monkeypatch):
    spoil(monkeypatch, 3, 4, 5)
    with pytest.raises(ValueError) as caught:
        trainer.train(tmp_path / "run", train__max_skipped_steps=2)
    message = str(caught.value)
    assert "step 5: the loss (nan)" in message
    assert message.count("train.jsonl:") == 4
    assert sorted(p.name for p in (tmp_path / "run").glob("step_*")) == [
        "step_00000002", "step_00000004"
    ]  # fmt: skip


def test_training_straight_from_a_hugging_face_folder(trainer, whole, tmp_path):
    trainer.train(tmp_path / "run", model__checkpoint=None, model__hf_path=trainer.hf)
    assert metrics(tmp_path / "run") == metrics(whole)
    convert.megatron_to_hf(tmp_path / "run", tmp_path / "export")
    convert.megatron_to_hf(whole, tmp_path / "wanted")
    found, wanted = (
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("export", "wanted")
    )
    assert found == wanted
    flip(trainer.hf / "model.safetensors")
    try:
        with pytest.raises(ValueError, match="is not the base that the routers"):
            open_source(tmp_path / "run")
    finally:
        flip(trainer.hf / "model.safetensors")


SMALL = {**DEFAULT, "router__stand_in_rank": 4, "optimizer__lr": 0.01}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"train__loss": "distill", "train__trainable": "routers+stand_ins"},
        {"router__granularity": "mlp_sequence", "router__training_compute": "sparse"},
        {
            "router__granularity": "attn_token+mlp_token",
            "router__capacity": None,
            "router__work": [0.8, 0.95],
        },
    ],
    ids=["default", "trained_stand_ins", "sparse_sequences", "range_of_work"],
)
def test_the_default_recipe_goes_on_to_the_last_bit(trainer, tmp_path, monkeypatch, changes):
    whole, run = tmp_path / "whole", tmp_path / "run"
    trainer.train(whole, **SMALL | changes)
    shutil.copytree(whole, run)
    (run / "summary.json").unlink()
    for step in ("step_00000004", "step_00000006"):
        shutil.rmtree(run / step)
    with monkeypatch.context() as patched:
        patched.setattr(loop, "start", lambda *args: 1 / 0)  # nothing is fitted or measured again
        trainer.train(run, **SMALL | changes)
    assert metrics(run) == metrics(whole)
    (tensors, progress), (wanted, wanted_progress) = (
        saved(folder / "step_00000006") for folder in (run, whole)
    )
    assert progress == wanted_progress
    assert progress["controller"]["price"]
    assert tensors.keys() == wanted.keys()
    assert all(torch.equal(tensors[key], wanted[key]) for key in tensors)


def test_a_run_killed_before_its_first_checkpoint_starts_over(trainer, tmp_path, monkeypatch):
    whole, run = tmp_path / "whole", tmp_path / "run"
    trainer.train(whole, **SMALL, train__steps=2)
    with monkeypatch.context() as patched:
        patched.setattr(loop, "run_schedule", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            trainer.train(run, **SMALL, train__steps=2)
    assert not list(run.glob("step_*"))
    trainer.train(run, **SMALL, train__steps=2)
    assert metrics(run) == metrics(whole)


def test_a_run_from_before_goes_on_as_it_was_and_no_other_way(trainer, whole, stopped):
    """Its settings know nothing of biases, stand-ins, losses and parts that train."""
    for step in stopped.glob("step_*"):
        manifest = json.loads((step / "megatron_mod.json").read_text())
        for name in ("bias", "stand_in_rank"):
            del manifest["routing"][name]
        for name in ("bias", "init", "stand_in", "stand_in_rank", "stand_in_tokens"):
            del manifest["settings"]["router"][name]
        for name in ("loss", "trainable"):
            del manifest["settings"]["train"][name]
        del manifest["progress"]["controller"]["price"]
        (step / "megatron_mod.json").write_text(manifest_text(manifest))
    for changes, message in (
        ({"router__bias": "true"}, "router.bias = True: the run in .* was started with False"),
        ({"router__stand_in": "linear"}, "router.stand_in = 'linear': .* was started with 'none'"),
        ({"train__loss": "distill"}, "train.loss = 'distill': .* was started with 'task'"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer.train(stopped, **changes)
    trainer.train(stopped)
    assert metrics(stopped) == metrics(whole)
