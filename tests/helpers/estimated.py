"""An estimate of a tiny training, and that training on this process's rank, real or made up."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from megatron_mod.config import cli
from megatron_mod.data.batch import collate
from megatron_mod.data.chat import Sample
from megatron_mod.data.loader import StepBatch
from megatron_mod.estimate.placed import Placed
from megatron_mod.model.architecture import Architecture
from megatron_mod.model.builder import ModelChunks, build_model, transformer_config
from megatron_mod.parallel import device, topology
from megatron_mod.routing.capacity import CapacityController
from megatron_mod.training.job import arrange
from megatron_mod.training.optimizer import wrap_ddp
from megatron_mod.training.plan import DTYPES, LOSSES
from megatron_mod.training.step import run_schedule

ROWS, LENGTH = 3, 64
ARCH = Architecture(
    num_layers=4, hidden_size=96, ffn_hidden_size=256, num_attention_heads=4, num_query_groups=2,
    kv_channels=24, vocab_size=331, max_sequence_length=128, layernorm_epsilon=1e-5,
    rotary_base=1e4, tied_embeddings=False,
)  # fmt: skip


def config_of(**changes: object):
    """Settings of a training that routes two of four layers; changes as ``section__field``."""
    settings = {
        "model.checkpoint": "base", "data.train": "train.jsonl", "checkpoint.save": "run",
        "train.steps": 1, "router.layers": "[1,2]", "router.stand_in_rank": 8,
        "train.global_batch_size": ROWS, "train.micro_batch_size": ROWS, "data.max_length": LENGTH,
        **{name.replace("__", "."): value for name, value in changes.items()},
    }  # fmt: skip
    return cli.parse([f"--{name}={value}" for name, value in settings.items() if value is not None])


def place(arch: Architecture = ARCH, *, world_size: int = 1, **changes: object) -> Placed:
    return Placed.of(arrange(config_of(**changes), arch, world_size=world_size))


def pretend(placed: Placed) -> None:
    """Be the first of the ranks that a job needs: their collectives take nothing and send nothing.

    ``tests.helpers.ranks.meet`` goes back to real ones.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    ranks = placed.job.topology
    topology.shutdown()
    dist.init_process_group("fake", rank=0, world_size=ranks.world_size, store=FakeStore())
    device.select()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=ranks.tensor,
        context_parallel_size=ranks.context,
        create_gloo_process_groups=False,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(0)


def training_of(placed: Placed) -> tuple[ModelChunks, Callable[[], None]]:
    """The model that the estimate is of, with random weights, and a step of it on rows that are all
    as long as can be."""
    job, config, arch = placed.job, placed.job.config, placed.job.arch
    dtype = DTYPES[config.model.dtype]
    megatron = transformer_config(arch, job.topology, dtype=dtype, recompute=config.train.recompute)
    model = build_model(arch, megatron, job.routing, trained=config.train.parts, lora=job.lora)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    ids = torch.randint(3, 128, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
    samples = [Sample(row, [False] + [True] * (LENGTH - 1), "made") for row in ids.tolist()]
    tokens = ROWS * LENGTH
    batch = StepBatch([collate(samples)], ROWS, tokens, tokens - ROWS, tokens)
    chunks = wrap_ddp(model, use_distributed_optimizer=False)

    def step() -> None:
        run_schedule(
            chunks,
            model,
            batch,
            job.routing,
            controller=CapacityController(job.routing),
            loss=LOSSES[config.train.loss](),
            note_units=job.routing.bias and "routers" in config.train.parts,
        )

    return model, step
