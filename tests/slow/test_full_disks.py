"""Disks of ten sizes that are too small, each for one of five writers: one message that names what
could not be written, and with more room the same command comes to the same."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_mod.checkpoint.checksums import file_table
from megatron_mod.conversion import convert
from megatron_mod.data import store
from megatron_mod.training import run_folder
from tests.helpers.faults import SEED, files_with_content, told
from tests.helpers.runs import Trainer, metrics
from tests.helpers.text import write_lines

pytestmark = pytest.mark.usefixtures("single_process")
ENOUGH = 64 * 2**20


class Disk:
    """A file system in memory, of a size that can change."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def mount(self, size: int) -> None:
        self._run("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", self.path)

    def resize(self, size: int) -> None:
        self._run("mount", "-o", f"remount,size={size}", self.path)

    def unmount(self) -> None:
        self._run("umount", self.path)

    def _run(self, *command: object) -> None:
        try:
            subprocess.run([*map(str, command)], check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no file system can be mounted here: {getattr(error, 'stderr', error)}")


@pytest.fixture
def disk(tmp_path) -> Iterator[Disk]:
    (tmp_path / "disk").mkdir()
    disk = Disk(tmp_path / "disk")
    disk.mount(ENOUGH)
    yield disk
    disk.unmount()


@pytest.fixture(scope="module")
def trainer(tmp_path_factory, single_process):
    trainer = Trainer(tmp_path_factory.mktemp("disks"))
    trainer.train(trainer.folder / "run", train__steps=2)
    rows = [{"prompt": "ab" * (1 + n % 7), "completion": f"cd{n}"} for n in range(3000)]
    trainer.much = write_lines(trainer.folder / "much.jsonl", rows)
    return trainer


def files(folder: Path) -> dict:
    return file_table(folder, files_with_content(folder), together=False)


def convert_base(trainer: Trainer, disk: Path, elsewhere: Path) -> object:
    convert.hf_to_megatron(trainer.hf, disk / "base")
    return files(disk / "base")


def export(trainer: Trainer, disk: Path, elsewhere: Path) -> object:
    convert.megatron_to_hf(trainer.folder / "run", disk / "export")
    return files(disk / "export")


def cache(trainer: Trainer, disk: Path, elsewhere: Path) -> object:
    settings = {"data__train": trainer.much, "data__cache": disk / "cache", "train__steps": 2}
    trainer.train(elsewhere / "run", **settings)
    return metrics(elsewhere / "run")


def start(trainer: Trainer, disk: Path, elsewhere: Path) -> object:
    trainer.train(disk / "run", train__steps=2)
    return metrics(disk / "run")


def save(trainer: Trainer, disk: Path, elsewhere: Path) -> object:
    trainer.train(disk / "run", train__steps=20, checkpoint__interval=1, checkpoint__keep=0)
    return metrics(disk / "run")


# What writes, how much it takes at least, and how much more than that is not enough either.
WRITERS = {
    "convert": (convert_base, 2**13, 2**17),
    "export": (export, 2**13, 2**17),
    "cache": (cache, 2**13, 2**16),
    "start": (start, 2**12, 2**18),
    "save": (save, 2**20 + 2**17, 2**17),
}


@pytest.mark.parametrize("asks", [True, False], ids=["asks first", "another job fills it"])
@pytest.mark.parametrize("writer", WRITERS)
def test_a_disk_that_is_too_small(writer, asks, trainer, disk, tmp_path, monkeypatch, capsys):
    write, least, more = WRITERS[writer]
    size = least + int(random.Random(f"{SEED} {writer} {asks}").random() * more)
    (expected := tmp_path / "expected").mkdir()
    whole = write(trainer, expected, expected / "elsewhere")
    disk.resize(size)
    with monkeypatch.context() as context:
        if not asks:
            for module in (convert, store, run_folder):
                context.setattr(module, "require_room", lambda *args, **kwargs: None)
        result, said = told(lambda: write(trainer, disk.path, tmp_path / "elsewhere"), capsys)
    where = f"FAULTS_SEED={SEED}: {size} bytes: {said}"
    assert result is None, where
    assert str(disk.path) in said, where
    assert "the disk is full" in said or "are free on its disk" in said, where
    disk.resize(ENOUGH)
    assert write(trainer, disk.path, tmp_path / "elsewhere") == whole, where
