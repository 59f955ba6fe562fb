"""What a run's folder and a base's go through: damage, exchange, loss, full disks, first starts."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from pathlib import Path

import pytest

from megatron_mod.checkpoint import checksums, folders
from megatron_mod.checkpoint import distributed as state
from megatron_mod.checkpoint.manifest import manifest_text, read_manifest, settings_run
from megatron_mod.config.model_folder import is_megatron
from megatron_mod.conversion import convert
from megatron_mod.conversion.routers import read_step
from megatron_mod.conversion.source import open_base, open_source
from megatron_mod.training import loop, run_folder
from tests.helpers.runs import Trainer, metrics

pytestmark = pytest.mark.usefixtures("single_process")

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture(scope="module")
def trainer(tmp_path_factory, single_process):
    return Trainer(tmp_path_factory.mktemp("trainer"))


@pytest.fixture(scope="module")
def whole(trainer, tmp_path_factory):
    """Six steps, three checkpoints."""
    run = tmp_path_factory.mktemp("whole") / "run"
    trainer.train(run)
    return run


@pytest.fixture(scope="module")
def other(trainer, tmp_path_factory):
    """Another run, of the same settings."""
    run = tmp_path_factory.mktemp("other") / "run"
    trainer.train(run)
    return run


@pytest.fixture
def run(whole, tmp_path):
    """The run after step 4."""
    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "step_00000006")
    return tmp_path / "run"


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def refused(trainer, run: Path, message: str, **settings) -> None:
    """Neither resumed nor exported."""
    with pytest.raises(ValueError, match=message):
        trainer.train(run, **settings)
    with pytest.raises(ValueError, match=message):
        convert.megatron_to_hf(run, run.parent / "export")
    assert not (run.parent / "export").exists()


# What a first start leaves behind.

HALF_WRITTEN = [
    ".config.yaml.new",
    ".environment.json.new",
    ".latest.new",
    ".metrics.jsonl.new",
    ".summary.json.new",
]


@pytest.mark.parametrize("left", [*HALF_WRITTEN, ".step_00000002.incomplete/state/__0_0.distcp"])
def test_a_first_start_that_dies_does_not_block_the_next(trainer, whole, tmp_path, left):
    path = tmp_path / "run" / left
    path.parent.mkdir(parents=True)
    path.write_text("half")
    trainer.train(tmp_path / "run", train__steps=1, optimizer__average_fraction=0)
    assert not list((tmp_path / "run").glob(".*"))


def test_a_full_disk_at_the_first_start_is_said_and_leaves_nothing(trainer, tmp_path, monkeypatch):
    sync = folders._sync

    def refuse(path):
        if path.name == ".config.yaml.new":
            raise FULL
        sync(path)

    with monkeypatch.context() as context:
        context.setattr(folders, "_sync", refuse)
        with pytest.raises(
            ValueError, match=r"config.yaml: could not be written: the disk is full"
        ):
            trainer.train(tmp_path / "run", train__steps=1)
    assert not (tmp_path / "run").exists()
    trainer.train(tmp_path / "run", train__steps=1)


def test_somebody_elses_hidden_file_is_not_taken_for_ours(trainer, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".mine.new").write_text("keep")
    with pytest.raises(ValueError, match="already exists and holds no training run"):
        trainer.train(tmp_path / "run")
    assert (tmp_path / "run" / ".mine.new").read_text() == "keep"


def test_a_run_without_a_checkpoint_binds_its_folder_to_nothing(trainer, tmp_path, monkeypatch):
    with monkeypatch.context() as context:
        context.setattr(loop, "run_schedule", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            trainer.train(tmp_path / "run", optimizer__lr=0.01)
    assert (tmp_path / "run" / "config.yaml").is_file()
    with pytest.raises(ValueError, match="has not saved a checkpoint yet"):
        convert.megatron_to_hf(tmp_path / "run", tmp_path / "export")
    trainer.train(tmp_path / "run", optimizer__lr=0.05, train__steps=2)
    assert "lr: 0.05" in (tmp_path / "run" / "config.yaml").read_text()
    with pytest.raises(ValueError, match=r"optimizer.lr = 0.01: .* was started with 0.05"):
        trainer.train(tmp_path / "run", optimizer__lr=0.01, train__steps=4)


def test_a_finished_run_is_said_to_be_finished(trainer, whole, capsys):
    trainer.train(whole)
    printed = capsys.readouterr().out
    assert f"The run in {whole} is finished: all 6 steps are done" in printed
    assert "Going on" not in printed


# Manifests.


@pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_every_byte_of_a_manifest_counts(trainer, run, every):
    for folder in (run / "step_00000004", trainer.base):
        path, copy = folder / "megatron_mod.json", run.parent / "copy"
        copy.mkdir(exist_ok=True)
        content = path.read_bytes()
        for position in range(0, len(content), every):
            damaged = bytearray(content)
            damaged[position] ^= 1
            (copy / path.name).write_bytes(damaged)
            with pytest.raises(ValueError, match=f"{copy / path.name}: "):
                read_manifest(copy)
        (copy / path.name).write_bytes(content)
        assert read_manifest(copy)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('"averaged": false', '"averaged": true'),
        ('"threshold": 0.5', '"threshold": 0.7'),
        ('"pooling": "all"', '"pooling": "prompt"'),
        ('"xxh3_128": "', '"xxh3_128": "0'),
        ('"step": 4', '"step": 2'),
    ],
)
def test_an_edited_manifest_is_refused_and_blamed(trainer, run, before, after):
    path = run / "step_00000004" / "megatron_mod.json"
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after, 1))
    refused(trainer, run, f"{path}: its content is not what was written")


def test_a_lost_manifest_is_damage(trainer, run):
    (run / "step_00000004" / "megatron_mod.json").unlink()
    refused(trainer, run, r"step_00000004/megatron_mod.json: is missing; the checkpoint is damaged")


def test_a_file_that_cannot_be_read_is_named(trainer, run, monkeypatch):
    def refuse(folder, name, start):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(checksums, "_block_digest", refuse)
    with pytest.raises(ValueError, match=r"state/.*: cannot be read: Input/output error"):
        open_source(run)


def test_checkpoints_of_an_earlier_format_are_refused(trainer, run):
    path = run / "step_00000004" / "megatron_mod.json"
    values = {**json.loads(path.read_text()), "format": 2}
    del values["checksum"]
    path.write_text(json.dumps(values))
    refused(
        trainer, run, f"{path}: format 2 is not 3, the one this release reads; convert or train"
    )


@pytest.mark.parametrize("name", ["../step_00000002/megatron_mod.json", "/etc/hostname"])
def test_a_manifest_lists_files_of_its_folder(trainer, run, name):
    path = run / "step_00000004" / "megatron_mod.json"
    values = read_manifest(path.parent)
    values["files"][name] = {"bytes": 1, "xxh3_128": ""}
    path.write_text(manifest_text(values))
    refused(trainer, run, f"lists {name}, which is not a file of this folder")


# Steps in the wrong place.


def exchange(run: Path) -> None:
    (run / "step_00000002").rename(run / "aside")
    (run / "step_00000004").rename(run / "step_00000002")
    (run / "aside").rename(run / "step_00000004")


def test_steps_that_have_changed_their_names_are_refused(trainer, run):
    exchange(run)
    refused(trainer, run, f"{run}/step_00000004: holds step 2; the folder has another step's name")
    with pytest.raises(ValueError, match="step_00000002: holds step 4"):
        open_source(run / "step_00000002")


@pytest.mark.parametrize("config", ["whole", "damaged", "removed"])
def test_a_step_of_another_run_is_refused(trainer, run, other, config):
    shutil.rmtree(run / "step_00000004")
    shutil.copytree(other / "step_00000004", run / "step_00000004")
    if config == "damaged":
        flip(run / "config.yaml", 100)
    elif config == "removed":
        (run / "config.yaml").unlink()
    message = {
        "whole": f"{run}/step_00000004: was written by another run than the one in {run}",
        "damaged": "config.yaml: is missing or damaged, and the checkpoints .* are of 2 runs",
    }
    refused(trainer, run, message.get(config, message["damaged"]))


def test_a_step_of_another_run_is_passed_over_on_request(trainer, whole, run, other, capsys):
    shutil.rmtree(run / "step_00000004")
    shutil.copytree(other / "step_00000004", run / "step_00000004")
    trainer.train(run, checkpoint__on_corrupt="previous")
    assert "Going on after step 2" in capsys.readouterr().out
    assert metrics(run) == metrics(whole)
    assert (run / "step_00000004.corrupt").is_dir()


def test_a_step_that_was_taken_elsewhere_is_still_one(trainer, whole, tmp_path):
    shutil.copytree(whole / "step_00000004", tmp_path / "best")
    assert open_source(tmp_path / "best").step == tmp_path / "best"


# The settings, and the name of the newest step.


def edit_threshold(path: Path) -> None:
    text = path.read_text()
    assert "threshold: 0.5" in text
    path.write_text(text.replace("threshold: 0.5", "threshold: 0.6"))


DAMAGE = {
    "edited": edit_threshold,
    "not text": lambda path: path.write_bytes(b"\xff\xfe" * 9),
    "empty": lambda path: path.write_bytes(b""),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_settings_are_said_and_bind_nobody(trainer, whole, run, capsys, damage):
    DAMAGE[damage](run / "config.yaml")
    with pytest.raises(ValueError, match=r"router.threshold = 0.6: .* was started with 0.5"):
        trainer.train(run, router__threshold=0.6)
    trainer.train(run)
    assert f"warning: {run}/config.yaml: is not what the run wrote" in capsys.readouterr().out
    assert metrics(run) == metrics(whole)
    assert settings_run(run) == settings_run(whole)


def test_lost_settings_are_written_again(trainer, whole, run):
    (run / "config.yaml").unlink()
    trainer.train(run)
    assert metrics(run) == metrics(whole)
    assert settings_run(run) == settings_run(whole)


@pytest.mark.parametrize(
    "content", [b"\xff\xfe\n", b"../elsewhere\n", b"step_00000002\n", b"", None]
)
def test_whatever_latest_says_the_newest_step_is_the_one_on_disk(trainer, whole, run, content):
    if content is None:
        (run / "latest").unlink()
    else:
        (run / "latest").write_bytes(content)
    assert is_megatron(run)
    assert open_source(run).step == run / "step_00000004"
    trainer.train(run)
    assert metrics(run) == metrics(whole)
    assert (run / "latest").read_text() == "step_00000006\n"


# The log.


def drop_second_line(path: Path) -> None:
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:1] + lines[2:]))


def spoil_second_line(path: Path) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], b"\xff" + lines[1], *lines[2:]]))


def change_a_number(path: Path) -> None:
    path.write_text(path.read_text().replace('"loss": ', '"loss": 1', 1))


LOGS = {
    "torn": (drop_second_line, "is not what the run wrote: a gap of 1 lines up to step 4, of 4", 3),
    "spoilt": (spoil_second_line, "line 2 is no record: a gap of 1 lines up to step 4, of 4", 3),
    "changed": (change_a_number, "is not what the run wrote: changed lines up to step 4", 4),
    "missing": (Path.unlink, "is missing: a gap of 4 lines up to step 4", 0),
    "binary": (lambda path: path.write_bytes(b"\x00\xff\n" * 3), "a gap of 4 lines", 0),
    "a folder": (lambda p: (p.unlink(), p.mkdir()), r"cannot be read \(Is a dir", 0),
}


@pytest.mark.parametrize("damage", LOGS)
def test_a_damaged_log_is_said_and_blocks_nothing(trainer, whole, run, capsys, damage):
    spoil, message, kept = LOGS[damage]
    spoil(run / "metrics.jsonl")
    trainer.train(run)
    printed = capsys.readouterr().out
    assert re.search(rf"warning: {run}/metrics.jsonl: .*{message}", printed), printed
    assert metrics(run)[kept:] == metrics(whole)[4:]
    assert (run / "metrics.jsonl.damaged").exists() == (damage != "missing")
    trainer.train(run, train__steps=8)
    assert "metrics.jsonl" not in capsys.readouterr().out, "said once"


# The base, made again.


def test_the_same_conversion_gives_the_same_fingerprint(trainer, run, whole, tmp_path):
    base = tmp_path / "base"
    convert.hf_to_megatron(trainer.hf, base)
    assert open_base(base).fingerprint() == open_base(trainer.base).fingerprint()
    away = tmp_path / "away"
    trainer.base.rename(away)
    try:
        with pytest.raises(ValueError, match="is not there any more"):
            open_source(run)
        assert open_source(run, base=base).base.path == base
        trainer.train(run, model__checkpoint=base)
    finally:
        away.rename(trainer.base)
    assert metrics(run) == metrics(whole)


def test_another_conversion_gives_another_fingerprint(trainer, tmp_path):
    found = {open_base(trainer.base).fingerprint()}
    convert.hf_to_megatron(trainer.hf, tmp_path / "bfloat16", dtype="bfloat16")
    found.add(open_base(tmp_path / "bfloat16").fingerprint())
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        hf = tmp_path / "hf" / name
        shutil.copytree(trainer.hf, hf)
        if name == "model.safetensors":
            flip(hf / name, -1)
        else:
            (hf / name).write_text((hf / name).read_text() + "\n")
        convert.hf_to_megatron(hf, tmp_path / name)
        found.add(open_base(tmp_path / name).fingerprint())
    assert len(found) == 5


def test_a_base_that_has_lost_its_state_is_no_base(trainer, tmp_path):
    """The fingerprint is of the content, and the content is checked."""
    shutil.copytree(trainer.base, tmp_path / "base")
    for file in (tmp_path / "base" / "state").glob("*.distcp"):
        flip(file, 0)
        with pytest.raises(ValueError, match=f"{file}: its content is not what was written"):
            open_base(tmp_path / "base").fingerprint()
        with pytest.raises(ValueError, match=f"{file}: its content is not what was written"):
            trainer.train(tmp_path / "runs" / "new", model__checkpoint=tmp_path / "base")
        assert not (tmp_path / "runs").exists()
        flip(file, 0)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_config_or_tokenizer_is_blamed_before_it_is_read(trainer, tmp_path, name):
    shutil.copytree(trainer.base, tmp_path / "base")
    path = tmp_path / "base" / "huggingface" / name
    path.write_bytes(path.read_bytes().replace(b":", b";", 1))
    with pytest.raises(ValueError, match=f"{path}: its content is not what was written"):
        trainer.train(tmp_path / "run", model__checkpoint=tmp_path / "base")


def test_the_config_beside_a_base_of_megatron_lm_is_part_of_it(trainer, tmp_path):
    theirs, hf = tmp_path / "megatron" / "iter_0000001", tmp_path / "hf"
    shutil.copytree(trainer.base / "state", theirs)
    shutil.copytree(trainer.hf, hf)
    settings = {"model__checkpoint": theirs, "model__hf_path": hf}
    trainer.train(tmp_path / "run", **settings, train__steps=1)
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    with pytest.raises(ValueError, match="is not the base that the routers"):
        trainer.train(tmp_path / "run", **settings, train__steps=2)


# Full disks.


def test_a_saved_step_is_not_reported_unsaved(trainer, whole, tmp_path, monkeypatch, capsys):
    write = run_folder.write_durably

    def refuse(path, text):
        if path.name == "latest":
            raise ValueError(f"{path}: could not be written: the disk is full")
        write(path, text)

    monkeypatch.setattr(run_folder, "write_durably", refuse)
    trainer.train(tmp_path / "run")
    printed = capsys.readouterr().out
    assert "warning: step_00000006 is saved, but" in printed
    assert "latest: could not be written: the disk is full" in printed
    assert "could not be saved" not in printed
    assert metrics(tmp_path / "run") == metrics(whole)
    source = open_source(tmp_path / "run")
    assert source.step == tmp_path / "run" / "step_00000006"
    assert read_step(source.step, source.routing)


@pytest.fixture
def full_files(monkeypatch):
    """Files that checkpoints are written to take 10,000 bytes and no more."""

    class Full(folders.ChunkedFile):
        def write(self, data) -> int:
            if self.tell() + len(memoryview(data).cast("B")) > 10_000:
                raise FULL
            return super().write(data)

    monkeypatch.setattr(state, "ChunkedFile", Full)


@pytest.mark.usefixtures("full_files")
def test_a_disk_that_fills_while_converting_is_said(trainer, tmp_path):
    with pytest.raises(
        ValueError, match=r"base: could not be written: the disk is full \(\d+ bytes"
    ):
        convert.hf_to_megatron(trainer.hf, tmp_path / "base")
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("full_files")
def test_a_disk_that_fills_while_saving_is_said(trainer, tmp_path):
    with pytest.raises(
        ValueError, match=r"step 2 could not be saved: the disk is full \(\d+ bytes"
    ):
        trainer.train(tmp_path / "run")
    assert not list((tmp_path / "run").glob("*step_*"))


def test_room_for_a_checkpoint_is_looked_for_at_the_start(trainer, tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "free_bytes", lambda path: 100_000)
    monkeypatch.setattr(loop, "run_schedule", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ValueError, match=r"run: a checkpoint needs \d+ bytes and 100000 are free"):
        trainer.train(tmp_path / "run")


def test_a_link_in_the_place_of_a_half_written_step_is_not_followed(trainer, run, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "precious.txt").write_text("keep")
    for name in (".step_00000006.incomplete", ".step_00000004.removed"):
        (run / name).symlink_to(tmp_path / "mine")
    trainer.train(run, checkpoint__keep=1)
    assert (tmp_path / "mine" / "precious.txt").read_text() == "keep"
    assert [path.name for path in run.glob("*step_*")] == ["step_00000006"]
