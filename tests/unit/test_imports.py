"""What a command imports: not what it has no use for, which takes seconds and memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_mod.parallel import compiling
from tests.helpers import tiny

ROOT = Path(__file__).resolve().parents[2]
COMPILER, MODELS = "torch._inductor", "transformers.modeling_utils"
HEAVY = ("megatron", "torch._dynamo", COMPILER, MODELS, "matplotlib", "scipy", "lm_eval", "pandas")
REPORT = """
import json, sys
{code}
print(json.dumps([name for name in {heavy} if name in sys.modules]))
"""


def loaded(code: str, *arguments: object, heavy: tuple[str, ...] = HEAVY) -> set[str]:
    """Which of some modules a Python process has imported after some code."""
    done = subprocess.run(
        [sys.executable, "-c", REPORT.format(code=code, heavy=heavy), *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    ("modules", "needed"),
    [
        ("training.loop, conversion.convert, calibration.stand_ins", {"megatron"}),
        ("parallel.topology, evaluation.load, evaluation.evaluate, calibration.routed", set()),
        ("report.page, report.run", {"matplotlib"}),
    ],
)
def test_what_modules_import(modules, needed):
    code = "import " + ", ".join(f"megatron_mod.{name}" for name in modules.split(", "))
    assert loaded(code) == needed


def test_a_hugging_face_folder_is_evaluated_without_megatron(tmp_path):
    hf = tiny.save_tokenizer(tiny.save_llama(tmp_path / "hf", vocab_size=tiny.VOCAB))
    text = tmp_path / "text.txt"
    text.write_text("abcd " * 20)
    code = "from megatron_mod.commands.evaluate import main; main()"
    words = ("--hf-path", hf, "--perplexity", text, "--max-length", 32)
    assert loaded(code, *words, heavy=("megatron", MODELS)) == {MODELS}


@pytest.mark.parametrize("words", [["--help"], ["--steps", "-1"], ["--out", "launch"], ["--no"]])
def test_the_quickstart_answers_before_it_imports(words):
    code = (
        "sys.path.insert(0, 'launch')\nimport quickstart\n"
        "try:\n    quickstart.main()\nexcept SystemExit:\n    pass"
    )
    assert loaded(code, *words, heavy=("torch", "transformers", "megatron")) == set()


def test_only_megatron_s_functions_wait_for_their_call(monkeypatch):
    asked = []

    def compiler(model=None, **options):
        asked.append((model, options))
        return model

    monkeypatch.setattr(compiling, "_compile", compiler)

    def fused(x, *, y):
        """Of Megatron-core, as far as its name says."""
        return x, y

    fused.__module__ = "megatron.core.fusions.some"
    compiled = compiling._when_called(fused, dynamic=True)
    assert not asked
    assert compiled.__doc__ == fused.__doc__
    assert [compiled(1, y=2), compiled(3, y=4)] == [(1, 2), (3, 4)]
    assert asked == [(fused, {"dynamic": True})]

    def ours(x):
        return x

    for other in (ours, torch.nn.Linear(1, 1), None):
        asked.clear()
        compiling._when_called(other, mode="default")
        assert asked == [(other, {"mode": "default"})]
    assert torch.compile is compiling._when_called
