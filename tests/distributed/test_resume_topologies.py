"""Going on at another topology, and bases read by slices or written by Megatron-LM."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

from megatron_mod.checkpoint.manifest import read_manifest
from megatron_mod.conversion.families import family_of
from megatron_mod.conversion.hf_reader import HFReader, read_config
from megatron_mod.conversion.source import open_base
from megatron_mod.conversion.weights import hf_weights
from megatron_mod.model.builder import transformer_config
from tests.distributed import resume_cases
from tests.helpers import tiny
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import Trainer, metrics

PIPELINE = {"parallel__pipeline_model_parallel_size": 2}
EVEN = {**PIPELINE, "parallel__pipeline_layout": "even"}
HEAD = {**PIPELINE, "parallel__pipeline_layout": "[4,0]"}  # the last stage has the head alone
TENSOR = {"parallel__tensor_model_parallel_size": 2}
DISTRIBUTED = {"parallel__use_distributed_optimizer": True}


@pytest.fixture(scope="module")
def trainer(tmp_path_factory, single_process):
    return Trainer(tmp_path_factory.mktemp("trainer"))


def layouts(run: Path) -> list:
    """Under which cut each of a run's checkpoints was saved."""
    return [
        read_manifest(step)["topology"]["pipeline_layout"] for step in sorted(run.glob("step_*"))
    ]


def test_a_run_goes_on_at_another_topology(trainer, tmp_path):
    """The first of two even pipeline stages owns no router, so rank 0 knows nothing of the
    optimizer."""
    jobs, wanted = [], {}

    def job(name, changes, *, before=None):
        settings = {"router__layers": "[2,3]", "router__layers__deepest": None, **changes}
        degrees = {
            key: changes.get(f"parallel__{key}_model_parallel_size", 1)
            for key in ("tensor", "pipeline")
        }
        arguments = trainer.arguments(tmp_path / name, **settings)
        jobs.append((before and tmp_path / before, degrees, arguments))
        wanted[name] = before

    job("pipeline", EVEN)
    job("distributed", DISTRIBUTED)
    job("pipeline-pipeline", {**PIPELINE, "parallel__pipeline_layout": "[2,2]"}, before="pipeline")
    job("pipeline-auto", PIPELINE, before="pipeline")
    job("head", HEAD)
    job("head-pipeline", EVEN, before="head")
    job("pipeline-distributed", DISTRIBUTED, before="pipeline")
    job("distributed-tensor", TENSOR, before="distributed")
    job("distributed-distributed", DISTRIBUTED, before="distributed")
    run_ranks(resume_cases.trainings, jobs, world=2, folder=tmp_path / "ranks", seconds=500)

    assert layouts(tmp_path / "pipeline") == [[2, 2]] * 3
    assert layouts(tmp_path / "pipeline-auto") == [[2, 2], [3, 1], [3, 1]]
    assert layouts(tmp_path / "head-pipeline") == [[4, 0], [2, 2], [2, 2]]
    whole = {name: metrics(tmp_path / name) for name in wanted}
    assert len({line["loss"] for line in whole["pipeline"]}) == 6
    assert whole["pipeline-pipeline"] == whole["pipeline"], "the same topology: to the last bit"
    assert whole["distributed-distributed"] == whole["distributed"]
    for name in whole:
        for line, expected in zip(whole[name], whole["pipeline"], strict=True):
            for key in ("loss", "task_loss", "grad_norm", "capacity", "learning_rate"):
                assert line[key] == pytest.approx(expected[key], rel=1e-4), (name, key)


@pytest.mark.usefixtures("single_process")
@pytest.mark.parametrize("stacked", [True, False], ids=["stacked", "by_layer"])
def test_checkpoints_of_megatron_lm(tmp_path, stacked):
    """Megatron's own model, saved by Megatron's own code in Megatron-LM's folders."""
    hf = tiny.save_model(tmp_path / "hf", "qwen2", vocab_size=131, num_key_value_heads=2)
    arch = family_of(config := read_config(hf)).architecture_of(config)
    settings = transformer_config(arch, dtype=torch.float32)
    settings.hetereogenous_dist_checkpoint = not stacked
    settings.perform_initialization = True
    torch.manual_seed(4)
    model = GPTModel(
        settings,
        get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=256,  # padded, as make_vocab_size_divisible_by does
        max_sequence_length=128,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    )
    for parameter in model.parameters():
        parameter.data.uniform_(-1, 1)
    folder = tmp_path / "run" / "iter_0000007"
    folder.mkdir(parents=True)
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("7")
    sharded = model.sharded_state_dict()
    moments = {
        f"moment.{key}": dist_checkpointing.ShardedTensor.from_rank_offsets(
            f"optimizer.state.exp_avg.{key}", torch.zeros(3)
        )
        for key in ("a", "b")
    }
    dist_checkpointing.save({**sharded, **moments, "args": argparse.Namespace(x=1)}, str(folder))
    whole = {name: tensor.detach() for name, tensor in model.named_parameters()}
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        whole[name] = whole[name][:131]

    with pytest.raises(ValueError, match="set model.hf_path"):
        open_base(tmp_path / "run")
    (parameters,) = resume_cases.loaded_parameters(tmp_path / "run", hf, [{}])
    assert parameters.keys() == whole.keys()
    assert all(torch.equal(parameters[name], whole[name]) for name in whole)
    with hf_weights(open_base(tmp_path / "run", hf_path=hf)) as weights, HFReader(hf) as original:
        assert {weight.name for weight in weights} == original.names()
        read = {weight.name: weight.read().clone() for weight in weights}
        assert all(read[name].shape == original.like(name).shape for name in read)
    assert torch.equal(read["model.embed_tokens.weight"], whole["embedding.word_embeddings.weight"])
    fc1 = torch.cat([read[f"model.layers.3.mlp.{x}_proj.weight"] for x in ("gate", "up")])
    assert torch.equal(fc1, whole["decoder.layers.3.mlp.linear_fc1.weight"])
    shutil.rmtree(folder)


@pytest.mark.usefixtures("single_process")
def test_each_rank_reads_its_slices_of_a_hugging_face_folder(tmp_path):
    """Two ranks of a tensor or pipeline split read little more than the model, between them."""
    hf = tiny.save_model(tmp_path / "hf", "qwen3", num_key_value_heads=2)
    with HFReader(hf) as reader:
        total = sum(reader.like(name).nbytes for name in reader.names())
        norms = sum(reader.like(n).nbytes for n in reader.names() if "norm" in n)
    tensor, pipeline = zip(
        *run_ranks(
            resume_cases.rows_read, hf, [{"tensor": 2}, {"pipeline": 2}],
            world=2, folder=tmp_path / "ranks",
        ),
        strict=True,
    )  # fmt: skip
    assert sum(pipeline) == total
    assert tensor == ((total + norms) // 2,) * 2


@pytest.mark.usefixtures("single_process")
def test_what_several_ranks_saved_comes_back_bit_for_bit(tmp_path):
    hf = tiny.save_model(tmp_path / "hf", "qwen2", vocab_size=131, num_key_value_heads=2)
    folders = [tmp_path / "tensor", tmp_path / "pipeline"]
    run_ranks(
        resume_cases.save_in_parts, hf, [{"tensor": 2}, {"pipeline": 2}], folders,
        world=2, folder=tmp_path / "ranks",
    )  # fmt: skip
    for folder in folders:
        base = open_base(folder, hf_path=hf)
        with hf_weights(base) as weights, HFReader(hf) as original:
            read = {weight.name: weight.read().clone() for weight in weights}
            assert read.keys() == original.names()
            for name, tensor in read.items():
                assert torch.equal(tensor, original.rows(name, 0, len(tensor))), (folder, name)
