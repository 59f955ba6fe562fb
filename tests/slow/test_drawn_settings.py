"""Settings drawn at random: a training refuses them with a message that names one, or trains,
exports and evaluates to the same numbers everywhere.

``DRAWN_SEED`` says where drawing begins (default: 3), ``DRAWN`` how many are tried on one rank, and
on two (24); what fails is told with its settings.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from random import Random

import pytest
import torch

from megatron_mod.config import cli
from megatron_mod.config.ranks import SETTINGS
from megatron_mod.evaluation.huggingface import load_huggingface
from megatron_mod.training.plan import prepare
from tests.distributed import resume_cases
from tests.helpers.commands import read_metrics
from tests.helpers.drawn import FAMILIES, draw
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import DEFAULT, Trainer
from tests.helpers.tools import run_tool

SEED = int(os.environ.get("DRAWN_SEED", "3"))
ACCEPTED = int(os.environ.get("DRAWN", "24"))  # by one rank, and as many by two
STEPS = {
    "train.steps": 3, "train.global_batch_size": 8, "router.layers.deepest": None,
    "optimizer.lr": 0.01,
}  # fmt: skip
# What ``Trainer`` would say otherwise.
UNSET = dict.fromkeys(
    ["router.capacity", "router.training_compute", "optimizer.average_fraction"]
    + [name.replace("__", ".") for name in DEFAULT]
)
TOPOLOGIES = (
    {"tensor": 2}, {"tensor": 2, "sequence_parallel": True}, {"pipeline": 2},
    {"pipeline": 2, "virtual_pipeline": 2}, {"context": 2}, {}, {"expert": 2},
    {"context": 2, "expert": 2},
)  # fmt: skip
DEGREES = {
    **SETTINGS,
    "virtual_pipeline": "parallel.virtual_pipeline_model_parallel_size",
    "sequence_parallel": "parallel.sequence_parallel",
}
LOGITS, LOSS, LATER = 2e-4, 1e-4, 2e-3  # relative differences; after a step Adam makes much of few
SILENT = 1e-5  # a loss, or a gradient, that may be rounding


@pytest.fixture(scope="module")
def trainers(tmp_path_factory, single_process):
    """One of each family."""
    made = {}
    for name, (kind, changes) in FAMILIES.items():
        changes = {key: value for key, value in changes.items() if key != "vocab_size"}
        made[name] = Trainer(tmp_path_factory.mktemp(name), kind=kind, **changes)
        made[name].write_distinct()
    return made


def arguments(trainer: Trainer, run: Path, settings: dict) -> list[str]:
    asked = {**UNSET, **STEPS, **settings}
    return trainer.arguments(run, **{name.replace(".", "__"): v for name, v in asked.items()})


def refusal(words: list[str], *, ranks: int) -> str:
    """What a training of so many ranks says against these settings; nothing: it starts."""
    with pytest.MonkeyPatch.context() as context:
        context.setenv("WORLD_SIZE", str(ranks))
        try:
            prepare(cli.parse(words))
        except ValueError as error:
            return str(error)
    return ""


def accepted(trainers: dict, folder: Path, *, seed: int, ranks: int) -> list[tuple]:
    """Families, settings and degrees that a training starts with."""
    random, found, tries = Random(seed), [], 0
    while len(found) < ACCEPTED:
        tries += 1
        assert tries < 20 * ACCEPTED, "hardly anything is accepted"
        family, settings = draw(random)
        degrees = random.choice(TOPOLOGIES) if ranks > 1 else {}
        words = arguments(trainers[family], folder / "none", {**settings, **named(degrees)})
        said = refusal(words, ranks=ranks)
        assert not said or re.search(r"\b(router|train|lora|data|parallel)\.\w+", said), words
        if not said:
            found.append((family, settings, degrees))
    return found


def named(degrees: dict) -> dict[str, object]:
    """Degrees as settings."""
    return {DEGREES[name]: value for name, value in degrees.items()}


def told(family: str, settings: dict) -> str:
    """To find it again by; a string, which pytest does not shorten."""
    return f"{family}: {json.dumps({k: v for k, v in settings.items() if v is not None})}"


def test_what_trains_is_exported_and_evaluated_alike(trainers, tmp_path, monkeypatch, capsys):
    drawn = accepted(trainers, tmp_path, seed=SEED, ranks=1)
    for number, (family, settings, _) in enumerate(drawn):
        trainer, what = trainers[family], told(family, settings)
        run, export = tmp_path / f"run{number}", tmp_path / f"export{number}"
        words = arguments(trainer, run, settings)
        assert run_tool(monkeypatch, "train", *words) == 0, what
        words = ("--load", run, "--save", export)
        status = run_tool(monkeypatch, "convert_megatron_to_hf", *words)
        said = capsys.readouterr()
        if settings.get("router.selection") == "random":
            assert "drawn by lot" in said.err, what
            continue
        assert status == 0, f"{what}: {said.err}"
        check_export(what, trainer, run, export, monkeypatch)


def check_export(what: str, trainer: Trainer, run: Path, export: Path, monkeypatch) -> None:
    found = export.parent / "found.json"
    words = ("--load", run, "--hf-path", export, "--json", found)
    assert run_tool(monkeypatch, "compare_logits", *words) == 0, what
    perplexities = []
    for folder in (("--load", run), ("--hf-path", export)):
        words = (*folder, "--perplexity", trainer.text, "--max-length", 64, "--json", found)
        assert run_tool(monkeypatch, "evaluate", *words) == 0, what
        perplexities.append(json.loads(found.read_text())["perplexity"])
    assert perplexities[0] == pytest.approx(perplexities[1], rel=LOGITS), what
    model, _ = load_huggingface(export)
    ids = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(1))
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cached, plain = (model.generate(ids, use_cache=cache, **options) for cache in (True, False))
    assert torch.equal(cached, plain), what


def test_two_ranks_train_as_one_does(trainers, tmp_path, monkeypatch):
    drawn, jobs = accepted(trainers, tmp_path, seed=SEED + 1, ranks=2), []
    for number, (family, settings, degrees) in enumerate(drawn):
        own = {**settings, **named(degrees)}
        words = arguments(trainers[family], tmp_path / f"two{number}", own)
        layout = {name: v for name, v in degrees.items() if name != "sequence_parallel"}
        jobs.append((None, layout, words))
    run_ranks(
        resume_cases.trainings, jobs, world=2, folder=tmp_path / "ranks", seconds=60 * ACCEPTED
    )
    for number, (family, settings, degrees) in enumerate(drawn):
        one = tmp_path / f"one{number}"
        what = told(family, {**settings, **named(degrees)})
        words = arguments(trainers[family], one, settings)
        assert run_tool(monkeypatch, "train", *words) == 0, what
        lines = (read_metrics(run) for run in (tmp_path / f"two{number}", one))
        for ours, theirs in zip(*lines, strict=True):
            rel = LOSS if theirs["step"] == 1 else LATER
            assert ours["capacity"] == pytest.approx(theirs["capacity"], abs=SILENT), what
            for key in ("task_loss", "grad_norm"):
                near = pytest.approx(theirs[key], rel=rel, abs=SILENT)
                assert ours[key] == near, f"{key} of step {theirs['step']}, {what}"
            if settings["train.loss"] == "distill" and min(theirs["capacity"]) == 1:
                break  # nothing to distil: its gradient is rounding, of which Adam makes a step
