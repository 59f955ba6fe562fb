"""Records out of files of every kind: a few at a time, and one message for what cannot be read."""

from __future__ import annotations

import json
import logging
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_mod.benchmark.data_speed import measure, needed_tokens_per_second
from megatron_mod.data import formats, json_records, mixing, store
from megatron_mod.data.encoding import Encoder
from megatron_mod.data.sources import content_bytes, read_file, text_bytes
from tests.helpers.text import ROOT, write_lines

GOOD = {"prompt": "What?", "completion": "That."}
LINE = json.dumps(GOOD).encode()
KINDS = ["jsonl", "json", "parquet"]


def write(path, records, **options):
    """A file of the kind its suffix says."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), path, **options)
    elif path.suffix == ".json":
        path.write_text(json.dumps(records, indent=1))
    else:
        write_lines(path, records)
    return path


def problems(path):
    return {record.number: record.problem for record in read_file(path) if record.problem}


# What JSON lines and the elements of an array may be, and what is said of it.
BAD = [
    (b'{"prompt": "\\ud83d", "completion": "x"}', None),  # half a pair: told when it is used
    (b'{"prompt": "a", "prompt": "b"}', "key 'prompt' twice"),
    (b'{"a": [{"b": {"c": 1, "c": 2}}]}', "key 'c' twice"),
    (b'{"prompt": "\xff"}', "not UTF-8"),
    (b'{"prompt": }', "not JSON: Expecting value"),
    (b'{"n": ' + b"9" * 5000 + b"}", "not JSON: Exceeds the limit"),
    (b'{"n": ' + b"[" * 200 + b"]" * 200 + b"}", "inside each other"),
    (b'{"n": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "inside each other"),
    (b'{"n":' * 300 + b"1" + b"}" * 300, "inside each other"),
]


@pytest.mark.parametrize("kind", ["jsonl", "json"])
@pytest.mark.parametrize(("text", "problem"), BAD)
def test_a_bad_record_is_the_same_in_lines_and_arrays(tmp_path, kind, text, problem):
    path = tmp_path / f"data.{kind}"
    marks = (b"[", b",", b"]") if kind == "json" else (b"", b"\n", b"")
    path.write_bytes(marks[0] + marks[1].join((LINE, text, LINE)) + marks[2])
    records = list(read_file(path))
    assert [record.number for record in records] == [1, 2, 3]
    assert records[0].content == records[2].content == GOOD
    if problem is None:
        assert records[1].content == json.loads(text)
    else:
        assert problem in records[1].problem
        assert "sys." not in records[1].problem


@pytest.mark.parametrize(
    "text",
    [
        b"[]",
        b" [ ] \n",
        b'\xef\xbb\xbf[{"a": "x"}]',
        b'[\r\n  {"a": "\\"}, {\\\\"},\r\n {"a": [1, {"b": null}, "],["]} ]\r\n',
        b'[1, "x", null, -1.5e3, [2, [3]], 1e999, 123456789012345678901234567890]',
    ],
)
@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 2**18])
def test_an_array_is_what_it_is_however_it_is_cut(tmp_path, monkeypatch, text, chunk):
    monkeypatch.setattr(json_records, "_CHUNK", chunk)
    path = tmp_path / "data.json"
    path.write_bytes(text)
    assert [record.content for record in read_file(path)] == json.loads(text.decode("utf-8-sig"))


@pytest.mark.parametrize("chunk", [1, 7, 2**18])
@pytest.mark.parametrize(
    ("text", "number", "reason"),
    [
        (b"[" + LINE + b", " + LINE[:9], 2, "ends within the array"),
        (b"[" + LINE + b"] x", 1, "more follows"),
        (b"[" + LINE + b"]" + LINE, 1, "more follows"),
        (b"[" + LINE + b", \x00]", 2, "byte 0x00 where"),
        (b'[{"a": "\n"}]', 1, "byte 0x0a in a text"),
        (b'[{"a": "x\\', 1, "ends within"),
        (b"[" * 100_000, 1, "ends within"),
    ],
)
def test_an_array_that_cannot_be_cut_is_one_message(
    tmp_path, monkeypatch, text, number, reason, chunk
):
    monkeypatch.setattr(json_records, "_CHUNK", chunk)
    path = tmp_path / "data.json"
    path.write_bytes(text)
    with pytest.raises(ValueError, match=rf"data\.json:{number}: not JSON: .*{reason}"):
        list(read_file(path))


@pytest.mark.parametrize("kind", ["jsonl", "json"])
def test_no_more_of_a_record_is_held_than_one_may_have(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(json_records, "MOST_BYTES", 1000)
    monkeypatch.setattr(json_records, "_CHUNK", 300)
    path = write(tmp_path / f"data.{kind}", [GOOD, {"prompt": "x" * 5000}, GOOD])
    assert problems(path) == {2: "longer than 1000 bytes"}
    assert [r.content for r in read_file(path) if not r.problem] == [GOOD, GOOD]


# Short and long records in turn, as 2 MiB would hold 1000 of the short ones.
MIXED = [{"prompt": "a" * (10 if n % 50 else 40_000), "completion": "b" * 90} for n in range(2500)]


@pytest.mark.parametrize("kind", [*KINDS, "named"])
def test_records_are_tokenised_by_bytes_at_a_time(load, tmp_path, monkeypatch, kind):
    seen = []
    encode = Encoder.encode

    def measured(self, conversations):
        seen.append((len(conversations), text_bytes(conversations)))
        return encode(self, conversations)

    monkeypatch.setattr(Encoder, "encode", measured)
    monkeypatch.setattr(store, "BATCH_BYTES", 200_000)
    if kind == "named":
        import datasets

        named = datasets.Dataset.from_list(MIXED)
        monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: named)
    source = "some/name" if kind == "named" else write(tmp_path / f"data.{kind}", MIXED)
    samples = load(source, max_length=100, on_bad_record="skip")
    assert samples.parts[0].store.summary.records == len(MIXED)
    records, sizes = zip(*seen, strict=True)
    assert sum(records) == len(MIXED)
    assert max(records) <= store.BATCH_RECORDS
    keys = len("rolecontent") * 2 + len("userassistant")  # of a conversation of two turns
    assert max(size - keys * n for n, size in seen) <= 200_000
    assert max(sizes) > 150_000  # and not much less


def test_a_record_above_the_limit_goes_alone():
    records = [json_records.Record(n, {"prompt": "a" * n}) for n in (10, store.BATCH_BYTES, 10)]
    assert [len(batch) for batch in store.batches(records)] == [1, 1, 1]


def test_of_parquet_pages_are_held_and_not_row_groups(tmp_path):
    """Of 40 MB in one row group, of which no two texts are alike, in pages of 0.1 MB."""
    rows = [{"prompt": f"{n:09}" * 11_000, "completion": "x"} for n in range(400)]
    path = write(
        tmp_path / "data.parquet", rows, data_page_size=2**16, write_batch_size=1,
        use_dictionary=False,
    )  # fmt: skip
    total = sum(len(row["prompt"]) for row in rows)
    assert content_bytes(path) >= total
    del rows
    before, most, count = pa.total_allocated_bytes(), 0, 0
    for record in read_file(path):
        most, count = max(most, pa.total_allocated_bytes() - before), count + 1
        assert record.content["prompt"] == f"{count - 1:09}" * 11_000
    assert count == 400
    assert most < total / 10


def damaged(path, *, at):
    content = bytearray(path.read_bytes())
    content[at : at + 64] = b"\xff" * 64
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("how", ["empty", "text", "cut", "header", "middle", "footer"])
def test_a_corrupt_parquet_file_is_named(load, tmp_path, how):
    path = tmp_path / "data.parquet"
    write(path, [{"prompt": str(n) * 99, "completion": "x"} for n in range(2000)])
    size = path.stat().st_size
    if how in ("empty", "text"):
        path.write_bytes(b"" if how == "empty" else LINE)
    elif how == "cut":
        path.write_bytes(path.read_bytes()[: size // 2])
    else:
        damaged(path, at={"header": 4, "middle": size // 3, "footer": size - 200}[how])
    for use in (load, lambda path: formats.reformat("alpaca", path, tmp_path / "out")):
        with pytest.raises(ValueError, match=rf"^{path}: not a Parquet file, or a damaged one: "):
            use(path)


def test_a_text_that_is_not_utf_8_is_a_bad_row(load, tmp_path):
    prompts = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), pa.py_buffer(b"a\xff")]
    )
    table = pa.table({"prompt": prompts, "completion": ["x", "y"]})
    pq.write_table(table, tmp_path / "data.parquet")
    with pytest.raises(ValueError, match=r"data\.parquet:2: not UTF-8"):
        load(tmp_path / "data.parquet")
    assert len(load(tmp_path / "data.parquet", on_bad_record="skip")) == 1


def test_what_the_system_refuses_to_read_is_named(load, tmp_path, monkeypatch):
    path = write(tmp_path / "data.jsonl", [GOOD])

    def refuse(*args, **options):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.open", refuse)
        for use in (load, lambda path: list(read_file(path))):
            with pytest.raises(ValueError, match=rf"^{path}: cannot be read: Permission denied"):
                use(path)
    (tmp_path / "mixed" / "a.jsonl").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"no \.jsonl file there"):
        mixing.mix(tmp_path, tmp_path / "out", portions={"mixed": 1.0})


RAW = {
    "alpaca": {"instruction": "Add.", "input": "1, 2", "output": "3"},
    "evol_code_alpaca": {"instruction": "Add.", "output": "3"},
    "meta_math_qa": {"query": "1+2?", "response": "3", "type": "x"},
    "vicuna_sharegpt": {"id": "x", "conversations": [{"from": "human", "value": "1+2?"}]},
}


@pytest.mark.parametrize("name", RAW)
@pytest.mark.parametrize("on_bad_record", ["stop", "skip"])
def test_raw_records_are_led_to_the_tool_that_converts_them(load, tmp_path, name, on_bad_record):
    path = write(tmp_path / "raw.json", [RAW[name]])
    with pytest.raises(ValueError) as caught:
        load(path, on_bad_record=on_bad_record)
    assert f"tools/reformat_datasets.py --sources {name}={path} " in str(caught.value)
    assert "data.on_bad_record" not in str(caught.value)


def test_records_of_no_known_layout_are_not_led_there():
    assert formats.layout_of({"messages": [], "instruction": "", "output": ""}) is None
    assert formats.layout_of({"question": "", "answer": ""}) is None
    assert formats.layout_of([1]) is None


def test_only_a_run_is_told_of_its_settings(load, tokenizer, tmp_path, caplog):
    from megatron_mod.config.schema import DataConfig
    from megatron_mod.data.dataset import load_data

    path = write(tmp_path / "data.jsonl", [{**GOOD, "prompt": "x" * 500}, {"texts": "x"}])
    config = DataConfig(train=str(path), max_length=200)
    with pytest.raises(ValueError, match=r":2: .* set data\.on_bad_record to skip"):
        load_data(config, tokenizer, seed=0)
    config.on_bad_record = "skip"
    with pytest.raises(ValueError, match=r"data\.max_length cuts the answers of 1 away"):
        load_data(config, tokenizer, seed=0)
    for options in ({}, {"on_bad_record": "skip"}):
        with pytest.raises(ValueError, match=r":2: .*\. Correct the record, or take it out\.") as e:
            load(path, **options)
        assert "data." not in str(e.value).replace(str(path), "")
    write(path, [{**GOOD, "prompt": "x" * 500}, GOOD])
    with caplog.at_level(logging.WARNING):
        load(path)
    assert "--max-length = 200 cuts their answers away" in caplog.text
    for max_length in (1, 0, -4):
        with pytest.raises(ValueError, match=rf"^--max-length = {max_length}: must be at least 2"):
            load(path, max_length=max_length)


@pytest.mark.parametrize("portion", [-1, 0, float("nan"), float("inf"), -float("inf")])
def test_portions_out_of_range_are_refused(tmp_path, portion):
    write_lines(tmp_path / "a" / "data.jsonl", [GOOD])
    message = rf"^--portions a={portion:g}: must be a number above 0"
    with pytest.raises(ValueError, match=message):
        mixing.parse_portions([f"a={portion}"])
    with pytest.raises(ValueError, match=message):
        mixing.mix(tmp_path, tmp_path / "out", portions={"a": portion})
    with pytest.raises(ValueError, match="leave no line"):
        mixing.mix(tmp_path, tmp_path / "out", portions={"a": 0.1})
    with pytest.raises(ValueError, match="^seed = -1: must be at least 0"):
        mixing.mix(tmp_path, tmp_path / "out", portions={"a": 1.0}, seed=-1)
    assert not (tmp_path / "out").exists()


def test_room_for_a_mix_and_for_messages_is_asked_for_before(tmp_path):
    write_lines(tmp_path / "a" / "data.jsonl", [GOOD])
    with pytest.raises(ValueError, match=r"out: the mix needs \d{15,} bytes and \d+ are free"):
        mixing.mix(tmp_path, tmp_path / "out", portions={"a": 1e15})
    sparse = tmp_path / "raw.jsonl"
    with sparse.open("wb") as file:
        file.truncate(2**43)
    with pytest.raises(ValueError, match=r"half of .*raw\.jsonl, as messages, needs \d+ bytes"):
        formats.reformat("alpaca", sparse, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_mix_leaves_byte_order_marks_out(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "data.jsonl").write_bytes(b"\xef\xbb\xbf" + LINE + b"\r\n" + LINE)
    mixing.mix(tmp_path, tmp_path / "out", portions={"a": 1.0})
    assert (tmp_path / "out" / "data.jsonl").read_bytes() == LINE + b"\n" + LINE + b"\n"


SENDERS = [["human"], {}, None, 3, "x" * 10_000]


def test_senders_of_any_type_are_dropped_and_named_in_short(tmp_path):
    turn = {"from": "human", "value": "x"}
    records = [{"conversations": [turn]}, *({"conversations": [{"from": s}]} for s in SENDERS)]
    report = formats.reformat("slim_orca", write(tmp_path / "raw.json", records), tmp_path / "out")
    assert (report.written, sum(report.dropped.values())) == (1, len(SENDERS))
    assert max(map(len, report.dropped)) < 100
    with pytest.raises(ValueError, match=r"no usable .* alpaca \(6 records; 6 dropped") as e:
        formats.reformat("alpaca", tmp_path / "raw.json", tmp_path / "other")
    assert "\n" not in str(e.value)


BENCHMARK = {"max_length": 60, "global_batch_size": 4, "micro_batch_size": 2, "repeats": 1}


def test_the_data_benchmark_names_what_it_cannot_use(tokenizer, tmp_path):
    for path in (tmp_path / "none.jsonl", tmp_path / "folder"):
        (tmp_path / "folder").mkdir(exist_ok=True)
        with pytest.raises(ValueError, match=rf"{path}: no (such|data) file"):
            measure(path, tokenizer, **BENCHMARK)
    path = write(tmp_path / "data.jsonl", [GOOD, {"texts": "x"}])
    with pytest.raises(ValueError, match=rf"{path}:2: needs 'messages'.* or take it out"):
        measure(path, tokenizer, **BENCHMARK)
    for name, least in (("max.length", 2), ("global_batch_size", 1), ("repeats", 1)):
        wrong = {**BENCHMARK, name.replace(".", "_"): -4}
        with pytest.raises(ValueError, match=f"{name} = -4: must be at least {least}"):
            measure(path, tokenizer, **wrong)
    for value in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"flops = {value}: must be a number above 0"):
            needed_tokens_per_second(parameters=8e9, flops=value)


@pytest.mark.parametrize(
    "arguments",
    [
        ["tools/benchmark/data.py", "--data", "{tmp}/none.jsonl", "--tokenizer", "{tokenizer}"],
        ["tools/make_python_docs.py", "--save", "{tmp}/out", "--validation", "-4"],
    ],
)
def test_tools_end_with_one_message(tokenizer, tmp_path, arguments):
    places = {"tmp": tmp_path, "tokenizer": tokenizer.name_or_path}
    script, *rest = (argument.format(**places) for argument in arguments)
    command = [sys.executable, str(ROOT / script), *rest]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
