"""The command lines of all scripts: what they accept, what they refuse, and how fast."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import os
import subprocess
import sys
import typing
from pathlib import Path

import pytest

from megatron_mod import commands
from megatron_mod.commands.command import mistakes_told
from megatron_mod.commands.reformat_datasets import Corpus
from megatron_mod.config import rules
from megatron_mod.config.cli import SECTIONS
from megatron_mod.config.mistakes import nearest
from megatron_mod.config.options import Options, option, parse_options
from megatron_mod.config.rules import NewFolder, OutputFile, OutputFolder, Range, Size
from megatron_mod.data.formats import CORPORA
from megatron_mod.data.mixing import DEFAULT_PORTIONS

ROOT = Path(__file__).resolve().parents[2]
NAMES = sorted(
    path.stem
    for path in Path(commands.__file__).parent.glob("*.py")
    if path.stem not in ("__init__", "command")
)
LAUNCHED = {"train": "pretrain_router.py", "quickstart_report": "quickstart_report.py"}
SCRIPTS = {
    name: f"launch/{LAUNCHED[name]}"
    if name in LAUNCHED
    else f"tools/{name.replace('benchmark_', 'benchmark/')}.py"
    for name in NAMES
}


def schema_of(name: str) -> type[Options]:
    module = importlib.import_module(f"megatron_mod.commands.{name}")
    (schema,) = {
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, Options)
        and value.__name__ not in ("Options", "RankOptions")
    }
    return schema


SCHEMAS = {name: schema_of(name) for name in NAMES if name != "train"}
OF_TRAINING = {f"{section}": schema for section, schema in SECTIONS.items()}

# Imported once, as python starts; then every command is asked for help and given mistakes.
STARTS = """
import contextlib, importlib, io, json, sys
heavy = ("torch", "megatron", "transformers", "datasets", "lm_eval", "matplotlib")
found = {}
for name in sys.argv[1:]:
    main = importlib.import_module(f"megatron_mod.commands.{name}").main
    sys.argv[0] = name
    for arguments in (
        ["--help"], ["--no-such-option", "3"], ["--load", "nowhere", "--save", "/dev/null/x"],
        ["--batch-size", "many", "--tensor", "0", "--out", "/dev/null/x"],
    ):
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            try:
                main(arguments)
                status = 0
            except SystemExit as end:
                status = end.code
        loaded = [module for module in heavy if module in sys.modules]
        found.setdefault(name, []).append([" ".join(arguments), status, said.getvalue(), loaded])
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """What every command said, and which libraries were loaded by then."""
    done = subprocess.run(
        [sys.executable, "-c", STARTS, *NAMES],
        cwd=tmp_path_factory.mktemp("empty"),  # no data/raw and data/reformatted to work on
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", NAMES)
def test_help_and_mistakes_come_before_heavy_imports(started, name):
    for arguments, status, said, loaded in started[name]:
        assert not loaded, f"{name} {arguments}"
        if arguments == "--help":
            assert (status, said[:7]) == (0, "usage: ")
        else:
            assert status == 2, (arguments, said)
            assert said.startswith("error: ")
            assert said.count("\n") == 1


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_option_is_described_with_its_default(started, name):
    (_, _, said, _), *_ = started[name]
    text = " ".join(said.split())
    for field in dataclasses.fields(SCHEMAS[name]):
        shown = field.metadata.get("positional") or option(field.name)
        assert f"{shown} " in text or f"{shown}]" in text
        if field.default is not dataclasses.MISSING and isinstance(field.default, int | float):
            assert f"default: {field.default})" in text


def test_every_script_is_one_command_and_every_command_a_script():
    for folder in ("tools", "tools/benchmark", "launch"):
        assert (ROOT / folder / "prologue.py").resolve() == ROOT / "tools" / "prologue.py"
    for name, script in SCRIPTS.items():
        _, _, code = (ROOT / script).read_text().partition('"""\n')
        assert code == (
            "\nimport prologue  # noqa: F401\n\n"
            f"from megatron_mod.commands.{name} import main\n\n"
            'if __name__ == "__main__":\n    main()\n'
        )
    scripts = {*ROOT.glob("tools/*.py"), *ROOT.glob("tools/benchmark/*.py")}
    others = {path for path in scripts if path.name == "prologue.py"}
    assert scripts - others == {ROOT / script for script in SCRIPTS.values() if "tools" in script}


def test_a_script_runs_from_anywhere_without_being_installed(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    for script in ("tools/mix_datasets.py", "tools/benchmark/data.py", "launch/pretrain_router.py"):
        code = (
            "import runpy, sys; sys.path[:] = [p for p in sys.path if p != '']; "
            "sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f)]; "
            f"sys.path.insert(0, {str((ROOT / script).parent)!r}); "
            f"sys.argv = [{script!r}, '--help']; runpy.run_path({str(ROOT / script)!r}, "
            "run_name='__main__')"
        )
        command = [sys.executable, "-c", code]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr


# Numbers


def numbers(schema: type) -> list[dataclasses.Field]:
    hints = typing.get_type_hints(schema)
    return [field for field in dataclasses.fields(schema) if _holds_number(hints[field.name])]


def _holds_number(hint: object) -> bool:
    return hint in (int, float) or any(map(_holds_number, typing.get_args(hint)))


@pytest.mark.parametrize("schema", [*SCHEMAS.values(), *OF_TRAINING.values()])
def test_every_number_has_a_range_that_ends(schema):
    for field in numbers(schema):
        if field.name == "train":
            continue  # data.train: text, or a mapping whose weights are checked with the texts
        rule = field.metadata["rule"]
        assert isinstance(rule, Range), field.name
        for value in (math.nan, math.inf, -math.inf, -1, 10**23):
            assert rule.problem(value), (field.name, value)
        for value in rules._parts(field.default):
            assert value is dataclasses.MISSING or rule.problem(value) is None


@pytest.mark.parametrize(
    ("rule", "inside", "outside"),
    [
        (Range(least=0), [0, 7, 1e9], [-1, 1e9 + 1]),
        (Range(above=0), [1e-9], [0, -1]),
        (Range(above=0, most=1), [0.5, 1], [0, 1.1]),
        (Range(least=0, below=1), [0, 0.9], [1, -0.1]),
        (Range(above=0, below=1), [0.5], [0, 1]),
        (Range(least=1, most=1e15), [1e15], [0, 2e15]),
    ],
    ids=str,
)
def test_ranges(rule, inside, outside):
    assert [rule.problem(value) for value in inside] == [None] * len(inside)
    assert all(rule.problem(value) for value in outside)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("make_python_docs", ["--validation", "-4"], "--validation -4: must be at least 1"),
        ("benchmark_conversion", ["--gigabytes", "-1"], "--gigabytes -1: must be above 0"),
        ("benchmark_conversion", ["--gigabytes", ".inf"], "--gigabytes inf: must be above 0"),
        ("mix_datasets", ["--seed", "9" * 23], "must be 0 to 4294967295"),
        ("report", [".", "--curve", "0.5", "2"], "--curve 2: must be 0 to 1"),
        ("evaluate", ["--batch_size=0", "--tasks", "a"], "--batch-size 0: must be at least 1"),
        ("compare_logits", ["--tensor", "2.5"], "--tensor 2.5: must be a whole number"),
        ("convert_megatron_to_hf", ["--max-shard-size", "5 parrots"], "give a size such as 5GB"),
        ("calibrate_router", ["--max_perplexity_increase", "0.01"], "write a percentage"),
        ("evaluate", ["--dtype", "float16"], "--dtype float16: must be float32 or bfloat16"),
        ("evaluate", ["--lenght", "3"], "--lenght: no such option; did you mean --max-length?"),
        ("evaluate", ["--json"], "--json: expected one argument"),
        ("report", [], "RUN_DIR: required"),
        ("convert_hf_to_megatron", ["--dtype", "float32"], "--hf-path, --save: required"),
        ("reformat_datasets", ["--datasets", "alpacca"], "--datasets alpacca: must be vicuna_sha"),
        ("mix_datasets", ["--portions", "a=0"], "--portions a=0: must be a number above 0"),
        ("benchmark_data", ["--micro-batch-size", "3"], "must be a multiple of --micro-batch-size"),
        ("fit_stand_ins", ["--layers", "deepest"], "--layers deepest: must be all, a mapping to"),
        ("fit_stand_ins", ["--layers", "{deepest: x}"], "or a list of whole numbers, such as"),
        ("fit_stand_ins", ["--layers", "[1, 2"], "--layers [1, 2: must be all, a mapping"),
        ("fit_stand_ins", ["--tokens", "0"], "--tokens 0: must be at least 1"),
    ],
)
def test_a_mistake_names_option_value_and_constraint(tmp_path, name, arguments, message):
    required = {
        "load": _model(tmp_path), "hf_path": _model(tmp_path), "save": tmp_path / "new",
        "data": __file__, "run": None, "reformatted_dir": tmp_path, "tokenizer": tmp_path,
    }  # fmt: skip
    given = []
    if "required" not in message:
        given = [
            f"{option(field.name)}={required[field.name]}"
            for field in dataclasses.fields(SCHEMAS[name])
            if field.name in required and "positional" not in field.metadata
            and (field.default is dataclasses.MISSING or field.name == "reformatted_dir")
        ]  # fmt: skip
    if name == "calibrate_router" and not any("increase" in a for a in arguments):
        given += ["--capacity", "0.5"]
    if name == "report" and "." in arguments:
        (tmp_path / "config.yaml").touch()
        arguments = [str(tmp_path) if a == "." else a for a in arguments]
    with pytest.raises(ValueError) as caught:
        parse_options(SCHEMAS[name], [*given, *arguments])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def _model(folder: Path) -> Path:
    (folder / "config.json").write_text("{}")
    return folder


def test_all_spellings(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("a")
    hf = _model(tmp_path)
    request = parse_options(
        SCHEMAS["evaluate"],
        [
            "--hf-path", str(hf), "--tasks", "a,b", "c", "--include_path", str(hf),
            "--num_fewshot=2", "--apply_chat_template", "--batch-size", "3", "--perplexity",
            str(text),
        ],
    )  # fmt: skip
    assert request.load == str(hf)
    assert request.tasks == ("a", "b", "c")
    assert (request.num_fewshot, request.batch_size) == (2, 3)
    assert request.apply_chat_template
    hyphens = ["--load", str(hf), "--num-fewshot", "2", "--tasks", "a", "--max-length=9"]
    assert parse_options(SCHEMAS["evaluate"], hyphens).max_length == 9
    both = ["--load", str(hf), str(hf), "--hf-path", str(hf), str(hf)]
    assert parse_options(SCHEMAS["compare_logits"], both).load == (str(hf), str(hf))
    given = ["--load", str(hf), "--data", str(text), "--capacity", "0.5", "--curve"]
    assert parse_options(SCHEMAS["calibrate_router"], given).curve == ()
    mixed = ["--reformatted-dir", str(hf), "--save-path", "x", "--portions", "a=2.9", "b=1"]
    assert parse_options(SCHEMAS["mix_datasets"], mixed).portions == ("a=2.9", "b=1")
    assert parse_options(SCHEMAS["benchmark_inference"], ["--shapes", "tiny", "--granularity",
        "mlp_token", "--capacity=1", "--batches", "1", "2"]).batches == (1, 2)  # fmt: skip


def test_a_value_that_looks_like_yaml_stays_text(tmp_path):
    for name in ("~", "null", "1e3", "007", "true", "[a]", "{a: b}"):
        save = str(tmp_path / name)
        assert parse_options(SCHEMAS["get_smollm2"], ["--save", save]).save == save


def test_names_that_are_stated_elsewhere():
    assert typing.get_args(Corpus) == tuple(CORPORA)
    for name, portion in DEFAULT_PORTIONS.items():
        assert f"{name}={portion}" in " ".join(SCHEMAS["mix_datasets"].__doc__.split())


def test_sizes():
    sizes = {"5GB": 5 * 10**9, "1.5 MB": 1500000, "2GiB": 2 * 2**30, "7": 7}
    assert {text: Size.bytes_of(text) for text in sizes} == sizes
    assert not any(map(Size.bytes_of, ("", "GB", "5 parrots", "0", "-1")))


# Outputs


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_output_is_checked_before_the_work(name):
    for field in dataclasses.fields(SCHEMAS[name]):
        if field.name in ("save", "save_path", "out", "json"):
            assert isinstance(field.metadata["rule"], NewFolder | OutputFolder | OutputFile)


@pytest.mark.parametrize("rule", [NewFolder(), OutputFolder(), OutputFile()])
def test_where_nothing_can_be_written(tmp_path, monkeypatch, rule):
    file, closed = tmp_path / "file", tmp_path / "closed"
    file.touch()
    closed.mkdir()
    assert rule.problem(str(tmp_path / "new")) is None
    assert "is not a folder" in rule.problem(str(file / "new"))
    assert "is not a folder" in rule.problem(str(file / "deeper" / "new"))
    # As on a read-only file system, whose folders no user may write to.
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != closed)
    assert "may not be written" in rule.problem(str(closed / "new"))
    assert rule.problem(str(tmp_path / "new")) is None


def test_kinds_of_output(tmp_path):
    file, folder = tmp_path / "file", tmp_path / "folder"
    file.touch()
    folder.mkdir()
    (tmp_path / "lost").symlink_to("nowhere")
    assert "is a folder" in OutputFile().problem(str(folder))
    assert "make it first" in OutputFile().problem(str(tmp_path / "none" / "file"))
    assert OutputFile().problem(str(file)) is None
    assert OutputFolder().problem(str(folder)) is None
    assert OutputFolder().problem(str(file))
    for taken in (file, folder, tmp_path / "lost"):
        assert "already exists" in NewFolder().problem(str(taken))
    assert NewFolder().problem(str(tmp_path / "a" / "b")) is None


def test_a_file_that_cannot_be_read_is_one_message(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended, mistakes_told():
        (tmp_path / "none").read_text()
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'none'}: No such file or directory.\n"
    with pytest.raises(BrokenPipeError), mistakes_told():
        raise BrokenPipeError(32, "a library's own")


def test_the_nearest_name_compares_the_last_part_too():
    known = ["model.dtype", "optimizer.lr", "train.steps", "train.seed", "checkpoint.save"]
    assert nearest("lr", known) == "optimizer.lr"
    assert nearest("step", known) == "train.steps"
    assert nearest("model.save", known) == "checkpoint.save"
    assert nearest("optimiser.lr", known) == "optimizer.lr"
