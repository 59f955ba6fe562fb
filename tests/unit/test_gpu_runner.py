"""The runner of the GPU tests' parts: what it keeps, whatever becomes of a part."""

from __future__ import annotations

import importlib.metadata
import json
import sys
import time

import pytest
import torch

from tests.gpu import environment
from tests.gpu.runner import LEFT_OUT, OUT_OF_TIME, Part, Runner, read_json
from tests.helpers.jobs import is_alive

# Starts a process that would outlive it, says which, and waits.
HANGS = "trap '' TERM; sleep 600 & echo $! >child; sleep 600"  # a shell's, which starts at once


@pytest.fixture
def runner(tmp_path, monkeypatch):
    monkeypatch.setattr("tests.gpu.runner.GRACE", 0.5)
    return Runner(tmp_path / "gpu.json", tmp_path / "logs", cwd=tmp_path, seconds=60)


WRITES = "open({path!r}, 'w').write('{{\"speed\": 3}}')"


def part(name: str, code: str, seconds: float = 30, **options) -> Part:
    return Part(name, [sys.executable, "-c", code], seconds, **options)


def test_every_part_is_kept_and_one_that_hangs_is_ended_with_all_it_started(runner, tmp_path):
    wrote = tmp_path / "figures.json"
    parts = [
        part("good", WRITES.format(path=str(wrote)), figures=read_json(wrote)),
        part("bad", "print('what was wrong'); raise SystemExit(3)", figures=read_json(wrote)),
        Part("hangs", ["sh", "-c", HANGS], 2),
        part("silent", "pass", figures=read_json(tmp_path / "nothing.json")),
    ]  # fmt: skip
    assert runner.run(parts) is False
    report = json.loads((tmp_path / "gpu.json").read_text())
    found = report["parts"]
    assert report["complete"]
    assert [one["status"] for one in found.values()] == ["passed", "failed", OUT_OF_TIME, "failed"]
    assert found["good"]["figures"] == found["bad"]["figures"] == {"speed": 3}
    assert found["bad"]["output"] == ["what was wrong"]
    assert found["bad"]["exit_status"] == 3
    assert "nothing.json" in found["silent"]["no_figures"]
    assert not is_alive(int((tmp_path / "child").read_text()))


def test_all_passed_is_said(runner):
    assert runner.run([part("one", "pass"), part("two", "pass")]) is True


def test_what_follows_a_part_that_is_needed_is_left_out_if_it_fails(runner):
    assert not runner.run([part("first", "raise SystemExit(1)", is_needed=True), part("two", "")])
    assert runner.report["parts"]["two"] == {"status": LEFT_OUT, "why": "what it needs failed"}


def test_when_time_is_up_the_rest_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr("tests.gpu.runner.LEAST", 0.5)
    runner = Runner(tmp_path / "gpu.json", tmp_path / "logs", cwd=tmp_path, seconds=1)
    began = time.monotonic()
    assert not runner.run([part("long", "import time; time.sleep(600)"), part("late", "")])
    assert time.monotonic() - began < 30
    statuses = {name: one["status"] for name, one in runner.report["parts"].items()}
    assert statuses == {"long": OUT_OF_TIME, "late": LEFT_OUT}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_environment_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(environment, "NEEDED", ("torch", "numpy"))
    monkeypatch.setattr(environment, "WANTED", ("no_such_package",))
    assert environment.main(str(tmp_path / "environment.json")) == 1
    assert "finds no CUDA device" in capsys.readouterr().out
    found = json.loads((tmp_path / "environment.json").read_text())
    assert found["versions"]["torch"] == importlib.metadata.version("torch")
    assert found["missing"].keys() == {"no_such_package"}
    assert len(found["problems"]) == 1
