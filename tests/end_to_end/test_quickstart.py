"""The whole path as a user runs it, on a tiny model: quickstart, README commands, mistakes."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_mod.checkpoint.distributed import load_tensors
from megatron_mod.config import cli
from megatron_mod.config.recipes import PUBLISHED
from megatron_mod.evaluation.perplexity import read_rows
from megatron_mod.evaluation.work import Work
from megatron_mod.routing.scheme import Place
from tests.helpers import formula, tiny

ROOT = Path(__file__).resolve().parents[2]


def run(*command: object, ok: bool = True, **environment: str) -> str:
    """Run a command in the repository; its whole output. ``ok``: whether it has to succeed."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=400,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip
    assert (done.returncode == 0) is ok, done.stdout
    return done.stdout


def torchrun(ranks: int, *command: object, **options) -> str:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return run(*launcher, "--nproc_per_node", ranks, *command, **options)


@pytest.fixture(scope="module")
def tiny_hf(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf") / "tiny"
    tiny.save_llama(folder, vocab_size=tiny.VOCAB, max_position_embeddings=320)
    return tiny.save_tokenizer(folder)


@pytest.fixture(scope="module")
def quickstart(tiny_hf, tmp_path_factory):
    """What ``launch/quickstart.py`` printed, and where it put everything."""
    out = tmp_path_factory.mktemp("quickstart") / "out"
    printed = run(
        sys.executable, "launch/quickstart.py", "--hf-path", tiny_hf,
        "--steps", 3, "--held-out", 12, "--out", out,
    )  # fmt: skip
    return printed, out


SHAPE = {
    "model": str, "device": str, "world_size": int, "export_path": str, "static_method": str,
    "parallel": {"tensor": int, "pipeline": int, "data": int},
    "train": {
        "steps": int, "tokens": int, "tokens_per_second": float, "loss_first": float,
        "loss_last": float, "trainable_parameters": int, "frozen_parameters_changed": int,
    },
    "parity": {"hf_to_megatron_max_rel": float, "megatron_to_hf_max_rel": float},
    "quality": {
        "dense_perplexity": float, "routed_perplexity": float, "static_perplexity": float,
        "static_method": str, "static_removed_layers": list, "static_capacity": float,
        "static_counted_speedup": float, "work": {"routed": float, "static": float},
        "eval_tokens": int, "pooling": str, "published_perplexity": float,
        "published_capacity": float, "published_work": float,
    },
    "capacity": {"target": float, "mean": float, "per_layer": dict},
    "speed": {
        "context_tokens": int, "capacity": float, "counted": float,
        **{
            phase: {
                "dense_s": float, "routed_s": float, "speedup": float, "speedup_low": float,
                "speedup_high": float, "confidence": float, "pairs": int, "is_measurable": bool,
            }
            for phase in ("prefill", "decode")
        },
    },
}  # fmt: skip


def check_shape(value, shape):
    if not isinstance(shape, dict):
        assert isinstance(value, shape), (value, shape)
        return
    for key, inner in shape.items():
        assert key in value, key
        check_shape(value[key], inner)


def test_quickstart_report(quickstart):
    printed, out = quickstart
    report = json.loads((out / "report.json").read_text())
    check_shape(report, SHAPE)
    assert report["parallel"] == {"tensor": 1, "pipeline": 2, "data": 1}
    assert report["train"]["steps"] == 3
    assert len((out / "data" / "held_out.jsonl").read_text().splitlines()) == 12
    assert report["train"]["trainable_parameters"] == 2 * 33  # with biases
    assert report["train"]["frozen_parameters_changed"] == 0
    assert max(report["parity"].values()) <= 2e-5
    assert list(report["capacity"]["per_layer"]) == ["1", "2"]
    for phase in ("prefill", "decode"):
        timing = report["speed"][phase]
        assert timing["speedup"] == pytest.approx(timing["dense_s"] / timing["routed_s"])
        told = not timing["speedup_low"] <= 1 <= timing["speedup_high"]
        assert timing["is_measurable"] == told
    batches = [report["speed"][phase]["batch"] for phase in ("prefill", "decode")]
    assert batches == [4, 1], "of the six longer samples, and of a question"
    assert "x counted)" in printed
    assert 0.7 < report["speed"]["counted"] < 3, "all rows of a batch on either side"
    check_static(report, out)
    check_published(report, out)
    removed = len(report["quality"]["static_removed_layers"])
    assert f"best static removal (greedy, {removed} layers) " in printed
    for word in ("capacity", "perplexity", "prefill", "decode", "step 3/3"):
        assert word in printed
    assert f"Done: 3 steps; the routers are in {out / 'run'}." in printed
    export = f"  python tools/convert_megatron_to_hf.py --load {out / 'run'} --save "
    assert f"{export}{out / 'run_export'}\n" in printed
    evaluate = f"  python tools/evaluate.py --load {out / 'run_export'} --perplexity "
    assert f"{evaluate}{out / 'data' / 'validation.jsonl'}\n" in printed


def check_static(report: dict, out: Path) -> None:
    """Removal that is nearest to the routed work, measured on the untouched original."""
    quality, layers = report["quality"], (1, 2)
    removed, steps = quality["static_removed_layers"], read_metrics(out / "run")
    assert report["static_method"] == quality["static_method"] == "greedy"
    assert quality["static_capacity"] == 1 - len(removed) / len(layers)
    assert quality["work"]["static"] == pytest.approx(1 / quality["static_counted_speedup"])
    assert report["train"]["loss_first"] == steps[0]["task_loss"]
    assert report["train"]["loss_last"] == steps[-1]["task_loss"]
    original = Path(report["model"])
    dense, tokenizer = formula.load_dense(original), AutoTokenizer.from_pretrained(original)
    rows = read_rows(out / "data" / "held_out.jsonl", tokenizer, max_length=256)
    thresholds = [1.0 if layer in removed else 0.0 for layer in layers]
    work = Work.of(json.loads((out / "export" / "config.json").read_text())).at(thresholds)
    tensors = load_file(out / "export" / "model.safetensors")
    more = {
        layer: {
            name: tensors[f"model.layers.{layer}.{name}"]
            for name in ("stand_in.down.weight", "stand_in.up.weight", "stand_in.up.bias")
        }
        for layer in layers
    }
    borders = {layer: math.inf if layer in removed else -math.inf for layer in layers}
    routers = dict.fromkeys(layers, torch.zeros(1, 32))
    nats = labels = flops = whole = 0
    for row in rows:
        with torch.no_grad():
            logits, made, _ = formula.forward(
                dense, row.ids, routers, borders=borders, granularity="block_token", more=more
            )
        asked = torch.tensor(row.labels)
        nats += float(torch.nn.functional.cross_entropy(logits, asked, reduction="sum"))
        labels += row.num_labels
        flops += work.prefill(len(row.ids), {Place(n, "block"): m.bool() for n, m in made.items()})
        whole += work.prefill(len(row.ids), {})
    assert quality["static_perplexity"] == pytest.approx(math.exp(nats / labels), rel=1e-4)
    assert quality["work"]["static"] == pytest.approx(flops / whole)
    spared = (1 - quality["work"]["static"]) / max(len(removed), 1)
    if 0 < len(removed) < len(layers):
        assert abs(quality["work"]["routed"] - quality["work"]["static"]) <= spared / 2
    kept = report["speed"]["capacity"]
    assert (report["speed"]["counted"] > 1) == (kept < 1)


def check_published(report: dict, out: Path) -> None:
    """The other run's perplexity and work are those of its own decisions."""
    hf = out.parent / "published_hf"
    run(
        sys.executable, "tools/convert_megatron_to_hf.py",
        *("--load", out / "published", "--save", hf),
    )  # fmt: skip
    config = json.loads((hf / "config.json").read_text())
    tensors = load_file(hf / "model.safetensors")
    layers = config["routing"]["layers"]
    routers = {layer: tensors[f"model.layers.{layer}.router.weight"] for layer in layers}
    original, quality = Path(report["model"]), report["quality"]
    dense, tokenizer = formula.load_dense(original), AutoTokenizer.from_pretrained(original)
    work = Work.of(config)
    nats = labels = kept = units = flops = whole = 0
    for row in read_rows(out / "data" / "held_out.jsonl", tokenizer, max_length=256):
        with torch.no_grad():
            logits, made, _ = formula.forward(dense, row.ids, routers, granularity="block_token")
        asked = torch.tensor(row.labels)
        nats += float(torch.nn.functional.cross_entropy(logits, asked, reduction="sum"))
        labels += row.num_labels
        kept += sum(float(mask.sum()) for mask in made.values())
        units += len(made) * len(row.ids)
        flops += work.prefill(len(row.ids), {Place(n, "block"): m.bool() for n, m in made.items()})
        whole += work.prefill(len(row.ids), {})
    assert 0 < kept < units, "it keeps everything or nothing, whose work any fault may have"
    assert quality["published_capacity"] == pytest.approx(kept / units, abs=1e-3)
    assert quality["published_perplexity"] == pytest.approx(math.exp(nats / labels), rel=1e-3)
    assert quality["published_work"] == pytest.approx(flops / whole, rel=1e-3)


def test_a_run_leaves_its_configuration_metrics_and_checkpoint(quickstart):
    run_folder = quickstart[1] / "run"
    config = cli.parse(["--config", str(run_folder / "config.yaml")])
    assert config.train.steps == 3
    lines = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3]
    assert {"loss", "capacity", "learning_rate", "grad_norm", "tokens_per_second"} <= set(steps[0])
    assert [line["step"] for line in lines if "validation_loss" in line] == [3]
    assert (run_folder / "latest").read_text().strip() == "step_00000003"
    assert len(steps[0]["capacity"]) == 2


def test_export_loads_and_generates(quickstart):
    model = AutoModelForCausalLM.from_pretrained(quickstart[1] / "export", trust_remote_code=True)
    made = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, eos_token_id=None)
    assert made.shape == (1, 7)


@pytest.fixture(scope="module")
def base_settings(quickstart):
    """Overrides that fit a shipped configuration to the tiny model, trained as published."""
    out = quickstart[1]
    return [
        "--config", "configs/smollm2/135m_attn_sequence.yaml",
        "--model.checkpoint", out / "megatron", "--data.train", out / "data" / "validation.jsonl",
        "--data.validation", "null", "--train.validation_interval", 0, "--train.steps", 2,
        "--router.layers.deepest", 2, "--data.max_length", 200,
        "--parallel.pipeline_model_parallel_size", 1,
        *(f"--{name}={value}" for name, value in PUBLISHED.items()),
        "--router.capacity_loss_weight", "1.0",
    ]  # fmt: skip


def read_metrics(folder: Path) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if "loss" in line]


@pytest.mark.slow  # in one process, test_granularities and test_resume_topologies hold the same
def test_steps_are_the_same_at_every_topology(base_settings, tmp_path):
    """Three optimizer steps: data 2 with a distributed optimizer, and pipeline 2 whose first
    stage owns no router at all."""
    common = [*base_settings, "--router.layers", "[2, 3]", "--train.steps", 3]
    printed = torchrun(
        2, "launch/pretrain_router.py", *common, "--checkpoint.save", tmp_path / "data",
        "--parallel.use_distributed_optimizer", "true", "--checkpoint.interval", 2,
    )  # fmt: skip
    assert "data 2" in printed
    assert "2 routers (64 parameters" in printed
    saved = sorted(path.name for path in (tmp_path / "data").glob("step_*"))
    assert saved == ["step_00000002", "step_00000003"]
    torchrun(
        2, "launch/pretrain_router.py", *common, "--checkpoint.save", tmp_path / "pipeline",
        "--parallel.pipeline_model_parallel_size", 2,
    )  # fmt: skip
    run(
        sys.executable, "launch/pretrain_router.py", *common,
        "--checkpoint.save", tmp_path / "one",
    )  # fmt: skip
    wanted = read_metrics(tmp_path / "one")
    assert len({step["loss"] for step in wanted}) == 3
    for name in ("data", "pipeline"):
        for step, expected in zip(read_metrics(tmp_path / name), wanted, strict=True):
            for key in ("loss", "task_loss", "grad_norm", "capacity", "learning_rate", "tokens"):
                assert step[key] == pytest.approx(expected[key], rel=1e-4), (name, key)
        summary = json.loads((tmp_path / name / "summary.json").read_text())
        assert summary["train"]["frozen_parameters_changed"] == 0


@pytest.mark.slow
@pytest.mark.usefixtures("single_process")
def test_bfloat16_with_sequence_parallelism(base_settings, tmp_path):
    """Half the digits, the same loss to a percent; routers stay float32."""
    common = [*base_settings, "--train.steps", 1, "--router.pooling", "all"]
    torchrun(
        2, "launch/pretrain_router.py", *common, "--checkpoint.save", tmp_path / "half",
        "--parallel.tensor_model_parallel_size", 2, "--parallel.sequence_parallel", "true",
        "--model.dtype", "bfloat16",
    )  # fmt: skip
    run(
        sys.executable, "launch/pretrain_router.py", *common, "--checkpoint.save", tmp_path / "one",
    )  # fmt: skip
    (half,), (one,) = read_metrics(tmp_path / "half"), read_metrics(tmp_path / "one")
    assert half["loss"] == pytest.approx(one["loss"], rel=0.01)
    assert half["loss"] != one["loss"]
    saved = load_tensors(tmp_path / "half" / "step_00000001" / "state", keep="router.weight")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}


@pytest.mark.slow
def test_no_steps_export_untrained_routers(base_settings, tmp_path):
    torchrun(
        2, "launch/pretrain_router.py", *base_settings, "--checkpoint.save", tmp_path / "zeros",
        "--parallel.pipeline_model_parallel_size", 2, "--router.layers", "[3]", "--train.steps", 0,
    )  # fmt: skip
    run(
        sys.executable, "tools/convert_megatron_to_hf.py",
        "--load", tmp_path / "zeros", "--save", tmp_path / "export",
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "export", trust_remote_code=True)
    assert not model.model.layers[3].router.weight.any()
    assert [layer.router is not None for layer in model.model.layers] == [False] * 3 + [True]


MISTAKES = [
    (["--router.capcity", "0.5"], "did you mean 'router.capacity'"),
    (["--router.layers", "[7]"], "router.layers: [7] out of range"),
    (["--parallel.tensor_model_parallel_size", "3"], "does not divide the 2 ranks"),
    (["--train.global_batch_size", "3"], "train.global_batch_size = 3"),
    (["--model.checkpoint", "nowhere"], "nowhere: does not exist"),
    (["--data.train", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
    (["--checkpoint.save", "tests"], "checkpoint.save = tests: already exists"),
    (["--data.max_length", "999"], "data.max_length = 999"),
]


def start(settings, monkeypatch, *, world: int) -> None:
    """What ``pretrain_router`` does before ranks meet, in this process."""
    from megatron_mod.training.plan import prepare

    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("WORLD_SIZE", str(world))
    prepare(cli.parse([str(part) for part in settings]))


@pytest.mark.parametrize(("change", "message"), MISTAKES, ids=lambda v: v[0] if v else "")
def test_mistakes_are_refused_at_start(base_settings, tmp_path, monkeypatch, change, message):
    save = tmp_path / "run"
    settings = [*base_settings, "--checkpoint.save", save, *change]
    with pytest.raises(ValueError) as caught:
        start(settings, monkeypatch, world=2)
    assert message in str(caught.value)
    assert not save.exists()


def test_tensor_degree_that_does_not_divide_the_heads(base_settings, tmp_path, monkeypatch):
    degree = ["--parallel.tensor_model_parallel_size", 3, "--checkpoint.save", tmp_path / "run"]
    with pytest.raises(ValueError, match="4 attention heads; use one of"):
        start([*base_settings, *degree], monkeypatch, world=3)


def test_a_model_without_its_tokenizer_is_named(base_settings, quickstart, tmp_path, monkeypatch):
    base = tmp_path / "base"
    shutil.copytree(quickstart[1] / "megatron", base)
    for path in (base / "huggingface").glob("tokenizer*"):
        path.unlink()
    change = ["--model.checkpoint", base, "--checkpoint.save", tmp_path / "run"]
    with pytest.raises(ValueError, match="no tokenizer that Transformers can load"):
        start([*base_settings, *change], monkeypatch, world=2)


def test_a_mistake_is_told_once_and_by_one_rank(tmp_path):
    printed = torchrun(
        2, "launch/pretrain_router.py", "--config", "configs/smollm2/135m_attn_sequence.yaml",
        "--router.capcity", "0.5", ok=False,
    )  # fmt: skip
    (told,) = (line for line in printed.splitlines() if line.startswith("error: "))
    assert printed.count("error: ") == 1
    assert "did you mean 'router.capacity'" in told
    assert printed.rstrip().splitlines()[-2].endswith(told.removeprefix("error: "))
    assert 'pretrain_router.py", line' not in printed, "no traceback of ours"


def test_tools_refuse_with_a_message(tmp_path):
    for tool, options in (
        ("convert_hf_to_megatron.py", ["--hf-path", "nowhere"]),
        ("convert_megatron_to_hf.py", ["--load", "nowhere"]),
    ):
        printed = run(
            sys.executable, f"tools/{tool}", *options, "--save", tmp_path / "out", ok=False
        )
        assert f"error: {options[0]} nowhere: no such folder" in printed
        assert "Traceback" not in printed
        assert not (tmp_path / "out").exists()


def test_quickstart_refuses_before_it_starts(tiny_hf, tmp_path):
    cases = [
        (["--out", tmp_path], "already exists"),
        (["--held-out", 0], "--held-out 0: must be at least 1"),
        (["--hf-path", tmp_path / "none"], "no such folder"),
        (["--hf-path", tiny_hf, "--tensor", 3], "4 attention heads; use one of [1, 2, 4]"),
        (["--hf-path", tiny_hf, "--pipeline", 5], "4 layers; use at most 4"),
        (["--hf-path", tiny_hf, "--nproc", 3], "multiple of --tensor 1 x --pipeline 2"),
    ]
    for options, message in cases:
        options = ["--out", tmp_path / "x", *options]
        printed = run(sys.executable, "launch/quickstart.py", *options, ok=False)
        assert message in printed
        assert "Traceback" not in printed
        assert not (tmp_path / "x").exists()


def blocks(page: str, language: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def test_the_page_of_settings_shows_one_complete_configuration(tmp_path):
    (block,) = blocks("configs/README.md", "yaml")
    shown = yaml.safe_load(block)
    assert [f"{section}.{field}" for section in shown for field in shown[section]] == list(
        cli.FIELDS
    )
    uncommented = [
        line for line in block.splitlines() if re.match(r"  \w", line) and "#" not in line
    ]
    assert not uncommented
    path = tmp_path / "readme.yaml"
    path.write_text(block)
    cli.parse(["--config", str(path)])


@pytest.mark.slow
def test_readme_commands_run(quickstart, tiny_hf, tmp_path):
    """The step-by-step commands, with the tiny model in SmolLM2's place and its few steps."""
    (commands,) = (
        block for block in blocks("README.md", "bash") if "convert_hf_to_megatron" in block
    )
    commands = commands.replace("\\\n", " ").replace("runs/", f"{tmp_path}/")
    done = []
    for line in commands.splitlines():
        words = shlex.split(line, comments=True)
        if not words:
            continue
        script = next(Path(word).name for word in words if word.endswith(".py"))
        if script == "get_smollm2.py":
            Path(words[-1]).symlink_to(tiny_hf)
            continue
        if script == "pretrain_router.py":
            words += ["--train.steps", "1", "--router.layers.deepest", "2"]
            words += ["--data.max_length", "200", "--train.validation_interval", "1"]
        bin_folder = Path(sys.executable).parent
        run(*words, PATH=f"{bin_folder}{os.pathsep}{os.environ['PATH']}")
        done.append(script)
    assert {"convert_hf_to_megatron.py", "pretrain_router.py", "convert_megatron_to_hf.py",
            "compare_logits.py", "make_python_docs.py"} <= set(done)  # fmt: skip
