"""Raw corpora to one form, and the mix of them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from megatron_mod.data import formats, mixing
from tests.helpers.text import alpaca, read_lines, write_lines

ROOT = Path(__file__).resolve().parents[2]


def turns(*pairs):
    return {"conversations": [{"from": sender, "value": text} for sender, text in pairs]}


def chat(*pairs):
    return [{"role": role, "content": text} for role, text in pairs]


QUESTION, ANSWER = ("human", "Why?"), ("gpt", "So.")
CASES = {
    "vicuna_sharegpt": (
        [
            turns(QUESTION, ANSWER, ("user", "a"), ("chatgpt", "b"), ("user", "c"), ("bard", "d")),
            turns(("system", "s"), QUESTION, ANSWER),
            turns(QUESTION, ("bing", "no")),
            turns(QUESTION, ("gpt4", "no")),
            turns(QUESTION, ("gpt", None)),
            turns(),
            {"id": "x"},
        ],
        [
            chat(("user", "Why?"), ("assistant", "So."), ("user", "a"), ("assistant", "b"),
                 ("user", "c"), ("assistant", "d")),
            chat(("system", "s"), ("user", "Why?"), ("assistant", "So.")),
        ],
        {"a turn of 'bing'": 1, "unknown sender 'gpt4'": 1, "no 'value'": 1, "no turns": 1,
         "no 'conversations'": 1},
    ),
    "evol_instruct": (
        [turns(QUESTION, ANSWER), turns(("system", "s"), QUESTION), turns(("bing", "x"))],
        [chat(("user", "Why?"), ("assistant", "So."))],
        {"a turn of 'system'": 1, "a turn of 'bing'": 1},
    ),
    "slim_orca": (
        [turns(("system", ""), QUESTION, ANSWER)],
        [chat(("system", ""), ("user", "Why?"), ("assistant", "So."))],
        {},
    ),
    "meta_math_qa": (
        [{"query": "1+1?", "response": "2", "type": "x"}, {"query": "1+1?", "response": 2}],
        [chat(("user", "1+1?"), ("assistant", "2"))],
        {"'response' is not text": 1},
    ),
    "evol_code_alpaca": (
        [{"instruction": "Sort.", "output": "sorted(x)"}],
        [chat(("user", "Sort."), ("assistant", "sorted(x)"))],
        {},
    ),
    "alpaca": (
        [
            {"instruction": "Add.", "input": "1, 2", "output": "3"},
            {"instruction": "Greet.", "input": "", "output": "Hi"},
            {"instruction": "Date?", "input": None, "output": "2020-01-01"},
        ],
        [
            chat(("user", "Add.\nInput: 1, 2\n"), ("assistant", "3")),
            chat(("user", "Greet."), ("assistant", "Hi")),
            chat(("user", "Date?"), ("assistant", "2020-01-01")),
        ],
        {},
    ),
}  # fmt: skip


def write_raw(folder: Path, records: list[dict], kind: str) -> None:
    folder.mkdir(parents=True)
    if kind == "json":
        (folder / "raw.json").write_text(json.dumps(records, indent=1), encoding="utf-8")
    elif kind == "jsonl":
        write_lines(folder / "raw.jsonl", records)
    else:
        import datasets

        (folder / "data").mkdir()
        datasets.Dataset.from_list(records).to_parquet(folder / "data" / "train-00000.parquet")


@pytest.mark.parametrize("kind", ["json", "jsonl", "parquet"])
@pytest.mark.parametrize("name", formats.CORPORA)
def test_every_layout_becomes_messages(tmp_path, name, kind):
    records, messages, dropped = CASES[name]
    if kind == "parquet":  # a column of a Parquet file has one type
        records = [r for r in records if not any(isinstance(v, int) for v in r.values())]
        dropped = {reason: n for reason, n in dropped.items() if "not text" not in reason}
    write_raw(tmp_path / "raw" / name, records, kind)
    report = formats.reformat(name, tmp_path / "raw" / name, tmp_path / "out")
    lines = read_lines(tmp_path / "out" / "data.jsonl")
    assert [line["messages"] for line in lines] == messages
    assert {line["dataset"] for line in lines} == {name}
    assert len({line["id"] for line in lines}) == len(lines)
    assert report.dropped == dropped
    assert report.read == len(records) == report.written + sum(dropped.values())
    assert json.loads((tmp_path / "out" / "report.json").read_text())["dropped"] == dropped


def test_of_several_sharegpt_files_the_published_one_is_taken(tmp_path):
    folder = tmp_path / "vicuna_sharegpt"
    folder.mkdir()
    preferred = formats.CORPORA["vicuna_sharegpt"].prefer
    for file, text in ((preferred, "taken"), ("other.json", "left")):
        (folder / file).write_text(json.dumps([turns(("human", text), ANSWER)]))
    formats.reformat("vicuna_sharegpt", folder, tmp_path / "out")
    (line,) = read_lines(tmp_path / "out" / "data.jsonl")
    assert line["messages"][0]["content"] == "taken"


def test_bad_lines_are_counted_and_a_broken_array_is_an_error(tmp_path):
    good = json.dumps({"instruction": "a", "output": "b"}).encode()
    lines = [good, b"{oops", b'{"instruction": "\xff", "output": ""}', b"3", b""]
    lines += [b'{"instruction": "\\ud83d", "output": "b"}']
    path = tmp_path / "raw.jsonl"
    path.write_bytes(b"\n".join(lines))
    report = formats.reformat("alpaca", path, tmp_path / "out")
    assert report.written == 1
    assert report.dropped == {"not JSON": 1, "not UTF-8": 2, "no 'instruction'": 1}
    broken = tmp_path / "raw.json"
    broken.write_bytes(b"[" + good + b", " + good[:9])
    with pytest.raises(ValueError, match=r"raw\.json:2: not JSON"):
        formats.reformat("alpaca", broken, tmp_path / "broken")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "raw.json", "raw.jsonl"]


def test_mistakes_are_named(tmp_path):
    with pytest.raises(ValueError, match="no corpus of that name"):
        formats.raw_sources(tmp_path, ["alpacca"])
    with pytest.raises(ValueError, match="no such folder"):
        formats.raw_sources(tmp_path, ["alpaca"])
    with pytest.raises(ValueError, match="holds none of the sub-folders"):
        formats.raw_sources(tmp_path)
    (tmp_path / "alpaca").mkdir()
    with pytest.raises(ValueError, match="no data file in it"):
        formats.reformat("alpaca", tmp_path / "alpaca", tmp_path / "out")
    with pytest.raises(ValueError, match="no dataset of that name"):
        formats.reformat("alpaca", "no/such-dataset", tmp_path / "out")


def test_real_alpaca_loses_nothing(tmp_path):
    raw = json.loads(alpaca().read_text(encoding="utf-8"))
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools/reformat_datasets.py"), "--save-path", str(tmp_path),
         "--sources", f"alpaca={alpaca()}"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert f"{len(raw)} of {len(raw)} records written" in done.stdout
    lines = read_lines(tmp_path / "alpaca" / "data.jsonl")
    for line, record in zip(lines, raw, strict=True):
        user, assistant = line["messages"]
        assert user["content"].startswith(record["instruction"])
        assert user["content"].endswith(f"\nInput: {record['input']}\n") == bool(record["input"])
        assert assistant["content"] == record["output"]


@pytest.fixture
def reformatted(tmp_path):
    for name, count in (("vicuna_sharegpt", 1000), ("slim_orca", 30), ("alpaca", 7)):
        write_lines(tmp_path / name / "data.jsonl", [{"id": f"{name}_{i}"} for i in range(count)])
    return tmp_path


def mixed(*arguments, **options):
    report = mixing.mix(*arguments, **options)
    return [line["id"] for line in read_lines(arguments[1] / "data.jsonl")], report


def test_default_mix_takes_sharegpt_2_9_times_and_no_alpaca(reformatted):
    ids, report = mixed(reformatted, reformatted / "mix")
    assert report["vicuna_sharegpt"]["written"] == 2900
    assert set(report) == {"vicuna_sharegpt", "slim_orca"}
    counts = Counter(ids)
    assert sorted(counts.values()) == [1] * 30 + [2] * 100 + [3] * 900
    assert all(n == 1 for name, n in counts.items() if name.startswith("slim_orca"))
    assert ids[:5] != sorted(ids)[:5]


def test_mix_is_a_function_of_its_seed(reformatted):
    portions = {"slim_orca": 0.5, "alpaca": 1.0}
    first, _ = mixed(reformatted, reformatted / "a", portions=portions, seed=1)
    same, _ = mixed(reformatted, reformatted / "b", portions=portions, seed=1)
    other, _ = mixed(reformatted, reformatted / "c", portions=portions, seed=2)
    assert first == same
    assert first != other
    assert len(first) == len(set(first)) == 15 + 7


@pytest.mark.parametrize("argument", ["alpaca", "alpaca=x", "=1"])
def test_portions_of_another_form_are_refused(argument):
    with pytest.raises(ValueError, match="--portions"):
        mixing.parse_portions([argument])


def test_a_corpus_that_is_missing_or_empty_is_named(reformatted):
    with pytest.raises(ValueError, match=r"nothing: no \.jsonl file"):
        mixing.mix(reformatted, reformatted / "mix", portions={"nothing": 1.0})
    write_lines(reformatted / "empty" / "data.jsonl", [])
    with pytest.raises(ValueError, match="empty: holds no line"):
        mixing.mix(reformatted, reformatted / "mix", portions={"empty": 1.0})
    assert not (reformatted / "mix").exists()


def test_mix_tool_writes_what_it_says(reformatted):
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools/mix_datasets.py"), "--reformatted-dir",
         str(reformatted), "--save-path", str(reformatted / "m"), "--portions", "alpaca=2.9"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "alpaca: 7 records x 2.9 = 20" in done.stdout  # 14 + round(0.9 * 7)
    assert len(read_lines(reformatted / "m" / "data.jsonl")) == 20
