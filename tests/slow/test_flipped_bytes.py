"""A flipped bit anywhere in a base, a run, an export or the cache: the same numbers, or one message
that names the file."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from megatron_mod.checkpoint.checksums import file_table
from megatron_mod.conversion import convert
from megatron_mod.conversion.routers import read_step
from megatron_mod.conversion.source import open_base, open_source
from megatron_mod.evaluation.load import load_backend
from megatron_mod.evaluation.perplexity import perplexity, read_rows
from megatron_mod.parallel.topology import Topology
from tests.helpers.faults import SEED, Flip, files_with_content, random_flip, told
from tests.helpers.runs import Trainer, metrics

pytestmark = pytest.mark.usefixtures("single_process")
FLIPS = 100
ONE = Topology(tensor=1, pipeline=1, data=1)
FOLDERS = ("base", "run", "export", "dense", "cache")


@dataclass
class Whole:
    """Folders without a fault, and what reads each of them: a name, and what it comes to."""

    trainer: Trainer
    folder: Path

    def train(self, run: Path, **changes: object) -> tuple:
        settings = {"data__cache": self.folder / "cache", **changes}
        self.trainer.train(run, **settings)
        source = open_source(run, base=settings.get("model__checkpoint"))
        added = read_step(source.step, source.routing)
        return metrics(run), [
            (layer, name, tensor.tolist())
            for layer, own in added.items()
            for name, tensor in own.items()
        ]

    def start(self, out: Path, **changes: object) -> tuple:
        return self.train(out, train__steps=3, **changes)

    def judge(self, folder: Path) -> float:
        settings = {"max_length": 64, "batch_size": 4, "pooling": None, "dtype": "float32"}
        backend = load_backend(folder, ONE, **settings)
        rows = read_rows(str(self.trainer.text), backend.tokenizer, max_length=64)
        return perplexity(backend, rows).perplexity

    def export(self, run: Path, out: Path, **where: object) -> dict:
        convert.megatron_to_hf(run, out, **where)
        return file_table(out, files_with_content(out), together=False)

    def convert(self, hf: Path, out: Path) -> str:
        convert.hf_to_megatron(hf, out)
        return open_base(out).fingerprint()

    def readers(self, kind: str) -> dict[str, Callable[[Path, Path], object]]:
        """What reads a folder of a kind: each takes the folder and a path for what it writes."""
        run = self.folder / "run"
        return {
            "base": {
                "start": lambda base, out: self.start(out, model__checkpoint=base),
                "judge": lambda base, out: self.judge(base),
                "export": lambda base, out: self.export(run, out, base=base),
            },
            "run": {
                "resume": lambda run, out: self.train(run),
                "export": lambda run, out: self.export(run, out),
                "judge": lambda run, out: self.judge(run),
            },
            "export": {"judge": lambda export, out: self.judge(export)},
            "dense": {
                "convert": self.convert,
                "start": lambda dense, out: self.start(
                    out, model__checkpoint=None, model__hf_path=dense
                ),
            },
            "cache": {"start": lambda cache, out: self.start(out, data__cache=cache)},
        }[kind]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, single_process):
    folder = tmp_path_factory.mktemp("whole")
    whole = Whole(Trainer(folder), folder)
    whole.train(folder / "run")
    shutil.rmtree(folder / "run" / "step_00000006")  # so that there is something to resume
    convert.megatron_to_hf(folder / "run", folder / "export")
    convert.megatron_to_hf(folder / "base", folder / "dense")
    return whole


@pytest.fixture(scope="module")
def expected(whole, tmp_path_factory):
    """What every reader comes to without a fault."""
    results = {}
    for kind in FOLDERS:
        for name, read in whole.readers(kind).items():
            out = tmp_path_factory.mktemp(f"{kind}_{name}")
            shutil.copytree(whole.folder / kind, out / kind)
            results[kind, name] = read(out / kind, out / "out")
    return results


def flips(whole: Whole) -> list[tuple[str, str, Flip]]:
    """Every file of every folder once, then any; folder, reader and flip."""
    generator = random.Random(SEED)
    files = {kind: files_with_content(whole.folder / kind) for kind in FOLDERS}
    chosen = [(kind, name) for kind in FOLDERS for name in files[kind]]
    while len(chosen) < FLIPS:
        kind = generator.choice(FOLDERS)
        chosen.append((kind, generator.choice(files[kind])))
    return [
        (kind, generator.choice(list(whole.readers(kind))),
         random_flip(whole.folder / kind, name, generator))
        for kind, name in chosen
    ]  # fmt: skip


def test_a_flipped_bit_is_found_or_changes_nothing(whole, expected, tmp_path, capsys):
    wrong = []
    for number, (kind, reader, flip) in enumerate(flips(whole)):
        out = tmp_path / str(number)
        folder = out / kind
        shutil.copytree(whole.folder / kind, folder)
        flip.apply(folder)
        try:
            result, said = told(partial(whole.readers(kind)[reader], folder, out / "out"), capsys)
            if result is None:
                assert str(folder / flip.file) in said, f"does not name the file: {said}"
            elif result != expected[kind, reader]:
                # A gap in the log stops nothing, and is said.
                assert (kind, flip.file, reader) == ("run", "metrics.jsonl", "resume")
                assert str(folder / flip.file) in said
                (log, routers), (whole_log, whole_routers) = result, expected[kind, reader]
                assert (log[-2:], routers) == (whole_log[-2:], whole_routers)
        except BaseException as error:
            wrong.append(f"{flip} of {kind}, then {reader}: {type(error).__name__}: {error}")
        shutil.rmtree(out)
    assert not wrong, f"FAULTS_SEED={SEED}:\n" + "\n".join(wrong)
