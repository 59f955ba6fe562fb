"""The training benchmark, on a tiny model; what it says of time is not looked at."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path

import pytest
import torch

from megatron_mod.benchmark.training import max_rel, summarise, take_turns
from megatron_mod.benchmark.training_ours import Ours
from megatron_mod.benchmark.training_plain import Plain
from megatron_mod.benchmark.training_process import (
    Measured,
    counting,
    mapped_pages,
)
from megatron_mod.benchmark.training_ways import REFERENCE, WAYS, Setup
from megatron_mod.commands.benchmark_training import TrainingBenchmark
from megatron_mod.config import cli
from tests.helpers import training_formula
from tests.helpers.runs import Trainer
from tests.helpers.tools import run_tool

KEYS = {
    "tokens_per_second", "peak_memory_gb", "mflop_per_token", "share_of_matmul_rate",
    "router_gradient_max_rel",
}  # fmt: skip


@pytest.fixture(scope="module")
def trainer(tmp_path_factory, single_process):
    return Trainer(tmp_path_factory.mktemp("benchmark"))


def setup(trainer: Trainer, granularity: str = "block_token", **changes: object) -> Setup:
    of = {
        "hf_path": trainer.hf, "data": trainer.text, "granularity": granularity, "layers": 2,
        "ranks": 1, "pipeline": 1, "batch": 4, "micro_batch": 2, "max_length": 64, "steps": 1,
        "rounds": 1, "dtype": "float32", "settings": (),
    }  # fmt: skip
    return Setup(**{**of, **changes})


def plain(trainer: Trainer, way: str, scratch: Path, granularity: str, dtype: torch.dtype):
    options = setup(trainer, granularity).options(way, scratch)
    return Plain(way.replace(REFERENCE, "published_stop"), cli.parse(options), dtype=dtype)


def test_what_torch_cannot_count_is_counted_by_others():
    class Answers:
        def __init__(self, name: str) -> None:
            self.name = name

        def run(self, asked: object) -> str:
            return self.name

    ways = {way: Answers(way) for way in ("published_stop", "recompute")}
    asked = Setup("", "", "block_token", 2, 1, 1, 4, 2, 64, 1, 2, "bfloat16", ())
    found = take_turns(ways, asked, counting={"recompute": Answers("local")})
    assert found["published_stop"] == ["published_stop"] * 4
    assert found["recompute"] == ["recompute"] * 3 + ["local"]


@pytest.mark.parametrize("granularity", ["attn_token", "mlp_token", "block_token"])
def test_the_reference_is_the_formula(trainer, tmp_path, granularity):
    """Written out by itself in tests/helpers, document by document."""
    reference = plain(trainer, REFERENCE, tmp_path, granularity, torch.float64)
    found = reference.step(0).gradient
    model = plain(trainer, "full", tmp_path, granularity, torch.float32).model.double()
    loader = reference.loader
    samples = [loader.samples[loader.order[i]] for i in range(loader.global_batch_size)]
    added = {n: {"router.weight": torch.zeros(1, 32, requires_grad=True)} for n in (1, 2)}
    scheme = training_formula.Scheme(granularity, (1, 2))
    training_formula.batch_loss(model, samples, added, scheme).loss.backward()
    wanted = torch.cat([added[n]["router.weight"].grad for n in (1, 2)])
    assert wanted.abs().max() > 1e-3
    assert torch.allclose(found.float(), wanted, rtol=1e-4, atol=1e-6 * float(wanted.abs().max()))


@pytest.mark.parametrize("granularity", ["attn_token", "mlp_token", "block_token"])
def test_all_ways_have_the_reference_s_gradient(trainer, tmp_path, granularity):
    wanted = plain(trainer, REFERENCE, tmp_path, granularity, torch.float64).step(0)
    for way in ("published", "published_stop"):
        found = plain(trainer, way, tmp_path, granularity, torch.float32).step(0)
        assert found.tokens == wanted.tokens
        assert max_rel(found.gradient.tolist(), wanted.gradient.tolist()) < 1e-5
    with pytest.MonkeyPatch.context() as context, contextlib.ExitStack() as stack:
        context.setattr("megatron_mod.parallel.topology.initialize", lambda *_, **__: None)
        context.setattr("megatron_mod.parallel.topology.shutdown", lambda: None)
        options = setup(trainer, granularity).options("recompute", tmp_path)
        ours = Ours(cli.parse(options), stack, meet=tmp_path / "meet")
        found = ours.step(0)
        assert found.tokens == wanted.tokens
        assert max_rel(found.gradient.tolist(), wanted.gradient.tolist()) < 1e-5


def test_only_the_published_way_goes_back_to_the_embeddings(trainer, tmp_path):
    seen, counted = {}, {}
    for way in ("published", "published_stop"):
        training = plain(trainer, way, tmp_path, "attn_token", torch.float32)
        first = training.model.model.layers[0]
        first.register_forward_hook(lambda *a, way=way: seen.update({way: a[-1].requires_grad}))
        with counting() as counter:
            training.step(0)
        counted[way] = counter.get_total_flops()
    assert seen == {"published": True, "published_stop": False}
    # Layer 0, and of layer 1, the first that is routed, its attention and what its router reads.
    attention, mlp, router = 4 * 32 * 32, 3 * 32 * 64, 32
    positions = sum(batch.input_ids.numel() for batch in training.loader.step(0).micro_batches)
    saved = counted["published"] - counted["published_stop"]
    assert saved == 2 * positions * (2 * attention + mlp + router)
    full = plain(trainer, "full", tmp_path, "attn_token", torch.float32)
    before = {name: value.detach().clone() for name, value in full.model.named_parameters()}
    assert full.step(0).gradient is None
    assert all(not torch.equal(v, before[k]) for k, v in full.model.named_parameters())


@pytest.mark.slow
def test_the_command_as_a_user_runs_it(trainer, tmp_path, monkeypatch, capfd):
    report = tmp_path / "report.json"
    words = [
        "--hf-path", trainer.hf, "--data", trainer.text, "--ways", "recompute",
        "--layers", 2, "--steps", 1, "--rounds", 1, "--batch", 4, "--micro-batch", 2,
        "--max-length", 64, "--threads", 1, "--granularity", "attn_token", "--json", report,
        "--optimizer.average_fraction", "0.5",
    ]  # fmt: skip
    assert run_tool(monkeypatch, "benchmark_training", *words) == 0
    found = json.loads(report.read_text())
    assert set(found) == {"ways", "device", "conditions"}
    (figures,) = found["ways"].values()
    assert set(figures) == KEYS
    assert all(math.isfinite(value) and value > 0 for value in figures.values())
    assert figures["router_gradient_max_rel"] < 1e-5
    conditions = found["conditions"]
    assert conditions["settings"] == ["--optimizer.average_fraction", "0.5"]
    assert set(conditions["versions"]) == {"torch", "transformers", "megatron-core"}
    assert (conditions["threads"], conditions["dtype"], conditions["rounds"]) == (1, "float32", 1)
    assert capfd.readouterr().out.splitlines()[-1].startswith("| recompute |")


@pytest.mark.slow
def test_a_mistake_in_a_way_ends_with_its_one_message(trainer, tmp_path, monkeypatch, capfd):
    data = tmp_path / "data.jsonl"
    data.write_text('{"nothing": "of use"}\n')
    words = ["--hf-path", trainer.hf, "--data", data, "--ways", "full", "--max-length", 64]
    assert run_tool(monkeypatch, "benchmark_training", *words, "--without-reference") == 2
    *_, before, last = capfd.readouterr().err.splitlines()
    assert "error" not in before
    assert last.startswith(f"error: {data}:1: needs 'messages'")


def measured(**changes: object) -> Measured:
    of = {
        "seconds": 2.0, "tokens": 100, "flops": None, "rate": 1e9, "peak": 10**9,
        "resident": 2 * 10**9, "gradient": None, "capacity": None,
    }  # fmt: skip
    return Measured(**{**of, **changes})


def test_figures_of_several_ranks_and_rounds():
    """Time is the slowest rank's, memory the largest one's, operations and rates add up."""
    first = [measured(gradient=[[1.0, -4.0]]), measured(gradient=[[1.0, -4.0]])]
    timed = [[measured(seconds=s), measured(seconds=1.0, peak=3 * 10**9)] for s in (4.0, 2.0, 5.0)]
    counted = [measured(flops=3 * 10**6), measured(flops=10**6)]
    report = summarise({"recompute": [first, *timed, counted]}, wanted=[[1.0, -5.0]])
    assert report["ways"]["recompute"] == {
        "tokens_per_second": 25.0,
        "peak_memory_gb": 3.0,
        "mflop_per_token": 0.04,
        "share_of_matmul_rate": pytest.approx(0.04e6 * 25 / 2e9),
        "router_gradient_max_rel": pytest.approx(0.2),
    }
    conditions = report["conditions"]
    assert conditions["tokens_per_second_range"] == {"recompute": [20.0, 50.0]}
    report = summarise({"recompute": [first, *timed, counted]})
    assert report["ways"]["recompute"]["router_gradient_max_rel"] is None
    assert report["conditions"]["router_gradient_missing"]["recompute"]
    nothing = [[measured(peak=None)]] * 2 + [[measured(flops=1, peak=None)]]
    assert summarise({"full": nothing})["ways"]["full"]["peak_memory_gb"] is None


def test_a_gradient_that_is_no_number_is_no_agreement():
    assert math.isnan(max_rel([[1.0, math.nan]], [[1.0, 1.0]]))


def test_every_way_is_an_option_and_has_its_own_settings(trainer, tmp_path):
    assert tuple(WAYS) == TrainingBenchmark.ways
    own = setup(trainer, settings=("--router.bias", "true"))
    for way in WAYS:
        options = own.options(way, tmp_path)
        assert ("--router.bias" in options) == (not WAYS[way].is_plain)
        assert f"--checkpoint.save={tmp_path / way}" in options
        if WAYS[way].fills_cache:
            assert f"--train.prefix_cache={tmp_path / 'prefix'}" in options
        else:
            cli.parse(options)


def test_mapped_files_are_told_from_memory(tmp_path):
    size = 1 << 22
    (tmp_path / "weights").write_bytes(bytes(size))
    assert mapped_pages([tmp_path]) == 0
    storage = torch.UntypedStorage.from_file(str(tmp_path / "weights"), False, size)
    assert torch.tensor([], dtype=torch.uint8).set_(storage).sum() == 0
    assert mapped_pages([tmp_path]) == size


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--batch", "6"], "--batch 6: must be a multiple of --micro-batch 4"),
        (["--nproc", "3", "--pipeline", "2"], "--nproc 3: must be a multiple of --pipeline 2"),
        (["--ways", "full", "full"], "--ways full full: names one twice"),
        (["--data.packing", "true"], "--data.packing: all ways have it in common"),
        (["--train.frozen_prefix=cache"], "--train.frozen_prefix: all ways"),
        (["--router.layers.deepest", "3"], "--router.layers.deepest: all ways"),
        (["--router.scop", "layer"], "unknown key 'router.scop'"),
    ],
)
def test_what_is_refused(trainer, monkeypatch, capsys, words, message):
    required = ["--hf-path", trainer.hf, "--data", trainer.text]
    assert run_tool(monkeypatch, "benchmark_training", *required, *words) == 2
    assert message in capsys.readouterr().err
