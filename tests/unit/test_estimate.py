"""What is estimated of a training beside what a tiny one really holds and sends."""

from __future__ import annotations

import json
import re
import shlex
import typing
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_mod.commands.benchmark_inference import InferenceBenchmark
from megatron_mod.config.machines import Gpu
from megatron_mod.config.shapes import SHAPES
from megatron_mod.conversion.families import family_of
from megatron_mod.estimate import activations, communication, here, memory, parameters
from megatron_mod.estimate.advice import advise, changed
from megatron_mod.estimate.estimate import estimate
from megatron_mod.estimate.gpus import CPU, KINDS
from megatron_mod.estimate.resolve import hf_config_of
from megatron_mod.estimate.schedule import most_kept
from megatron_mod.estimate.time import of_step
from megatron_mod.model.architecture import Mixture
from tests.helpers.memory import Live, kept_by_layer
from tests.helpers.tools import run_tool

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
KEPT = 0.02  # relative, of what a model's layers keep for backward
PEAK = (0.93, 1.17)  # estimated over real, of all that a step makes
WIDE = {"model__dtype": "float32"}
STAND_INS = {"train__trainable": "routers+stand_ins"}
LORA = {"train__trainable": "routers+lora", "lora__rank": 4}
ALONE = {
    "train__trainable": "lora", "lora__rank": 4, "router__layers": "[]",
    "router__stand_in_rank": None,
}  # fmt: skip
WHOLE = {"train__trainable": "all"}
BY_EXPERT = {"router__granularity": "expert_token", "router__stand_in_rank": None}
MIXTURE = Mixture(num_experts=4, top_k=2, ffn_hidden_size=256)
CASES = [  # settings, and what of the shape is another
    ({}, {}),
    ({"train__recompute": "full", **WIDE}, {"window_size": 9}),
    ({"train__recompute": "full", "router__granularity": "mlp_token"}, {}),
    ({"train__recompute": "selective", "router__granularity": "mlp_token", **STAND_INS}, {}),
    ({"router__granularity": "block_sequence", "router__stand_in": "none",
      "router__stand_in_rank": None, **WIDE}, {"qk_norm": True}),
    ({"router__keys_values": "selected", "train__loss": "both"},
     {"qk_norm": True, "qkv_bias": True, "tied_embeddings": True}),
    ({"router__granularity": "attn_token+mlp_token", **WIDE}, {}),
    ({"router__granularity": "attn_token+mlp_token", **STAND_INS}, {}),
    ({"router__granularity": "attn_token+mlp_token", "train__recompute": "full"}, {}),
    ({**LORA, **WIDE, "lora__layers": "[1,3]"}, {}),
    ({**LORA, "train__recompute": "selective", "lora__layers": "[2]"}, {}),
    ({**ALONE, "lora__layers": "[1,2]"}, {}),
    ({**ALONE, "lora__targets": "[v_proj,o_proj]", "lora__layers": "[1,2]"}, {}),
    ({**ALONE, "train__recompute": "selective", "lora__layers": "[1,3]"}, {}),
    ({**WHOLE, **WIDE}, {"qk_norm": True, "qkv_bias": True}),
    ({**WHOLE, "router__granularity": "attn_token+mlp_token"}, {"tied_embeddings": True}),
    ({**WHOLE, "train__recompute": "selective"}, {"qk_norm": True}),
    ({**WHOLE, "train__recompute": "full"}, {}),
    ({**WHOLE, "router__layers": "[]", "router__stand_in_rank": None}, {}),
    ({"router__granularity": "mlp_token"}, {"mixture": MIXTURE, "qk_norm_across_heads": True}),
    ({"router__granularity": "attn_token"}, {"mixture": MIXTURE}),
    ({"router__granularity": "block_token", "train__recompute": "selective"}, {"mixture": MIXTURE}),
    ({"train__recompute": "full"}, {"mixture": MIXTURE}),
    (BY_EXPERT, {"mixture": MIXTURE}),
    ({**BY_EXPERT, "train__recompute": "selective"}, {"mixture": MIXTURE}),
    ({**BY_EXPERT, "train__recompute": "full"}, {"mixture": MIXTURE}),
]  # fmt: skip


@pytest.fixture
def estimated(single_process):
    from tests.helpers import estimated
    from tests.helpers.ranks import meet

    meet()
    yield estimated
    meet()


@pytest.mark.parametrize(("settings", "shape"), CASES)
def test_parameters_what_backward_keeps_and_the_most_there_is(estimated, settings, shape):
    placed = estimated.place(replace(estimated.ARCH, **shape), **settings)
    model, step = estimated.training_of(placed)
    found = parameters.total(placed)
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    assert found.base + found.added == sum(size for size, _ in sizes)
    assert found.trained == sum(size for size, trains in sizes if trains)
    assert parameters.of_rank(placed, 0) == found
    with kept_by_layer(model[0].decoder.layers) as kept:
        step()
    of_layers = [activations.kept(placed, layer) for layer in range(4)]
    assert (kept[0], of_layers[0]) == (0, 0) or placed.job.reach.trains_base
    assert sum(of_layers) == pytest.approx(kept.total(), rel=KEPT)
    with Live() as live:
        step()
    parts = memory.of_rank(placed, 0, KINDS["h100"]).step
    assert PEAK[0] < sum(parts.values()) / live.most < PEAK[1], parts


class Sent(TorchDispatchMode):
    """Bytes of the whole tensor, and how often, of each kind of collective of hidden states."""

    NAMES: typing.ClassVar = {
        "allreduce_": communication.ALL_REDUCE,
        "_allgather_base_": communication.ALL_GATHER,
        "_reduce_scatter_base_": communication.REDUCE_SCATTER,
    }

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function).split(".")
        if name[0] == "c10d" and name[1] in self.NAMES:
            tensors = [t for t in tree_leaves(args) if isinstance(t, torch.Tensor)]
            self.bytes[self.NAMES[name[1]]] += max(t.numel() * t.element_size() for t in tensors)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("recompute", "sharded", "settings"),
    [
        ("none", "true", {}),
        ("selective", "false", {}),
        ("selective", "true", {}),
        ("full", "true", {}),
        ("none", "true", {**LORA, "lora__layers": "[1,3]"}),
        ("selective", "false", {**LORA, "lora__layers": "[1,3]"}),
        ("none", "true", WHOLE),
        ("selective", "true", WHOLE),
        ("full", "true", WHOLE),
    ],
)
def test_tensor_parallel_ranks(estimated, recompute, sharded, settings):
    granularity = "mlp_token" if recompute == "selective" else "attn_token"
    placed = estimated.place(
        **settings,
        world_size=2,
        parallel__tensor_model_parallel_size=2,
        parallel__sequence_parallel=sharded,
        train__recompute=recompute,
        router__granularity=granularity,
    )
    estimated.pretend(placed)
    model, step = estimated.training_of(placed)
    found = parameters.of_rank(placed, 0)
    assert found.base + found.added == sum(p.numel() for p in model.parameters())
    with kept_by_layer(model[0].decoder.layers) as kept:
        step()
    if (recompute, sharded) != ("full", "true"):  # there a layer's input is a view of whole rows
        of_layers = [activations.kept(placed, layer) for layer in range(4)]
        assert sum(of_layers) == pytest.approx(kept.total(), rel=KEPT)
    with Sent() as sent:
        step()
    expected = communication.of_step(placed, 0)
    factor = {communication.ALL_REDUCE: 1.0}  # of the whole, for two ranks; else a half
    for kind in Sent.NAMES.values():
        whole = expected[kind] / factor.get(kind, 0.5)
        # Beside hidden states there are scalars of the loss and the routers.
        assert whole == pytest.approx(sent.bytes[kind], rel=0.02, abs=1), kind


def test_context_parallel_ranks(estimated):
    context = {"parallel__context_parallel_size": 2, "train__recompute": "selective"}
    placed = estimated.place(world_size=2, **context)
    estimated.pretend(placed)
    model, step = estimated.training_of(placed)
    with kept_by_layer(model[0].decoder.layers) as kept:
        step()
    of_layers = [activations.kept(placed, layer) for layer in range(4)]
    assert sum(of_layers) == pytest.approx(kept.total(), rel=0.03)
    with Sent() as sent:
        step()
    whole = sent.bytes[communication.ALL_GATHER] + sent.bytes[communication.REDUCE_SCATTER]
    # All keys and values of both ranks; each sends its half round the ring once.
    assert communication.of_step(placed, 0)[communication.RING] == pytest.approx(
        whole / 2, rel=0.02
    )


def test_parameters_of_stages_add_up(estimated):
    for tied in (True, False):
        arch = replace(estimated.ARCH, tied_embeddings=tied)
        whole = parameters.total(estimated.place(arch))
        placed = estimated.place(
            arch, world_size=2, parallel__pipeline_model_parallel_size=2,
            parallel__pipeline_layout="[3,1]",
        )  # fmt: skip
        found = [parameters.of_rank(placed, rank) for rank in range(2)]
        again = 331 * 96 * tied  # the last stage has its own copy
        assert sum(own.base for own in found) == whole.base + again
        assert sum(own.added for own in found) == whole.added
    cached = parameters.of_rank(estimated.place(train__frozen_prefix="cache"), 0)
    assert whole.base - cached.base == parameters.layer(arch, placed.job.topology) + 331 * 96


def test_micro_batches_in_flight_are_megatron_s():
    from megatron.core.pipeline_parallel.schedules import get_schedule_table

    assert [most_kept([7], rank=r, ranks=4, micro_batches=8) for r in range(4)] == [28, 21, 14, 7]
    assert [most_kept([7], rank=r, ranks=4, micro_batches=2) for r in range(4)] == [14, 14, 14, 7]
    assert most_kept([7], rank=0, ranks=1, micro_batches=9) == 7
    sizes, ranks, micro_batches = (5, 11, 2), 4, 8
    forward = [chunk for _, chunk in get_schedule_table(micro_batches, len(sizes), ranks)]
    backward = [len(sizes) - 1 - chunk for chunk in forward]
    for rank in range(ranks):
        ahead = 2 * (ranks - rank - 1) + (len(sizes) - 1) * ranks
        most = max(
            sum(sizes[chunk] for chunk in forward[: n + 1])
            - sum(sizes[chunk] for chunk in backward[: max(n - ahead, 0)])
            for n in range(len(forward))
        )
        assert most_kept(sizes, rank=rank, ranks=ranks, micro_batches=micro_batches) == most


def test_a_step_waits_as_long_as_an_even_pipeline_does(estimated):
    arch = replace(estimated.ARCH, num_layers=64, vocab_size=8)
    placed = estimated.place(
        arch, world_size=4, parallel__pipeline_model_parallel_size=4, router__layers="{every: 1}",
        parallel__pipeline_layout="even", train__global_batch_size=18,
    )  # fmt: skip
    step = of_step(placed, replace(KINDS["h100"], near=1e30), per_node=4)
    assert step.bubble == pytest.approx(3 / (6 + 3), rel=0.02)
    alone = of_step(estimated.place(arch), KINDS["h100"], per_node=1)
    assert (alone.bubble, alone.communication) == (pytest.approx(0), 0)


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("llama3-8b", 8_030_261_248),
        ("llama3-70b", 70_553_706_496),
        ("llama3-405b", 405_853_388_800),
        ("mistral-7b", 7_248_023_552),
        ("qwen2.5-7b", 7_615_616_512),
        ("mixtral-8x7b", 46_702_792_704),
        ("qwen3-30b-a3b", 30_532_122_624),
        ("olmoe-1b-7b", 6_919_161_856),
        ("smollm2-135m", 134_515_008),
    ],
)
def test_published_shapes_have_the_published_parameters(estimated, name, published):
    arch = family_of(SHAPES[name]).architecture_of(SHAPES[name])
    assert parameters.total(estimated.place(arch)).base == published


def test_names_that_are_stated_elsewhere():
    assert set(typing.get_args(Gpu)) == {*KINDS, CPU}
    hint = typing.get_args(typing.get_type_hints(InferenceBenchmark)["shapes"])[0]
    llamas = [name for name, shape in SHAPES.items() if shape["model_type"] == "llama"]
    assert set(typing.get_args(hint)) == set(llamas)


# The tool


def asked_of(path: Path) -> tuple[list[str], str]:
    """The estimate's options and the memory that a configuration's comment has."""
    text = path.read_text().replace("\n# ", " ")
    (found,) = re.findall(r"by tools/estimate\.py (.*?): ([\d.]+ GiB)\.", text)
    return shlex.split(found[0]), found[1]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_configuration_fits_and_says_its_memory(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # where no model is
    options, said = asked_of(path)
    options += ["--json", str(tmp_path / "found.json")]
    assert run_tool(monkeypatch, "estimate", "--config", path, *options) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["fits"]
    assert f"{found['memory']['total'] / 2**30:.1f} GiB" == said
    assert f"together {said.split()[0]}" in re.sub(r" +", " ", capsys.readouterr().out).replace(
        f"{found['memory']['total'] / 2**30:.2f}", said.split()[0]
    )


@pytest.fixture
def ask(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def call(path: str, *options: object) -> tuple[int, str, str, dict]:
        report = tmp_path / "report.json"
        report.unlink(missing_ok=True)
        words = ("--config", ROOT / "configs" / path, *options, "--json", report)
        status = run_tool(monkeypatch, "estimate", *words)
        said = capsys.readouterr()
        found = json.loads(report.read_text()) if report.exists() else {}
        return status, said.out, said.err, found

    return call


@pytest.mark.parametrize(
    ("path", "options"),
    [
        ("llama3/8b_attn_token_80gb.yaml", ["--gpus-per-node", 1, "--gpu", "4090"]),
        ("llama3/8b_block_token.yaml", ["--hf-config", "llama3-70b", "--gpu", "a100-40",
                                        "--gpus-per-node", 4]),
    ],
)  # fmt: skip
def test_advice_fits_when_it_is_followed(ask, path, options):
    status, said, _, found = ask(path, *options)
    assert (status, found["fits"]) == (0, False)
    advised = found["change"]
    words = [f"--{name}={value}".lower() for name, value in advised["settings"].items()]
    if advised["nodes"] > 1:
        words += ["--nodes", advised["nodes"]]
    assert all(name in said for name in advised["settings"])
    status, _, _, found = ask(path, *options, *words)
    assert (status, found["fits"]) == (0, True)


def test_no_setting_helps_where_there_is_none(estimated):
    config = estimated.config_of(
        data__max_length=2, train__micro_batch_size=1, train__recompute="full"
    )
    small = replace(KINDS["l4"], memory=10)
    found = estimate(config, estimated.ARCH, nodes=1, per_node=1, kind_of=lambda placed: small)
    assert advise(found) is None
    assert not found.fits


def test_settings_that_do_not_go_together_are_no_advice(estimated):
    with pytest.raises(ValueError, match="sequence_parallel"):
        changed(estimated.config_of(), {"parallel.sequence_parallel": True})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.checkpoint", "no/base"], "add --hf-config with its config.json"),
        (["--hf-config", "llama9"], "no such file or folder; give one of"),
        (["--gpus-per-node", 3], "does not divide the 3 ranks; give a multiple of 2 (--nodes 1 x"),
        (["--hf-config", "llama3-8b", "--gpu", "b300"], "--gpu b300: must be a100-40"),
        (["--hf-config", "llama3-8b", "--router.capacity", "2"], "router.capacity = 2"),
        (["--hf-config", "llama3-8b", "--data.max_length", "9000"], "at most 8192"),
        (["--hf-config", "llama3-8b", "--router.capasity", "1"], "did you mean 'router.capacity'"),
    ],
)
def test_mistakes_are_one_message(ask, options, message):
    status, _, said, _ = ask("llama3/8b_attn_token.yaml", *options)
    assert status == 2
    assert said.startswith("error: ")
    assert message in said
    assert said.count("\n") == 1


def test_a_model_is_known_by_a_folder_s_name_only_where_it_is_not_here(estimated, tmp_path, capsys):
    config = estimated.config_of(model__checkpoint=str(tmp_path / "llama3-8b" / "megatron"))
    assert hf_config_of(config, "tiny") == "tiny"
    assert not capsys.readouterr().out
    assert hf_config_of(config, None) == "llama3-8b"
    assert "megatron is not here: taken to be llama3-8b" in capsys.readouterr().out
    (tmp_path / "llama3-8b" / "megatron").mkdir(parents=True)
    assert hf_config_of(config, None) is None


def test_a_config_json_is_as_good_as_a_name(ask, tmp_path):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text(json.dumps(SHAPES["qwen2.5-7b"]))
    given = ("qwen2.5-7b", tmp_path / "hf", tmp_path / "hf" / "config.json")
    found = [ask("qwen2.5/7b_attn_token.yaml", "--hf-config", each)[3] for each in given]
    assert found[0] == found[1] == found[2]
    assert found[0]["parameters"]["total"] > 7e9


def test_the_processor_s_rate_is_measured(ask):
    options = ("--hf-config", "smollm2-135m", "--gpus-per-node", 2, "--gpu", "cpu")
    status, said, _, found = ask("smollm2/135m_attn_token.yaml", *options)
    assert (status, found["gpu"]) == (0, "cpu")
    assert "context ring" not in said


@pytest.mark.parametrize(
    ("name", "gib", "kind"),
    [
        ("NVIDIA A100-SXM4-40GB", 39.5, "a100-40"), ("NVIDIA A100-SXM4-80GB", 79.2, "a100-80"),
        ("NVIDIA H100 80GB HBM3", 79.1, "h100"), ("NVIDIA GeForce RTX 4090", 23.6, "4090"),
        ("NVIDIA L40S", 44.4, None),
    ],
)  # fmt: skip
def test_a_gpu_that_is_here_is_known_by_its_name(estimated, monkeypatch, name, gib, kind):
    monkeypatch.setattr(here.device, "describe", lambda: name)
    monkeypatch.setattr(here.device, "memory", lambda: int(gib * 2**30))
    monkeypatch.setattr(here, "matmul_rate", lambda *_, **__: 7.0)
    found = here.gpu(estimated.place())
    assert (found.name, found.memory) == (name, int(gib * 2**30))
    assert found.bfloat16 == (KINDS[kind].bfloat16 if kind else 7.0)


# --dry-run of a training


@pytest.fixture(scope="module")
def trainer(tmp_path_factory, single_process):
    from tests.helpers.runs import Trainer

    return Trainer(tmp_path_factory.mktemp("trainer"))


@pytest.fixture
def dry_run(trainer, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("megatron_mod.commands.train.catch_signals", lambda: None)
    monkeypatch.delenv("WORLD_SIZE", raising=False)

    def call(*options: object, **changes: object) -> tuple[int, str, str]:
        arguments = trainer.arguments(tmp_path / "run", **changes)
        status = run_tool(monkeypatch, "train", *options, *arguments)
        said = capsys.readouterr()
        return status, said.out, said.err

    return call


def test_a_dry_run_says_what_would_run(dry_run, tmp_path):
    epochs = {"train__steps": None, "train__epochs": 2, "data__max_train_samples": 7}
    status, said, _ = dry_run("--dry-run", parallel__pipeline_model_parallel_size=2, **epochs)
    assert status == 0
    assert "train.epochs = 2: the training counts its samples when it starts; at most 4, " in said
    assert "granularity: attn_sequence" in said
    assert re.search(r"found +model\.checkpoint", said)
    assert re.search(r"found +data\.train", said)
    assert re.search(r"new +checkpoint\.save", said)
    assert "world size: a multiple of 2 " in said
    assert "memory of the fullest device (rank" in said
    assert not (tmp_path / "run").exists()


def test_files_that_are_missing_are_all_named(dry_run):
    status, said, error = dry_run("--dry_run", data__train="no.jsonl", model__checkpoint="no/base")
    assert status == 2
    assert re.search(r"missing +model\.checkpoint +no/base", said)
    assert error.startswith("error: model.checkpoint = no/base: no such folder")
    assert "data.train = no.jsonl: no such file" in error
    assert error.count("\n") == 1
    _, said, _ = dry_run(
        "--dry-run", "--hf-config", "llama3-8b", "--gpu", "l4", model__checkpoint="no/base"
    )
    assert "IT DOES NOT FIT" in said


def test_adapters_that_are_given_are_looked_for(dry_run, trainer):
    from tests.helpers.adapters import save_adapter

    pytest.importorskip("peft", reason="needs the 'test' extra")
    folder = save_adapter(trainer.folder / "adapter", trainer.hf)
    trains = {"train__trainable": "routers+lora"}
    status, said, _ = dry_run("--dry-run", model__lora=folder, **trains)
    assert status == 0
    assert re.search(r"found +model\.lora", said)
    status, said, error = dry_run("--dry-run", model__lora="no/adapter", **trains)
    assert status == 2
    assert re.search(r"missing +model\.lora +no/adapter", said)
    assert error.startswith("error: model.lora = no/adapter: no adapters (PEFT's, or a run's)")


def test_only_the_first_rank_of_torchrun_speaks(dry_run, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "data 2)" in dry_run("--dry-run")[1]
    monkeypatch.setenv("RANK", "1")
    assert dry_run("--dry-run") == (0, "", "")


@pytest.mark.parametrize(
    ("options", "changes", "message"),
    [
        (["--gpu", "l4"], {}, "--gpu l4: would be ignored without --dry-run"),
        (["--dry-run", "--gpus-per-node", "3"], {"parallel__pipeline_model_parallel_size": 2},
         "give a multiple of 2 (--nodes 1 x --gpus-per-node 3), or change the degrees"),
        (["--dry-run"], {"data__max_length": 4096}, "data.max_length = 4096"),
        (["--dry-run"], {"router__capacity": 7}, "router.capacity = 7"),
        (["--dry-run", "--hf-config", "llama3-8b"], {}, "is not the shape of the model"),
    ],
)  # fmt: skip
def test_what_the_training_would_refuse_is_refused(dry_run, options, changes, message):
    status, _, error = dry_run(*options, **changes)
    assert status == 2
    assert message in error
