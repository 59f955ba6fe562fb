"""The doctor says what a training would do, and is well where everything else is broken."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from email.message import Message
from pathlib import Path

import pytest

from megatron_mod.commands.doctor import Doctor, main
from megatron_mod.config.options import parse_options
from megatron_mod.doctor import collective, diagnosis, versions
from megatron_mod.doctor.findings import Findings
from megatron_mod.doctor.machine import machine
from megatron_mod.doctor.page import page

ROOT = Path(__file__).resolve().parents[2]
WORKS = {"ranks": 2, "works": True, "backend": "gloo", "seconds": 0.0, "error": None}
TRANSFORMERS = "AutoModelForCausalLM = AutoTokenizer = None"


def run(*words: str, **environment: str):
    return subprocess.run(
        [sys.executable, "-m", "megatron_mod.doctor", *words],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
    )


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Writes packages that are found before those that are installed, here and by ranks."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(diagnosis, "try_collective", lambda ranks, environment: WORKS)

    def write(name: str, text: str = "", version: str | None = None) -> None:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(text)
        if version:
            about = tmp_path / f"{name}-{version}.dist-info" / "METADATA"
            about.parent.mkdir()
            about.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")

    return write


def texts(found: dict, kind: str) -> str:
    return "\n".join(each["what"] for each in found[kind])


def test_what_it_says_is_what_a_training_asks():
    from megatron_mod.model.specs import choose_implementation
    from megatron_mod.training.kernels import kernels

    done = run("--json")
    assert done.returncode == 0, done.stdout
    found = json.loads(done.stdout)
    assert found["can_train"]
    assert not found["problems"]
    used = {part: each["what"] for part, each in found["uses"].items()}
    assert used == kernels(choose_implementation())
    assert found["collective"]["works"]
    assert found["collective"]["backend"] == used["communication"]
    assert found["versions"]["megatron-core"]["supported"] == ">=0.16.1,<0.20"
    if not found["torch"]["uses_gpus"]:
        assert {each["why_not"] for each in found["uses"].values()} == {"there is no GPU"}


def test_another_apex_an_old_release_and_what_does_not_import(packages, tmp_path, capsys):
    packages("apex", "raise AttributeError('of a web framework')", "0.9.10")
    packages("transformers", "raise RuntimeError('built for another torch')", "4.40.0")
    with pytest.raises(SystemExit) as ended:
        main(["--json", str(tmp_path / "found.json")])
    assert ended.value.code == 1
    found = json.loads((tmp_path / "found.json").read_text())
    assert "transformers 4.40.0 is not one that" in texts(found, "problems")
    failed = "importing transformers fails: RuntimeError: built for another torch"
    assert texts(found, "problems").count("built for another torch") == 1
    assert failed in texts(found, "problems")
    assert "importing megatron.core" not in texts(found, "problems")
    assert "apex 0.9.10 is not used: it is not NVIDIA's" in texts(found, "warnings")
    shown = capsys.readouterr().out
    assert "pip uninstall apex" in shown
    assert "A training cannot run here" in shown


def test_a_library_that_ends_python_is_named(packages):
    packages("transformers", TRANSFORMERS)
    packages("transformer_engine", "import os; os.abort()")
    found = diagnosis.diagnose()
    assert not found["can_train"]
    assert "importing megatron.core ends Python with status -6" in texts(found, "problems")
    assert found["uses"] is None


def test_ranks_that_do_not_answer_are_a_problem(monkeypatch):
    found = {"cuda": None, "uses_gpus": False, "gpus": [], "warnings": []}
    monkeypatch.setattr(diagnosis, "_probe", lambda *arguments: {"torch": found})
    monkeypatch.setattr(
        diagnosis,
        "try_collective",
        lambda ranks, environment: collective.try_collective(ranks, environment, seconds=0.5),
    )
    found = diagnosis.diagnose()
    assert "of 2 rank(s) on this machine fails: no answer within 0.5 s" in texts(found, "problems")


def test_the_line_that_says_why_ranks_failed():
    said = "Traceback\n  RuntimeError: no address for: none0\ntorch.x.ChildFailedError: \n====\n"
    assert collective._reason(said) == "RuntimeError: no address for: none0"
    assert collective._reason("Segmentation fault\n\n") == "Segmentation fault"
    assert collective._reason("") == "it ended without a word"


def test_where_not_even_options_can_be_read(packages, tmp_path):
    for name in ("docstring_parser", "torch"):
        packages(name, f"raise ImportError('No module named {name}')")
    done = run("--json", "found.json", PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    assert done.returncode == 1, done.stderr
    assert "Options cannot be read here: No module named docstring_parser" in done.stderr
    assert "importing torch fails: ImportError: No module named torch" in done.stdout


def test_libraries_that_are_missing_or_not_of_a_release_that_is_supported(monkeypatch):
    installed = {"torch": "2.5.1", "megatron-core": None, "transformers": "5.9"}
    monkeypatch.setattr(versions, "_installed", lambda name: installed.get(name, "1.0"))
    about = Message()
    monkeypatch.setattr(versions.metadata, "metadata", lambda name: about)
    about["Requires-Python"] = ">=3.99"
    for requirement in ("torch>=2.6", "megatron-core>=0.16.1,<0.20", "transformers<6,>=4.57"):
        about["Requires-Dist"] = requirement
    about["Requires-Dist"] = 'pytest>=8; extra == "test"'
    findings = Findings()
    found = versions.versions(findings)
    assert "pytest" not in found
    said = [(each["what"], each["remedy"]) for each in findings.problems]
    python = platform.python_version()
    assert said == [
        (f"python {python} is not one that megatron_mod supports: >=3.99", "use another Python"),
        ("torch 2.5.1 is not one that megatron_mod supports: >=2.6", 'pip install "torch>=2.6"'),
        ("megatron-core is not installed", versions.INSTALL),
    ]


def test_gpus_that_torch_does_not_use(tmp_path, monkeypatch):
    listed = tmp_path / "nvidia-smi"
    listed.write_text("#!/bin/sh\necho '550.54.15, NVIDIA H100'\necho '550.54.15, NVIDIA H100'\n")
    listed.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    seen = machine(Findings(), {})
    assert (seen["driver"], seen["gpus"]) == ("550.54.15", ["NVIDIA H100"] * 2)
    torch = {"cuda": None, "uses_gpus": False, "gpus": [], "warnings": []}
    for changes, environment, said in (
        ({}, {}, "torch is built for the CPU"),
        ({"cuda": "13.0"}, {}, "built for CUDA 13.0, the driver is 550.54.15"),
        ({"cuda": "13.0"}, {"CUDA_VISIBLE_DEVICES": ""}, "CUDA_VISIBLE_DEVICES="),
    ):
        findings = Findings()
        diagnosis._check_gpus({**seen, "environment": environment}, {**torch, **changes}, findings)
        assert said in findings.warnings[0]["what"]


@pytest.mark.parametrize(
    ("variable", "value", "warns"),
    [
        ("GLOO_SOCKET_IFNAME", "none0", True), ("GLOO_SOCKET_IFNAME", "lo", False),
        ("GLOO_SOCKET_IFNAME", "none0,lo", False), ("NCCL_SOCKET_IFNAME", "none", True),
        ("NCCL_SOCKET_IFNAME", "l", False), ("NCCL_SOCKET_IFNAME", "=l", True),
        ("NCCL_SOCKET_IFNAME", "^docker", False), ("OMP_NUM_THREADS", "4096", True),
        ("OMP_NUM_THREADS", "1", False), ("CUDA_LAUNCH_BLOCKING", "1", True),
    ],
)  # fmt: skip
def test_settings_that_are_meant_for_another_machine(variable, value, warns):
    findings = Findings()
    seen = machine(findings, {variable: value, "HOME": "/"})
    assert seen["environment"] == {variable: value}
    assert [each["what"].partition("=")[0] for each in findings.warnings] == [variable] * warns


def test_the_page_of_a_gpu():
    uses = {"what": "TECoreAttention (Transformer Engine)", "better": None, "why_not": None}
    gpu = {"name": "NVIDIA H100", "memory_bytes": 80 * 2**30, "capability": "9.0"}
    found = {
        "can_train": True,
        "folder": "/here",
        "versions": {"torch": {"version": "2.11.0", "supported": ">=2.6"}},
        "machine": machine(Findings(), {"NCCL_DEBUG": "INFO"}),
        "torch": {"cuda": "13.0", "nccl": "2.28.9", "gpus": [gpu]},
        "uses": {"attention": uses},
        "collective": {**WORKS, "ranks": 1, "backend": "nccl"},
        "problems": [],
        "warnings": [],
    }
    text = page(found)
    assert "torch              2.11.0, built for CUDA 13.0, nccl 2.28.9 (supported: >=2.6)" in text
    assert "GPU 0              NVIDIA H100, 80 GiB, compute capability 9.0" in text
    assert "attention          TECoreAttention (Transformer Engine)\n" in text
    assert "A training can run here, on 1 GPU(s)." in text
    assert max(map(len, text.splitlines())) <= 100


def test_json_with_and_without_a_file():
    assert parse_options(Doctor, []).json is None
    assert parse_options(Doctor, ["--json"]).json == "-"
    assert parse_options(Doctor, ["--json", "found.json"]).json == "found.json"
    with pytest.raises(ValueError, match="is not a folder"):
        parse_options(Doctor, ["--json", "/dev/null/x"])
