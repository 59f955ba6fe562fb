"""Folders that somebody gives us run no code: neither ours, made over, nor those of Megatron-LM."""

from __future__ import annotations

import io
import os
import pickle
import pickletools
import shutil
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

from megatron_mod.checkpoint.distributed import StateReader, load_tensors
from megatron_mod.checkpoint.index import read_index
from megatron_mod.checkpoint.manifest import STATE, read_manifest, write_manifest
from megatron_mod.conversion import convert
from megatron_mod.conversion.source import open_base
from tests.helpers.runs import Trainer, metrics

pytestmark = pytest.mark.usefixtures("single_process")


class Exploit:
    """Leaves a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = str(trace)

    def __reduce__(self):
        return os.mkdir, (self.trace,)


@pytest.fixture
def exploit(tmp_path):
    trace = tmp_path / "code was run"
    yield Exploit(trace)
    assert not trace.exists()


@pytest.fixture(scope="module")
def trainer(tmp_path_factory, single_process):
    return Trainer(tmp_path_factory.mktemp("trainer"))


@pytest.fixture(scope="module")
def whole(trainer, tmp_path_factory):
    run = tmp_path_factory.mktemp("whole") / "run"
    trainer.train(run, train__steps=2)
    return run


@pytest.fixture
def run(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def theirs(trainer, tmp_path):
    """A base as Megatron-LM keeps it."""
    folder = tmp_path / "megatron"
    shutil.copytree(trainer.base / STATE, folder / "iter_0000001")
    (folder / "latest_checkpointed_iteration.txt").write_text("1")
    return folder


def reseal(folder: Path) -> None:
    """Write the manifest that belongs to the files as they are now."""
    values = read_manifest(folder)
    del values["files"]
    write_manifest(folder, values)


def rewrite_index(state: Path, change) -> None:
    index = pickle.loads((state / ".metadata").read_bytes())
    change(index)
    (state / ".metadata").write_bytes(pickle.dumps(index))


def as_object(index: Metadata) -> None:
    """Have the index say that its tensors are pickled objects."""
    for key in index.state_dict_metadata:
        index.state_dict_metadata[key] = BytesStorageMetadata()
    for place in list(index.storage_data):
        index.storage_data[MetadataIndex(place.fqn)] = index.storage_data.pop(place)


def test_what_is_written_holds_tensors_and_plain_data(trainer, run):
    allowed = {"collections OrderedDict", "torch._utils _rebuild_tensor_v2"}
    for state in (trainer.base / "state", run / "step_00000002" / "state"):
        index = read_index(state)
        kinds = {type(entry).__name__ for entry in index.state_dict_metadata.values()}
        assert kinds == {"TensorStorageMetadata"}
        assert torch.load(state / "common.pt", weights_only=True) == {}
        for entry in index.storage_data.values():
            content = (state / entry.relative_path).read_bytes()
            archive = io.BytesIO(content[entry.offset : entry.offset + entry.length])
            reader = torch._C.PyTorchFileReader(archive)
            for opcode, name, _ in pickletools.genops(reader.get_record("data.pkl")):
                if opcode.name == "GLOBAL":
                    assert name in allowed or (name.startswith("torch ") and "Storage" in name)
        names = {path.name for path in state.iterdir()}
        assert {n for n in names if not n.endswith(".distcp")} <= {
            ".metadata", "metadata.json", "common.pt", "content.json"
        }  # fmt: skip


@pytest.mark.parametrize("how", ["resume", "export", "base"])
def test_a_pickle_in_our_folders_is_refused_by_name(trainer, run, exploit, tmp_path, how):
    step, base = run / "step_00000002", tmp_path / "base"
    shutil.copytree(trainer.base, base)
    folder = base if how == "base" else step
    rewrite_index(folder / "state", lambda index: setattr(index, "planner_data", exploit))
    reseal(folder)
    use = {
        "resume": lambda: trainer.train(run, train__steps=3),
        "export": lambda: convert.megatron_to_hf(run, tmp_path / "export"),
        "base": lambda: trainer.train(tmp_path / "new", model__checkpoint=base),
    }
    with pytest.raises(ValueError, match=r"state/\.metadata: holds posix\.mkdir, which could run"):
        use[how]()


def test_an_object_in_the_place_of_a_tensor_is_refused(trainer, run, exploit, tmp_path):
    step = run / "step_00000002"
    data = io.BytesIO()
    torch.save([exploit], data)
    rewrite_index(step / "state", as_object)
    for entry in read_storage(step / "state"):
        entry.offset, entry.length = 0, len(data.getvalue())
        (step / "state" / entry.relative_path).write_bytes(data.getvalue())
    reseal(step)
    for again in (
        lambda: trainer.train(run, train__steps=3),
        lambda: convert.megatron_to_hf(run, tmp_path / "export"),
    ):
        with pytest.raises(ValueError, match="is stored as a pickled object"):
            again()


def read_storage(state: Path) -> list:
    return list(pickle.loads((state / ".metadata").read_bytes()).storage_data.values())


def test_a_tensor_that_is_a_pickle_is_refused(trainer, run, exploit, tmp_path):
    state = run / "step_00000002" / "state"
    data = io.BytesIO()
    torch.save(exploit, data)

    def whole_file(index: Metadata) -> None:
        for entry in index.storage_data.values():
            entry.offset, entry.length = 0, len(data.getvalue())
            (state / entry.relative_path).write_bytes(data.getvalue())

    rewrite_index(state, whole_file)
    reseal(state.parent)
    for again in (
        lambda: trainer.train(run, train__steps=3),
        lambda: convert.megatron_to_hf(run, tmp_path / "export"),
    ):
        with pytest.raises(ValueError, match=rf"{state}/__0_0.distcp: .* names posix\.mkdir"):
            again()


def test_a_damaged_tensor_in_a_folder_without_checksums_is_named(trainer, theirs, tmp_path):
    file = next((theirs / "iter_0000001").glob("__0_*.distcp"))
    file.write_bytes(file.read_bytes()[:-40])
    settings = {"model__checkpoint": theirs, "model__hf_path": trainer.hf}
    with pytest.raises(ValueError, match=rf"{file}: is damaged: .* cannot be read"):
        trainer.train(tmp_path / "new", **settings)


def test_common_state_is_not_read(trainer, whole, run, exploit, theirs, tmp_path):
    torch.save({"args": exploit}, run / "step_00000002" / "state" / "common.pt")
    reseal(run / "step_00000002")
    trainer.train(run, train__steps=3)
    assert metrics(run)[:2] == metrics(whole)
    torch.save({"args": exploit}, theirs / "iter_0000001" / "common.pt")
    settings = {"model__checkpoint": theirs, "model__hf_path": trainer.hf}
    trainer.train(tmp_path / "new", **settings, train__steps=2)
    assert metrics(tmp_path / "new") == metrics(whole)


def test_a_pickle_in_a_folder_of_megatron_lm_is_refused_by_name(trainer, exploit, theirs, tmp_path):
    state = theirs / "iter_0000001"
    rewrite_index(state, lambda index: setattr(index, "mcore_data", {"weight": exploit}))
    settings = {"model__checkpoint": theirs, "model__hf_path": trainer.hf}
    with pytest.raises(ValueError, match=rf"{state}/\.metadata: holds posix\.mkdir"):
        trainer.train(tmp_path / "new", **settings)
    base = open_base(theirs, hf_path=trainer.hf)
    with pytest.raises(ValueError, match=rf"{state}/\.metadata: holds posix\.mkdir"):
        StateReader(base.state)


def test_what_megatron_stores_as_objects_is_left_alone(trainer, theirs, exploit, whole, tmp_path):
    """Its random states and extra states, which nothing here asks for."""
    state = theirs / "iter_0000001"
    data = io.BytesIO()
    torch.save([exploit], data)
    (state / "__1_0.distcp").write_bytes(data.getvalue())

    def add(index: Metadata) -> None:
        key = "rng_state/shard_0.0_1.1"
        index.state_dict_metadata[key] = BytesStorageMetadata()
        entry = next(iter(index.storage_data.values()))
        index.storage_data[MetadataIndex(key)] = type(entry)(
            relative_path="__1_0.distcp", offset=0, length=len(data.getvalue())
        )

    rewrite_index(state, add)
    settings = {"model__checkpoint": theirs, "model__hf_path": trainer.hf}
    trainer.train(tmp_path / "new", **settings, train__steps=2)
    assert metrics(tmp_path / "new") == metrics(whole)


def test_an_index_cannot_change_what_it_names(run, tmp_path):
    """BUILD on a class would set attributes of torch's own."""
    state = run / "step_00000002" / "state"
    metadata = b"ctorch.distributed.checkpoint.metadata\nMetadata\n"
    changes = b"N}X\x04\x00\x00\x00evilK\x01s\x86"  # (None, {"evil": 1})
    (state / ".metadata").write_bytes(b"\x80\x04" + metadata + changes + b"b.")
    with pytest.raises(ValueError, match=r"\.metadata: holds a change of <class"):
        read_index(state)
    assert not hasattr(Metadata, "evil")


@pytest.mark.parametrize("name", ["../../elsewhere.distcp", "/etc/hostname", "inner/x.distcp"])
def test_files_of_other_folders_are_not_read(run, name):
    state = run / "step_00000002" / "state"

    def point(index: Metadata) -> None:
        next(iter(index.storage_data.values())).relative_path = name

    rewrite_index(state, point)
    with pytest.raises(ValueError, match="is not one of its folder"):
        load_tensors(state)


@pytest.mark.parametrize("content", [b"", b"\x80", b"\x80\x04K\x01.", b"garbage\n.", b"\xff" * 40])
def test_a_damaged_index_is_named(run, content):
    state = run / "step_00000002" / "state"
    (state / ".metadata").write_bytes(content)
    with pytest.raises(ValueError, match=r"state/\.metadata: is (damaged|not the index)"):
        load_tensors(state)


def lose(index: Metadata, name: str) -> None:
    entry = next(iter(index.state_dict_metadata.values()))
    del vars(index if hasattr(index, name) else entry)[name]


@pytest.mark.parametrize("name", ["state_dict_metadata", "storage_data", "size", "properties"])
def test_an_index_that_lacks_a_part_is_named(run, name):
    state = run / "step_00000002" / "state"
    rewrite_index(state, lambda index: lose(index, name))
    with pytest.raises(ValueError, match=r"state/\.metadata: is not the index"):
        load_tensors(state)


@pytest.mark.parametrize("content", [b"../../other", b"/etc", b"\xff\xfe", b"", b"1\n2"])
def test_their_newest_iteration_is_a_number(trainer, theirs, content):
    (theirs / "latest_checkpointed_iteration.txt").write_bytes(content)
    with pytest.raises(ValueError, match=r"latest_checkpointed_iteration.txt: holds .* no iter"):
        open_base(theirs, hf_path=trainer.hf)


def test_another_storage_format_is_named(trainer, theirs, tmp_path):
    (theirs / "iter_0000001" / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    settings = {"model__checkpoint": theirs, "model__hf_path": trainer.hf}
    with pytest.raises(ValueError, match="sharded_backend = 'zarr': only torch_dist is read"):
        trainer.train(tmp_path / "new", **settings)
