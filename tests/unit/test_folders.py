"""Output folders and files: complete or absent, of one writer, and never through a link."""

from __future__ import annotations

import errno
import os
import pickle

import pytest

from megatron_mod.checkpoint import folders
from megatron_mod.checkpoint.folders import (
    is_full,
    new_folder,
    only_writer,
    require_room,
    require_writable,
    write_durably,
)


@pytest.fixture
def mine(tmp_path):
    """A folder of the user's, which nothing may touch."""
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "precious.txt").write_text("keep")
    yield folder
    assert [path.name for path in folder.iterdir()] == ["precious.txt"]
    assert (folder / "precious.txt").read_text() == "keep"


def fill(path):
    with new_folder(path) as folder:
        (folder / "file").write_text("whole")


def test_a_link_where_a_folder_is_put_together_is_refused(tmp_path, mine):
    (tmp_path / ".out.incomplete").symlink_to(mine)
    with pytest.raises(ValueError, match=r"\.out\.incomplete: is in the way \(a link"):
        fill(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_link_put_there_after_the_look_is_no_folder(tmp_path, mine, monkeypatch):
    (tmp_path / ".out.incomplete").symlink_to(mine)
    monkeypatch.setattr(folders, "_require_own", lambda partial: None)
    with pytest.raises(ValueError, match="cannot be written"):
        fill(tmp_path / "out")


def test_links_left_inside_are_removed_and_not_followed(tmp_path, mine):
    (tmp_path / ".out.incomplete").mkdir()
    (tmp_path / ".out.incomplete" / "link").symlink_to(mine)
    fill(tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["file"]


def test_a_file_is_not_written_through_a_link(tmp_path, mine):
    (tmp_path / ".latest.new").symlink_to(mine / "precious.txt")
    write_durably(tmp_path / "latest", "text")
    assert (tmp_path / "latest").read_text() == "text"
    (tmp_path / "other").symlink_to(mine / "precious.txt")
    write_durably(tmp_path / "other", "text")
    assert (tmp_path / "other").read_text() == "text"


def test_a_link_to_nothing_is_something_that_exists(tmp_path):
    (tmp_path / "out").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="already exists"):
        fill(tmp_path / "out")


def test_what_cannot_be_made_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "out", tmp_path / "file" / "deeper" / "out"):
        with pytest.raises(ValueError, match=f"{path}: cannot be written: (Not a dir|File exists)"):
            fill(path)
    with pytest.raises(ValueError, match="cannot be written"):
        write_durably(tmp_path / "file" / "latest", "text")
    (tmp_path / ".out.incomplete").write_text("not a folder")
    with pytest.raises(ValueError, match=r"is in the way \(a file"):
        fill(tmp_path / "out")


def test_room_is_asked_for_before_it_is_needed(tmp_path):
    require_room(tmp_path / "not" / "there", 1, what="a model")
    free = folders.free_bytes(tmp_path)
    with pytest.raises(
        ValueError, match=rf"{tmp_path}: a model needs {2 * free} bytes and \d+ are"
    ):
        require_room(tmp_path, 2 * free, what="a model")


class Failures(BaseException):
    """As torch's CheckpointException: what each rank raised, sent between processes."""

    def __init__(self, failures):
        self.failures = failures


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
TEXT = RuntimeError("Io error: No space left on device (os error 28)")  # as safetensors says it


@pytest.mark.parametrize(
    "error", [FULL, TEXT, Failures({3: (pickle.loads(pickle.dumps(FULL)), 0)})]
)
def test_a_full_disk_is_one_message_that_says_so(tmp_path, error):
    assert is_full(error, tmp_path)
    said = pytest.raises(ValueError, match=r"out: could not be written: the disk is full \(\d+ by")
    with said, new_folder(tmp_path / "out"):
        raise error
    assert not list(tmp_path.iterdir())


def test_what_torch_makes_of_a_full_disk_is_known_by_the_disk(tmp_path, monkeypatch):
    error = RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 704 vs 598")
    assert not is_full(error, tmp_path)
    monkeypatch.setattr(folders, "free_bytes", lambda path: 0)
    assert is_full(error, tmp_path)


def test_what_the_system_says_otherwise_is_not_taken_for_a_full_disk(tmp_path, monkeypatch):
    """As on a read-only image, or below /proc, where no byte is free either."""
    monkeypatch.setattr(folders, "free_bytes", lambda path: 0)
    said = pytest.raises(ValueError, match="out: cannot be written: Read-only file system; give an")
    with said, folders.writing(tmp_path / "out"):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))


def test_other_errors_of_the_block_go_through(tmp_path):
    with pytest.raises(FileNotFoundError), new_folder(tmp_path / "out"):
        (tmp_path / "input").read_text()
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_no_half_written_file(tmp_path, monkeypatch):
    write_durably(tmp_path / "latest", "before")

    def refuse(path):
        raise FULL

    monkeypatch.setattr(folders, "_sync", refuse)
    with pytest.raises(ValueError, match="latest: could not be written: the disk is full"):
        write_durably(tmp_path / "latest", "after")
    assert [path.name for path in tmp_path.iterdir()] == ["latest"]
    assert (tmp_path / "latest").read_text() == "before"


def test_a_second_writer_is_refused(tmp_path):
    refused = pytest.raises(ValueError, match="the second: another process is writing")
    with only_writer(tmp_path, what="the first"), refused, only_writer(tmp_path, what="the second"):
        raise AssertionError("two writers")


def test_an_output_that_cannot_be_made_is_refused_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(ValueError, match=f"save = {path}: {tmp_path}/file is no folder"):
            require_writable(path, what="save")
    require_writable(tmp_path / "not" / "there", what="save")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(ValueError, match=f"{tmp_path} cannot be written"):
        require_writable(tmp_path / "run", what="save")
