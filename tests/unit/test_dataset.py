"""Files to samples: what is read, what is refused, and what is kept for the next job."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import time
from pathlib import Path

import pyarrow as pa
import pytest
from transformers import AutoTokenizer

from megatron_mod.config.schema import DataConfig
from megatron_mod.data import cache, store
from megatron_mod.data.dataset import Part, Samples, load_data, load_samples, write_rejects
from megatron_mod.data.store import SCHEMA, Store, Summary
from tests.helpers.text import read_lines, write_lines

GOOD = {"prompt": "What?", "completion": "That."}


def texts(samples, tokenizer):
    return [tokenizer.decode(sample.ids) for sample in samples]


def answers(samples, tokenizer):
    return [
        tokenizer.decode([i for i, is_label in zip(s.ids, s.labelled, strict=True) if is_label])
        for s in samples
    ]


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_kinds_of_files_hold_the_same(load, tokenizer, tmp_path, kind):
    messages = [{"role": "user", "content": "2020-01-01"}, {"role": "assistant", "content": "é"}]
    for name, records in (("a", [GOOD, GOOD]), ("b", [{"messages": messages, "id": 3}])):
        path = tmp_path / "data" / f"{name}.{kind}"
        path.parent.mkdir(exist_ok=True)
        if kind == "parquet":
            import datasets

            datasets.Dataset.from_list(records).to_parquet(path)
        elif kind == "json":
            path.write_text(json.dumps(records, indent=2))
        else:
            write_lines(path, records)
    samples = load(tmp_path / "data")
    assert answers(samples, tokenizer) == ["That.</s>", "That.</s>", "é</s>"]
    assert texts(samples, tokenizer)[2] == "<|user|>\n2020-01-01\n<|assistant|>\né</s>"
    assert samples[2].source == f"{tmp_path}/data/b.{kind}:1"
    assert load([str(tmp_path / "data" / f"{n}.{kind}") for n in "ba"])[0] == samples[2]


def test_a_dataset_is_read_by_name_and_split(load, tokenizer, tmp_path, monkeypatch):
    """A local folder with a loading configuration is what a name resolves to without a network."""
    import datasets

    monkeypatch.chdir(tmp_path)
    splits = datasets.DatasetDict({
        name: datasets.Dataset.from_list([{"prompt": name, "completion": name}])
        for name in ("train", "test")
    })  # fmt: skip
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: splits[split])
    assert answers(load("some/name"), tokenizer) == ["train</s>"]
    samples = load("some/name:test")
    assert answers(samples, tokenizer) == ["test</s>"]
    assert samples[0].source == "some/name:test:1"


def test_names_that_are_nothing_are_told(load, tmp_path):
    for name in (tmp_path / "none.jsonl", "none.jsonl", "./none", str(tmp_path / "none")):
        with pytest.raises(ValueError, match="no such file"):
            load(name)
    with pytest.raises(ValueError, match="no dataset of that name can be loaded"):
        load("no/such-dataset")
    (tmp_path / "text.csv").write_text("x")
    with pytest.raises(ValueError, match="cannot read this kind of file"):
        load(tmp_path / "text.csv")


def test_texts_and_conversations_are_samples_of_one_run(load, tmp_path, tokenizer):
    (tmp_path / "some.txt").write_text("Some words.")
    lines = [{"text": "More of them."}, GOOD]
    (tmp_path / "more.jsonl").write_text("\n".join(map(json.dumps, lines)))
    samples = load([str(tmp_path / "some.txt"), str(tmp_path / "more.jsonl")])
    assert samples.has_texts
    assert answers(samples, tokenizer)[:2] == ["Some words.</s>", "More of them.</s>"]
    assert [sample.source for sample in samples] == [
        f"{tmp_path / name}" for name in ("some.txt:1", "more.jsonl:1", "more.jsonl:2")
    ]
    assert [sample.prompt_length for sample in samples][:2] == [1, 1]
    assert not load(_saved(tmp_path / "only.jsonl", GOOD)).has_texts


def test_a_format_that_is_asked_for_is_that_of_every_record(tmp_path, tokenizer):
    """What is tokenised for one format is no other's: texts that are conversations too are both."""
    both = {**GOOD, "text": "A text of many tokens. " * 9}
    path = _saved(tmp_path / "both.jsonl", both)

    def load(source, records):
        config = DataConfig(
            train=str(source), max_length=64, format=records, cache=str(tmp_path / "cache")
        )
        return load_data(config, tokenizer, seed=0)[0]

    pieces = load(path, "text")
    assert pieces.has_texts
    assert all(all(sample.labelled[1:]) for sample in pieces)
    assert {len(sample.ids) for sample in list(pieces)[:-1]} == {64}
    assert not load(path, "conversations").has_texts
    assert not load(path, "auto").has_texts
    (tmp_path / "some.txt").write_text("Some words.")
    assert load(tmp_path / "some.txt", "text").has_texts
    for source, records, reason in (
        (_saved(tmp_path / "talk.jsonl", GOOD), "text", "talk.jsonl:1: needs a 'text'"),
        (tmp_path / "some.txt", "conversations", "some.txt:1: needs 'messages', or"),
    ):
        with pytest.raises(ValueError, match=reason) as refusal:
            load(source, records)
        assert f"because data.format = {records}" in str(refusal.value)


def test_a_folders_texts_are_read_where_it_holds_nothing_else(load, tmp_path, tokenizer):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "licence.txt").write_text("No warranty.")
    assert answers(load(folder), tokenizer) == ["No warranty.</s>"]
    _saved(folder / "data.jsonl", GOOD)
    assert not load(folder).has_texts


def test_a_text_that_cannot_be_read_is_told(load, tmp_path, monkeypatch):
    path = tmp_path / "some.txt"
    for content, reason in ((b"\xff\xfe", "not UTF-8"), (b" \n", "not empty"), (b"", "not empty")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"some.txt:1: .*{reason}"):
            load(path)
    monkeypatch.setattr("megatron_mod.data.sources.MOST_BYTES", 3)
    path.write_text("long")
    with pytest.raises(ValueError, match="some.txt:1: larger than 3 bytes; cut it"):
        load(path)


def _saved(path, record):
    path.write_text(json.dumps(record) + "\n")
    return path


BAD = [
    (b"{not json", "not JSON"),
    (b'{"texts": "x"}', "needs 'messages', or 'prompt' and 'completion', or 'text'"),
    (b'{"messages": []}', "non-empty list"),
    (b'{"messages": [{"role": "wizard", "content": "x"}]}', "'role' out of"),
    (b'{"messages": [{"role": "user", "content": "x"}]}', "no assistant turn"),
    (b'{"prompt": "\xff", "completion": "b"}', "not UTF-8"),
]


@pytest.mark.parametrize(("line", "reason"), BAD)
def test_a_bad_record_stops_with_file_line_and_reason(load, tmp_path, line, reason):
    path = tmp_path / "data.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b"\n\n" + line + b"\n")
    with pytest.raises(ValueError) as caught:
        load(path)
    assert f"{path}:3: " in str(caught.value)
    assert reason in str(caught.value)
    assert not [p for p in (tmp_path / "cache").glob("*") if p.is_dir() and p.name != "digests"]


def test_bad_records_are_skipped_counted_and_written(load, tmp_path, caplog):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\n".join([json.dumps(GOOD).encode(), *(line for line, _ in BAD)]))
    for _ in range(2):  # made, and found in the cache
        caplog.clear()
        samples = load(path, on_bad_record="skip")
        assert len(samples) == 1
        assert f"{len(BAD)} of {len(BAD) + 1} records skipped" in caplog.text
    write_rejects(tmp_path / "rejects.jsonl", samples, None, samples)
    rejects = read_lines(tmp_path / "rejects.jsonl")
    assert [r["source"] for r in rejects] == [f"{path}:{n}" for n in range(2, len(BAD) + 2)]
    assert all(reason in r["reason"] for r, (_, reason) in zip(rejects, BAD, strict=True))
    assert rejects[1]["content"] == {"texts": "x"}
    with pytest.raises(ValueError, match=r"data\.jsonl:2: not JSON"):
        load(path)  # what another job skipped still stops this one


def test_rejects_that_cannot_be_written_are_told_and_leave_no_part(load, tmp_path, monkeypatch):
    path = tmp_path / "data.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b"\n{oops\n" + b"[" + b"1," * 9 + b"1]")
    samples = load(path, on_bad_record="skip")
    rejects = tmp_path / "run" / "rejects.jsonl"
    with pytest.raises(ValueError, match=f"{rejects}: cannot be written"):
        write_rejects(rejects, samples)
    rejects.parent.mkdir()
    write_rejects(rejects, samples)
    before = rejects.read_bytes()

    def full(self):
        yield {"number": 2, "reason": "half", "content": "x"}
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Store, "rejects", full)
    with pytest.raises(ValueError, match=f"{rejects}: could not be written: the disk is full"):
        write_rejects(rejects, samples)
    assert [file.name for file in rejects.parent.iterdir()] == ["rejects.jsonl"]
    assert rejects.read_bytes() == before


def test_answers_cut_away_are_counted_and_none_left_is_an_error(load, tmp_path, caplog):
    path = write_lines(
        tmp_path / "data.jsonl", [{"prompt": "a" * n, "completion": "b"} for n in (5, 500)]
    )
    assert len(load(path, max_length=100)) == 1
    assert "1 of 2 samples left out" in caplog.text
    assert "the first is record 2" in caplog.text
    with pytest.raises(ValueError, match="no usable sample.*cuts the answers of 2 away"):
        load(path, max_length=10)
    with pytest.raises(ValueError, match=r"no usable sample \(0 records\)"):
        load(write_lines(tmp_path / "empty.jsonl", []))


def test_tokenised_data_is_keyed_by_content_tokenizer_template_and_length(
    load, tokenizer, tmp_path, monkeypatch
):
    made = []
    encode = store._Writer.write

    def write(self, *args, **options):
        made.append(1)
        return encode(self, *args, **options)

    monkeypatch.setattr(store._Writer, "write", write)
    path = write_lines(tmp_path / "data.jsonl", [GOOD])
    times = path.stat()
    steps = [
        (lambda: load(path), 1),
        (lambda: load(path), 0),
        (lambda: load(path, max_length=50), 1),
        (lambda: load(path.rename(tmp_path / "renamed.jsonl")), 0),
    ]
    for step, expected in steps:
        made.clear()
        step()
        assert len(made) == expected
    path = tmp_path / "renamed.jsonl"
    path.write_text(path.read_text().replace("That", "This"))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # same size, same time
    made.clear()
    assert answers(load(path), tokenizer) == ["This.</s>"]
    other = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    other.chat_template = "{% for m in messages %}{{ m.content + '</s>' }}{% endfor %}"
    for template in ("published", "auto"):
        load_samples(path, other, max_length=200, template=template, cache=tmp_path / "cache")
    assert len(made) == 2  # the published one of `other` is what the tokenizer made before
    other.backend_tokenizer.add_special_tokens(["<new>"])
    load_samples(path, other, max_length=200, template="published", cache=tmp_path / "cache")
    assert len(made) == 3


def _make_entry(folder: Path, rank: int) -> None:
    os.environ.update(LOCAL_RANK=str(rank), WORLD_SIZE="3")

    def build(partial: Path) -> None:
        time.sleep(0.3)  # long enough for the others to come
        (partial / "made").write_text("whole")
        with (folder / "builds").open("a") as file:
            file.write("x")

    entry = cache.entry(folder / "cache", {"content": "x"}, build)
    assert (entry / "made").read_text() == "whole"


@pytest.mark.parametrize("ranks", [(0, 0, 0), (0, 1, 2)], ids=["jobs", "ranks"])
def test_jobs_and_ranks_that_meet_make_an_entry_once(tmp_path, ranks):
    (tmp_path / "cache").mkdir()
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_make_entry, args=(tmp_path, rank)) for rank in ranks]
    for process in reversed(processes):
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert (tmp_path / "builds").read_text() == "x"


def test_what_a_killed_job_left_is_cleared_and_a_failure_leaves_nothing(tmp_path):
    def fail(partial: Path) -> None:
        (partial / "half").write_text("")
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        cache.entry(tmp_path, {"content": "x"}, fail)
    assert [p for p in tmp_path.iterdir() if p.is_dir()] == []
    (lock,) = tmp_path.glob("*.lock")
    leftover = tmp_path / f".{lock.stem}.incomplete"
    leftover.mkdir()
    (leftover / "half").write_text("")
    folder = cache.entry(tmp_path, {"content": "x"}, lambda partial: (partial / "all").touch())
    assert sorted(file.name for file in folder.iterdir()) == ["all", "entry.json"]
    assert not leftover.exists()


def data(**settings):
    return DataConfig(**{"max_length": 200, **settings})


def test_a_split_holds_out_what_is_not_trained_on(load, tokenizer, tmp_path):
    paths = [
        write_lines(tmp_path / f"{n}.jsonl", [{**GOOD, "completion": f"{n}{i}"} for i in range(20)])
        for n in "ab"
    ]
    config = data(
        train={str(paths[0]): 2.5, str(paths[1]): 1.0}, validation_split=0.1,
        cache=str(tmp_path / "cache"),
    )  # fmt: skip
    train, held = load_data(config, tokenizer, seed=1)
    assert train.weights == [(18, 2.5), (18, 1.0)]
    found = [set(answers(s, tokenizer)) for s in (train, held)]
    assert not found[0] & found[1]
    assert found[0] | found[1] == {f"{n}{i}</s>" for n in "ab" for i in range(20)}
    assert {answer[0] for answer in found[1]} == {"a", "b"}
    again, other = (load_data(config, tokenizer, seed=s)[1] for s in (1, 2))
    assert answers(again, tokenizer) == answers(held, tokenizer) != answers(other, tokenizer)
    with pytest.raises(ValueError, match="leaves 40 of 40"):
        load_data(data(train=config.train, validation_split=0.01, cache=config.cache), tokenizer,
                  seed=1)  # fmt: skip


def test_no_more_samples_are_drawn_than_asked_for(tokenizer, tmp_path):
    paths = [
        write_lines(tmp_path / f"{n}.jsonl", [{**GOOD, "completion": f"{n}{i}"} for i in range(40)])
        for n in "ab"
    ]
    weights = {str(paths[0]): 3.0, str(paths[1]): 0.5}
    config = data(train=weights, max_train_samples=70, cache=str(tmp_path / "cache"))
    drawn, _ = load_data(config, tokenizer, seed=1)
    assert len(drawn) == 70
    found = answers(drawn, tokenizer)
    # Of 120 + 20 in an epoch half: no more than three of one kind, and a's the most.
    assert max(found.count(answer) for answer in found if answer[0] == "a") <= 3
    assert max(found.count(answer) for answer in found if answer[0] == "b") == 1
    assert sum(answer[0] == "a" for answer in found) >= 50
    assert answers(load_data(config, tokenizer, seed=1)[0], tokenizer) == found
    assert answers(load_data(config, tokenizer, seed=2)[0], tokenizer) != found
    config = data(train=config.train, max_train_samples=1000, cache=config.cache)
    assert len(load_data(config, tokenizer, seed=1)[0]) == 140


def _anonymous_bytes() -> int:
    """Memory of this process that is no file's."""
    status = Path("/proc/self/status")
    if not status.is_file():
        pytest.skip("needs /proc/self/status to tell memory apart")
    (line,) = (line for line in status.read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def test_samples_stay_in_the_file_until_they_are_asked_for(tmp_path):
    import datasets

    count, length = 1000, 400
    ids = pa.FixedSizeListArray.from_arrays(pa.array(range(count * length), pa.int32()), length)
    columns = {
        "ids": ids.cast(pa.list_(pa.int32())),
        "spans": pa.array([[1, length]] * count, pa.list_(pa.int32())),
        "number": pa.array(range(count), pa.int64()),
        "place": pa.array(range(count), pa.int64()),
    }
    batch = pa.record_batch(columns, schema=SCHEMA)
    kept = Store("made", tmp_path, Summary())
    with pa.ipc.new_stream(str(kept.samples), SCHEMA) as writer:
        for _ in range(100):
            writer.write_batch(batch)
    del ids, columns, batch
    size = kept.samples.stat().st_size
    assert size > 100 * count * length * 4
    before = _anonymous_bytes()
    samples = Samples([Part(kept, datasets.Dataset.from_file(str(kept.samples)), 1.0)])
    for index in range(0, len(samples), 100):
        assert samples[index].ids[0] == index % count * length
    assert _anonymous_bytes() - before < size / 10
