"""Tokenised data is checked before it is used, and made again where it is damaged."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
from pathlib import Path

import pyarrow as pa
import pytest

from megatron_mod.checkpoint import folders
from megatron_mod.config.schema import DataConfig
from megatron_mod.data import cache, sources
from megatron_mod.data.dataset import Samples, load_data, load_samples
from tests.helpers.runs import Trainer, metrics
from tests.helpers.text import write_lines

RECORDS = [{"prompt": f"What is {n}?", "completion": f"It is {n}."} for n in range(9)]
FILES = ["samples.arrow", "rejects.jsonl", "summary.json", "entry.json"]


@pytest.fixture
def data(tmp_path):
    path = write_lines(tmp_path / "data.jsonl", RECORDS)
    with path.open("a") as lines:
        lines.write('{"texts": "no conversation"}\n')
    return path


@pytest.fixture
def load(tokenizer, tmp_path):
    def call(path, **options):
        settings = {"max_length": 60, "on_bad_record": "skip", "cache": tmp_path / "cache"}
        return load_samples(path, tokenizer, **settings, **options)

    return call


def entries(folder: Path) -> list[Path]:
    return sorted(p.parent for p in folder.glob("*/samples.arrow"))


def flip(path: Path, *, at: float = 0.5) -> None:
    """Change one bit of a file."""
    content = bytearray(path.read_bytes())
    content[int(at * len(content))] ^= 1
    path.write_bytes(content)


def damage(folder: Path, kind: str) -> None:
    name, _, how = kind.partition(" ")
    if how == "gone":
        (folder / name).unlink()
    elif how == "cut":
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])
    elif how == "emptied":
        (folder / name).write_bytes(b"")
    else:
        flip(folder / name, at=float(how))


def held(samples: Samples) -> tuple:
    """All there is in an entry, out of the files."""
    return list(samples), samples.identity, list(samples.parts[0].store.rejects())


@pytest.mark.parametrize(
    "kind",
    [f"{name} {how}" for name in FILES for how in ("0.1", "0.9", "gone", "cut", "emptied")],
)
def test_a_damaged_entry_is_made_again_and_said_so(load, data, tmp_path, caplog, kind):
    wanted = held(load(data))
    (entry,) = entries(tmp_path / "cache")
    contents = {path.name: path.read_bytes() for path in entry.iterdir()}
    damage(entry, kind)
    caplog.clear()
    found = load(data)
    assert held(found) == wanted
    assert f"{entry}: damaged tokenised data, which is made again" in caplog.text
    assert {path.name: path.read_bytes() for path in entry.iterdir()} == contents
    caplog.clear()
    load(data)
    assert "is made again" not in caplog.text


def test_an_entry_of_other_data_under_this_name_is_not_used(load, data, tmp_path):
    wanted = list(load(data))
    (entry,) = entries(tmp_path / "cache")
    load(write_lines(tmp_path / "other.jsonl", RECORDS[:3]))
    (other,) = (path for path in entries(tmp_path / "cache") if path != entry)
    shutil.rmtree(entry)
    shutil.copytree(other, entry)
    assert list(load(data)) == wanted


def test_a_damaged_note_of_a_source_is_none(load, data, tmp_path):
    wanted = load(data)
    (note,) = (tmp_path / "cache" / "digests").iterdir()
    for at in (0.1, 0.5, 0.9):
        flip(note, at=at)
        assert load(data).identity == wanted.identity
    note.write_bytes(b"\xff")
    assert load(data).identity == wanted.identity
    assert len(entries(tmp_path / "cache")) == 1


def test_the_identity_of_data_is_its_content(load, data, tmp_path):
    wanted = load(data).identity
    moved = tmp_path / "moved.jsonl"
    moved.write_text("\n\n" + data.read_text())
    assert load(moved).identity == wanted
    moved.write_text(data.read_text().replace("It is 8.", "It is 9."))
    assert load(moved).identity != wanted
    answer = {"role": "assistant", "content": "It is 0."}
    turns = [{"role": "user", "content": "What is 0?"}, answer]
    kinds = [
        write_lines(tmp_path / "pairs.jsonl", RECORDS[:1]),
        write_lines(tmp_path / "turns.jsonl", [{"messages": turns}]),
    ]
    assert load(kinds[0]).identity == load(kinds[1]).identity


def _load_entry(folder: Path, rank: int) -> None:
    os.environ.update(LOCAL_RANK=str(rank), WORLD_SIZE="3")
    whole = cache.file_table

    def read(*args, **options):
        with (folder / "reads").open("a") as file:
            file.write(str(rank))
        return whole(*args, **options)

    cache.file_table = read
    entry = cache.entry(folder / "cache", {"content": "x"}, _build)
    assert (entry / "made").read_text() == "whole"


def _build(partial: Path) -> None:
    (partial / "made").write_text("whole")


@pytest.mark.parametrize("is_damaged", [False, True])
def test_one_rank_of_a_machine_reads_the_files_for_all(tmp_path, is_damaged):
    (tmp_path / "cache").mkdir()
    entry = cache.entry(tmp_path / "cache", {"content": "x"}, _build)
    if is_damaged:
        flip(entry / "made")
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_load_entry, args=(tmp_path, rank)) for rank in range(3)]
    for process in reversed(processes):
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert (tmp_path / "reads").read_text() == ("000" if is_damaged else "0")


def test_a_run_goes_on_exactly_after_its_cache_was_damaged(
    single_process, tmp_path, monkeypatch, caplog
):
    monkeypatch.setenv("MEGATRON_MOD_CACHE", str(tmp_path / "cache"))
    trainer = Trainer(tmp_path / "trainer")
    trainer.train(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "step_00000006")
    shutil.rmtree(tmp_path / "run" / "step_00000004")
    for path in (tmp_path / "cache").rglob("*"):
        if path.is_file() and path.stat().st_size:
            flip(path, at=0.7)
    trainer.train(tmp_path / "run")
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    assert "damaged tokenised data, which is made again" in caplog.text


class FullDisk:
    """An Arrow stream on a disk with no room left."""

    def __init__(self, *args: object) -> None:
        self.writer = pa.ipc.new_stream(*args)

    def write_batch(self, batch: pa.RecordBatch) -> None:
        raise OSError(errno.ENOSPC, "Error writing bytes to file")

    def close(self) -> None:
        self.writer.close()
        raise OSError(errno.ENOSPC, "Error writing bytes to file")


def test_a_full_disk_is_one_message_and_leaves_nothing(load, data, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("megatron_mod.data.store.new_stream", FullDisk)
        with pytest.raises(ValueError, match="could not be written: the disk is full"):
            load(data)
    left = [p for p in (tmp_path / "cache").iterdir() if p.suffix != ".lock"]
    assert [p.name for p in left] == ["digests"]
    assert len(load(data)) == len(RECORDS)


def test_room_is_asked_for_once_it_is_known_how_much_is_needed(load, tmp_path, monkeypatch):
    path = write_lines(tmp_path / "data.jsonl", RECORDS * 300)
    monkeypatch.setattr(folders, "free_bytes", lambda path: 1000)
    with pytest.raises(ValueError, match=r"half of .*data.jsonl, tokenised, needs \d+ bytes"):
        load(path)
    assert not [p for p in (tmp_path / "cache").iterdir() if p.name.endswith("incomplete")]
    monkeypatch.undo()
    samples = load(path)
    assert len(samples) == 300 * len(RECORDS)


def test_a_source_that_changes_while_it_is_read_is_told(load, data, monkeypatch):
    read = sources.read_json

    def changing(path):
        yield from read(path)
        with path.open("a") as lines:
            lines.write(json.dumps(RECORDS[0]) + "\n")

    monkeypatch.setattr(sources, "read_json", changing)
    with pytest.raises(ValueError, match="has changed while it was read"):
        load(data)


def test_a_folder_that_cannot_be_made_is_named_as_the_caller_does(
    tokenizer, data, tmp_path, monkeypatch
):
    config = DataConfig(
        train=str(data), on_bad_record="skip", max_length=60, cache=str(data / "cache")
    )
    with pytest.raises(ValueError, match=r"^data\.cache = .*: no folder for tokenised data"):
        load_data(config, tokenizer, seed=0)
    monkeypatch.setenv("MEGATRON_MOD_CACHE", str(data))
    with pytest.raises(ValueError, match=r"^\$MEGATRON_MOD_CACHE = .*: no folder for tokenised"):
        load_samples(data, tokenizer, max_length=60)
