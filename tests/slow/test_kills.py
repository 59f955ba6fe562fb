"""``kill -9`` at forty random moments of trainings, conversions and exports; the same command again
comes to the same numbers."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from megatron_mod.checkpoint.checksums import file_table
from megatron_mod.conversion.convert import hf_to_megatron
from tests.helpers import tiny
from tests.helpers.faults import SEED, files_with_content, wait_until
from tests.helpers.jobs import ROOT, Job, wait_for_step
from tests.helpers.runs import Trainer, metrics
from tests.helpers.text import write_lines

pytestmark = pytest.mark.usefixtures("single_process")
OF_A_RUN, OF_A_START, OF_A_TOOL = 20, 8, 6  # kills: 20 + 8 + 2 * 6 = 40
RANKS = 2


@pytest.fixture(scope="module")
def trainer(tmp_path_factory, single_process):
    return Trainer(tmp_path_factory.mktemp("kills"))


def wait_for(job: Job, text: str, *, seconds: int = 200) -> None:
    deadline = time.monotonic() + seconds
    while text not in job.log.read_text():
        assert job.process.poll() is None, job.log.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_run_survives_twenty_kills(trainer, tmp_path):
    settings = {"train__steps": 4000, "checkpoint__interval": 1}
    run, generator, killed = tmp_path / "run", random.Random(SEED), []
    arguments = trainer.arguments(run, **settings)
    while len(killed) < OF_A_RUN:
        job = Job(arguments, ranks=RANKS, log=tmp_path / f"{len(killed)}.log")
        if generator.random() < 0.2:  # while it starts
            time.sleep(generator.uniform(0, 10))
        else:  # while it trains, which is mostly saving here
            wait_for(job, "  loss ")
            time.sleep(generator.uniform(0, 4))
        assert job.process.poll() is None, job.log.read_text()
        victim = generator.choice([job.process.pid, *job.ranks()])
        job.kill(victim)
        steps = sorted(int(path.name[5:]) for path in run.glob("step_*"))
        killed.append(steps[-1] if steps else 0)
    assert killed == sorted(killed), f"FAULTS_SEED={SEED}"
    assert killed[-1] > killed[0]
    job = Job(arguments, ranks=RANKS, log=tmp_path / "last.log")
    wait_for_step(run, killed[-1] + 3)
    job.kill(job.process.pid)
    found = metrics(run)
    assert [line["step"] for line in found] == list(range(1, len(found) + 1))
    job = Job(trainer.arguments(tmp_path / "whole", **settings), ranks=RANKS, log=tmp_path / "log")
    wait_for_step(tmp_path / "whole", len(found) + 1, seconds=600)
    job.kill(job.process.pid)
    expected = metrics(tmp_path / "whole")[: len(found)]
    assert found == expected, f"FAULTS_SEED={SEED}: to the last bit, whatever happened"


# What a first start does, each by the path that tells that it has begun, within RUN or CACHE. Half
# written files are seen for a millisecond, or missed; what they become is there after them.
STARTS = (
    ("cache", ".*.incomplete"),
    ("run", "*config.yaml*"),
    ("run", "*step_00000001*"),
    ("run", "*step_00000002*"),
)


@pytest.mark.parametrize("turn", range(OF_A_START))
def test_a_first_start_survives_a_kill(trainer, expected_start, tmp_path, turn):
    generator = random.Random(f"{SEED} {turn}")
    settings, expected = expected_start
    folder, pattern = STARTS[turn % len(STARTS)]
    settings = {**settings, "data__cache": tmp_path / "cache"}
    arguments = trainer.arguments(tmp_path / "run", **settings)
    job = Job(arguments, ranks=RANKS, log=tmp_path / "first.log")
    wait_until(lambda: any((tmp_path / folder).glob(pattern)), job.process)
    time.sleep(generator.uniform(0, 0.01) if turn < len(STARTS) else generator.uniform(0, 0.5))
    if job.process.poll() is None:
        job.kill(generator.choice([job.process.pid, *job.ranks()]))
    said = Job(arguments, ranks=RANKS, log=tmp_path / "second.log").finish()
    assert metrics(tmp_path / "run") == expected, f"FAULTS_SEED={SEED}: {said}"


@pytest.fixture(scope="module")
def expected_start(trainer, tmp_path_factory):
    """Settings of a short training of much text, and its metrics on as many ranks."""
    folder = tmp_path_factory.mktemp("start")
    rows = [{"prompt": "ab" * (1 + n % 7), "completion": f"cd{n}"} for n in range(8000)]
    text = write_lines(folder / "train.jsonl", rows)
    settings = {"data__train": text, "train__steps": 2, "checkpoint__interval": 1}
    Job(trainer.arguments(folder / "run", **settings), ranks=RANKS, log=folder / "log").finish()
    return settings, metrics(folder / "run")


def test_the_filling_of_the_prefix_cache_survives_kills(trainer, tmp_path):
    rows = [{"prompt": "ab" * (1 + n % 7), "completion": f"cd{n}"} for n in range(3000)]
    text, generator, states = write_lines(tmp_path / "a.jsonl", rows), random.Random(SEED), {}
    settings = {
        "data__train": text, "train__steps": 2, "train__global_batch_size": 1500,
        "train__frozen_prefix": "cache",
    }  # fmt: skip

    def job(name: str, log: str) -> Job:
        states[name] = tmp_path / f"{name}-states"
        own = {**settings, "train__prefix_cache": states[name]}
        return Job(trainer.arguments(tmp_path / name, **own), ranks=RANKS, log=tmp_path / log)

    def kept() -> int:
        files = states["run"].glob("*/checksums")
        return sum(np.count_nonzero(np.fromfile(file, dtype="<u8")) for file in files)

    counts = [0]
    while len(counts) < 4:
        killed = job("run", f"{len(counts)}.log")
        wait_until(lambda: kept() > counts[-1] + 200, killed.process)
        killed.kill(generator.choice([killed.process.pid, *killed.ranks()]))
        counts.append(kept())
    assert counts[-1] < 3000, "killed too late to show anything"
    said = job("run", "last.log").finish()
    assert f"computed once: {3000 - counts[-1]} samples" in said
    job("whole", "whole.log").finish()
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole"), f"FAULTS_SEED={SEED}"
    for name in ("states", "checksums"):
        found, wanted = (next(states[run].glob(f"*/{name}")) for run in ("run", "whole"))
        assert found.read_bytes() == wanted.read_bytes(), f"FAULTS_SEED={SEED}: {name}"


@pytest.fixture(scope="module")
def larger(tmp_path_factory, single_process):
    """A model that takes a while to write, as Hugging Face and as base."""
    folder = tmp_path_factory.mktemp("larger")
    hf = tiny.save_llama(
        folder / "hf", hidden_size=256, intermediate_size=512, num_hidden_layers=12
    )
    hf_to_megatron(hf, folder / "base")
    return folder


TOOLS = {
    "convert_hf_to_megatron.py": lambda larger: ["--hf-path", larger / "hf"],
    "convert_megatron_to_hf.py": lambda larger: ["--load", larger / "base"],
}


@pytest.mark.parametrize("turn", range(OF_A_TOOL))
@pytest.mark.parametrize("tool", TOOLS)
def test_a_conversion_survives_a_kill(larger, expected_files, tmp_path, tool, turn):
    generator = random.Random(f"{SEED} {tool} {turn}")
    out = tmp_path / "out"
    command = [sys.executable, f"tools/{tool}", *TOOLS[tool](larger), "--save", out]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL) as job:
        if turn < OF_A_TOOL - 1:
            wait_until(lambda: (tmp_path / ".out.incomplete").exists(), job)
        time.sleep(generator.uniform(0, 0.6))
        job.send_signal(signal.SIGKILL)
    if out.exists():
        assert contents(out) == expected_files[tool], f"FAULTS_SEED={SEED}: half written"
        shutil.rmtree(out)
    subprocess.run(command, cwd=ROOT, check=True, stderr=subprocess.DEVNULL)
    assert contents(out) == expected_files[tool], f"FAULTS_SEED={SEED}"
    assert os.listdir(tmp_path) == ["out"]


@pytest.fixture(scope="module")
def expected_files(larger, tmp_path_factory):
    """What each tool writes when nothing stops it."""
    found = {}
    for tool, arguments in TOOLS.items():
        out = tmp_path_factory.mktemp("whole") / "out"
        command = [sys.executable, f"tools/{tool}", *arguments(larger), "--save", out]
        subprocess.run(command, cwd=ROOT, check=True, stderr=subprocess.DEVNULL)
        found[tool] = contents(out)
    return found


def contents(folder: Path) -> dict:
    return file_table(folder, files_with_content(folder), together=False)
