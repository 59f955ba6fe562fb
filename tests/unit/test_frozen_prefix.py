"""What enters the first routed layer is computed once, kept, checked and trained from."""

from __future__ import annotations

import errno
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock

from megatron_mod.checkpoint import folders
from megatron_mod.checkpoint.distributed import load_tensors
from megatron_mod.config import cli
from megatron_mod.conversion.hf_reader import HFReader
from megatron_mod.data import prefix_states
from megatron_mod.data.batch import blank_like, collate, equal_lengths
from megatron_mod.data.chat import Sample
from megatron_mod.data.order import Order
from megatron_mod.data.prefix_states import StatesEntry
from megatron_mod.model.layout import undo_zigzag, zigzag
from megatron_mod.training import frozen_prefix
from megatron_mod.training.prefix_filling import like_lengths
from tests.distributed.prefix_cases import with_gradients
from tests.helpers.runs import DEFAULT, Trainer, metrics

ROUTED = {
    **DEFAULT, "router__layers": "[2,3]", "router__layers__deepest": None,
    "router__stand_in_rank": 4, "train__steps": 3,
}  # fmt: skip
EXACT, LATER = 1e-5, 2e-3  # relative differences
COMPUTED = r"computed once: (\d+) samples \((\d+) tokens"


@pytest.fixture(scope="module")
def trainer(tmp_path_factory, single_process):
    made = Trainer(tmp_path_factory.mktemp("trainer"))
    made.write_distinct()
    return made


@pytest.fixture(scope="module")
def kept(trainer, tmp_path_factory):
    """A run that kept its states, and their folder."""
    root = tmp_path_factory.mktemp("kept")
    trainer.train(root / "run", **cached(root / "states"))
    return root / "run", root / "states"


def cached(states: Path, **changes: object) -> dict:
    return {**ROUTED, "train__frozen_prefix": "cache", "train__prefix_cache": states, **changes}


def entry_of(states: Path) -> Path:
    (entry,) = (path for path in states.iterdir() if path.is_dir())
    return entry


def assert_alike(run: Path, other: Path) -> None:
    """Exact in the first step, from which on Adam makes much of what is near zero."""
    for line, wanted in zip(metrics(run), metrics(other), strict=True):
        assert line.keys() == wanted.keys()
        rel = EXACT if wanted["step"] == 1 else LATER
        for key in wanted:
            if wanted[key] is None:
                assert line[key] is None, key
                continue
            assert line[key] == pytest.approx(wanted[key], rel=rel, abs=1e-7), (wanted["step"], key)


def files(folder: Path) -> dict:
    return {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()}


def copy(states: Path, to: Path) -> Path:
    entry = to / entry_of(states).name
    entry.mkdir(parents=True)
    for path in entry_of(states).iterdir():
        (entry / path.name).write_bytes(path.read_bytes())
    return to


def test_a_second_run_reads_and_computes_nothing_and_is_the_same_to_the_last_bit(
    trainer, kept, tmp_path, monkeypatch
):
    run, states = kept
    before = files(states)
    monkeypatch.setattr(frozen_prefix, "fill", None)
    trainer.train(tmp_path / "run", **cached(states))
    assert metrics(tmp_path / "run") == metrics(run)
    found, wanted = (load_tensors(r / "step_00000003" / "state") for r in (tmp_path / "run", run))
    assert found.keys() == wanted.keys()
    different = {key for key in wanted if not torch.equal(found[key], wanted[key])}
    assert different <= {"random.torch"}, "which goes on from one run of a process to the next"
    assert files(states) == before, "a cache that may not be written will do"


@pytest.mark.parametrize(
    "changes",
    [
        {"data__packing": "true", "train__loss": "both"},
        {
            "router__granularity": "block_sequence", "train__loss": "distill",
            "router__capacity_loss_weight": 0.3, "router__capacity_warmup_fraction": 0,
        },
        {"router__granularity": "mlp_token", "router__training_compute": "sparse"},
        {"data__validation_split": 0.3, "train__validation_interval": 2},
    ],
    ids=["packed", "sequences", "sparse", "validation"],
)  # fmt: skip
def test_it_trains_what_recomputing_trains(trainer, kept, tmp_path, changes):
    """Loss, gradients, validation and the routers at the end, from the states of another run."""
    _, states = kept
    gradients = []
    for name, settings in (("recompute", ROUTED), ("cache", cached(states))):
        arguments = trainer.arguments(tmp_path / name, **{**settings, **changes})
        gradients.append(with_gradients(cli.parse(arguments)))
    assert_alike(tmp_path / "cache", tmp_path / "recompute")
    for step, (exact, found) in enumerate(zip(*gradients, strict=True)):
        assert found.keys() == exact.keys()
        for key, gradient in exact.items():
            size, difference = gradient.abs().max(), (found[key] - gradient).abs().max()
            assert difference <= (LATER if step else EXACT) * size + 1e-8, (step, key)
    ends = [load_tensors(tmp_path / n / "step_00000003" / "state") for n in ("cache", "recompute")]
    for key in (key for key in ends[1] if "router" in key or "stand_in" in key):
        if "optimizer" not in key:
            torch.testing.assert_close(ends[0][key], ends[1][key], rtol=1e-3, atol=1e-4)


def test_nothing_is_loaded_below_the_first_routed_layer(trainer, kept, tmp_path, monkeypatch):
    asked = set()
    rows = HFReader.rows

    def noting(self, name, *args):
        asked.add(name)
        return rows(self, name, *args)

    monkeypatch.setattr(HFReader, "rows", noting)
    hf = {"model__checkpoint": None, "model__hf_path": trainer.hf}
    trainer.train(tmp_path / "run", **cached(tmp_path / "states", **hf))
    below = {n for n in asked if re.search(r"layers\.[01]\.|embed_tokens", n)}
    assert len(below) == 1 + 2 * 9
    asked.clear()
    trainer.train(tmp_path / "again", **cached(tmp_path / "states", **hf))
    assert asked
    assert not asked & below


def test_filling_goes_on_after_a_kill_with_the_same_numbers(
    trainer, kept, tmp_path, monkeypatch, capfd
):
    run, states = kept
    put, written = prefix_states._put, []

    def killed(file, offset, content):
        if len(written) == 13:  # six samples, and the states of a seventh without a checksum
            raise KeyboardInterrupt
        written.append(offset)
        put(file, offset, content)

    with monkeypatch.context() as patch:
        patch.setattr(prefix_states, "_put", killed)
        with pytest.raises(KeyboardInterrupt):
            trainer.train(tmp_path / "run", **cached(tmp_path / "states"))
    capfd.readouterr()
    trainer.train(tmp_path / "run", **cached(tmp_path / "states"))
    said = capfd.readouterr().out
    assert re.search(COMPUTED, said)[1] == "18"
    assert "not what was written" not in said
    for name in ("states", "checksums"):
        found, wanted = (entry_of(s) / name for s in (tmp_path / "states", states))
        assert found.read_bytes() == wanted.read_bytes()
    assert metrics(tmp_path / "run") == metrics(run)


@pytest.mark.parametrize("name", ["states", "checksums"])
def test_a_flipped_byte_is_found_and_that_sample_computed_anew(
    trainer, kept, tmp_path, capfd, name
):
    run, states = kept
    states = copy(states, tmp_path / "states")
    path = entry_of(states) / name
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    capfd.readouterr()
    trainer.train(tmp_path / "run", **cached(states))
    said = capfd.readouterr().out
    assert said.count("not what was written (checksum); they are computed anew") == 1
    assert "of 1 sample(s), the first of them" in said
    assert re.search(COMPUTED, said)[1] == "1"
    assert path.read_bytes() == whole
    assert metrics(tmp_path / "run") == metrics(run)


@pytest.mark.parametrize("name", ["states", "checksums", "entry.json"])
@pytest.mark.parametrize("how", ["cut", "gone"])
def test_a_lost_file_is_made_again(trainer, kept, tmp_path, name, how):
    run, states = kept
    states = copy(states, tmp_path / "states")
    path = entry_of(states) / name
    whole = path.read_bytes()
    path.unlink()
    if how == "cut":
        path.write_bytes(whole[: len(whole) // 2])
    trainer.train(tmp_path / "run", **cached(states))
    assert metrics(tmp_path / "run") == metrics(run)
    if name != "entry.json":  # for people only
        assert path.read_bytes() == whole


def test_only_what_the_run_reads_is_computed(trainer, tmp_path, capfd):
    few = {
        "router__bias": "false", "router__init": "zeros", "router__stand_in": "none",
        "router__stand_in_rank": None, "router__capacity_loss_weight": 0.3,
        "train__steps": 2,
    }  # fmt: skip
    trainer.train(tmp_path / "run", **cached(tmp_path / "states", **few))
    assert re.search(COMPUTED, capfd.readouterr().out)[1] == "8"
    trainer.train(tmp_path / "more", **cached(tmp_path / "states", **{**few, "train__steps": 3}))
    assert re.search(COMPUTED, capfd.readouterr().out)[1] == "4"


def test_a_disk_without_room_is_refused_before_anything_is_computed(
    trainer, tmp_path, monkeypatch, capfd
):
    monkeypatch.setattr(folders, "free_bytes", lambda path: 1000)
    with pytest.raises(ValueError, match=r"frozen_prefix = cache keeps .* needs \d+ bytes and"):
        trainer.train(tmp_path / "run", **cached(tmp_path / "states"))
    assert re.search(COMPUTED, capfd.readouterr().out)
    assert not [path for path in (tmp_path / "states").rglob("*") if path.suffix != ".lock"]


def test_a_disk_that_runs_full_is_one_message(trainer, tmp_path, monkeypatch):
    def full(file, offset, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(prefix_states, "_put", full)
    with pytest.raises(ValueError, match="could not be written: the disk is full"):
        trainer.train(tmp_path / "run", **cached(tmp_path / "states"))


def test_one_job_computes_and_others_wait_for_it(trainer, kept, tmp_path, monkeypatch, capfd):
    run, states = kept
    lock = FileLock(tmp_path / "states" / f"{entry_of(states).name}.lock")
    (tmp_path / "states").mkdir()
    lock.acquire()

    def meanwhile(seconds):
        copy(states, tmp_path / "states")
        lock.release()

    monkeypatch.setattr(frozen_prefix.time, "sleep", meanwhile)
    trainer.train(tmp_path / "run", **cached(tmp_path / "states"))
    said = capfd.readouterr().out
    assert "waiting for another job that fills it" in said
    assert not re.search(COMPUTED, said)
    assert metrics(tmp_path / "run") == metrics(run)


def test_a_run_goes_on_the_other_way(trainer, kept, tmp_path, capfd):
    _, states = kept
    whole = {**ROUTED, "checkpoint__interval": 1}
    trainer.train(tmp_path / "whole", **whole)
    run = tmp_path / "run"
    trainer.train(run, **{**whole, "train__steps": 3})
    for step in (2, 3):
        for path in sorted((run / f"step_0000000{step}").rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()
        (run / f"step_0000000{step}").rmdir()
    trainer.train(run, **cached(states, checkpoint__interval=1))
    assert "Going on after step 1 of 3 (on another topology: equal" in capfd.readouterr().out
    assert_alike(run, tmp_path / "whole")


def test_bfloat16_is_kept_as_it_is(trainer, tmp_path, capfd):
    changes = {"model__dtype": "bfloat16", "train__steps": 1}
    trainer.train(tmp_path / "run", **cached(tmp_path / "states", **changes))
    trainer.train(tmp_path / "recompute", **{**ROUTED, **changes})
    tokens = int(re.search(COMPUTED, capfd.readouterr().out)[2])
    assert (entry_of(tmp_path / "states") / "states").stat().st_size == tokens * 32 * 2
    found, wanted = metrics(tmp_path / "run")[0], metrics(tmp_path / "recompute")[0]
    assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"router__layers": "[0,3]", "train__frozen_prefix": "cache"},
            r"train\.frozen_prefix = cache: layer 0 is routed \(router\.layers = \[0, 3\]\)",
        ),
        (
            {"train__prefix_cache": "somewhere"},
            r"train\.prefix_cache = somewhere: would be ignored, because train\.frozen_prefix is",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(trainer, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        trainer.train(tmp_path / "run", **{**ROUTED, **changes})
    assert not (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_one_is_named(trainer, tmp_path):
    with pytest.raises(ValueError, match=r"^train\.prefix_cache = .*train\.jsonl: "):
        trainer.train(tmp_path / "run", **cached(trainer.text))


def test_states_that_change_while_a_run_reads_them_stop_it(tmp_path):
    lengths = np.array([2, 3])
    entry = StatesEntry(tmp_path, {"x": 1}, lengths, width=4, dtype=torch.bfloat16)
    entry.make()
    first, second = torch.randn(2, 4).bfloat16(), torch.randn(3, 4).bfloat16()
    with entry.filled() as write:
        write(0, first)
        write(1, second)
    assert torch.equal(entry.read(0, source="a:5"), first)
    assert torch.equal(entry.read(1, source="a:8"), second)
    with (entry.path / "states").open("r+b") as file:
        file.seek(20)
        file.write(b"!")
    assert torch.equal(entry.read(0, source="a:5"), first)
    with pytest.raises(ValueError, match=r"the hidden states of a:8 are not what was written"):
        entry.read(1, source="a:8")


def test_states_travel_with_their_tokens():
    def sample(length: int) -> Sample:
        labelled = [False, *[True] * (length - 1)]
        return Sample(list(range(length)), labelled, "made", torch.randn(length, 3))

    a, b, c = sample(2), sample(3), sample(4)
    batch = collate([[a, b], [c]], multiple=4)
    assert batch.states.shape == (2, 8, 3)
    assert torch.equal(batch.states[0, :5], torch.cat((a.states, b.states)))
    assert torch.equal(batch.states[1, :4], c.states)
    assert not batch.states[0, 5:].any()
    assert blank_like(batch).states.shape == (2, 8, 3)
    short, _ = equal_lengths([collate([a]), batch])
    assert torch.equal(short.states[0, :2], a.states)
    assert not short.states[0, 2:].any()
    whole = batch.states
    parts = torch.cat([zigzag(whole, dim=1, rank=r, ranks=2) for r in range(2)], dim=1)
    assert torch.equal(undo_zigzag(parts, dim=1, ranks=2), whole)


def test_the_first_positions_of_an_order():
    order = Order([(5, 1.0), (4, 0.5)], seed=3)
    for count in (0, 1, 6, 7, 8, 30):
        assert order.first(count).tolist() == sorted({order[n] for n in range(count)})


def test_batches_hold_like_lengths_within_a_budget():
    lengths = np.array([3, 9, 1, 3, 20, 8])
    assert [batch.tolist() for batch in like_lengths(lengths, 16)] == [[4], [1], [5, 0], [3, 2]]
