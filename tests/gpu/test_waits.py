"""The host waits for the device once in each layer that skips, for its number of tokens, and in
dense training nowhere; a step waits at its end."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import pytest
import torch

from megatron_mod.parallel import device
from megatron_mod.routing.config import RoutingConfig
from megatron_mod.routing.scheme import OF_ANY_MODEL, Scheme
from tests.distributed import cases
from tests.distributed.test_granularities import make_case
from tests.gpu.where import HAS_GPU, layers_of, long_on_cpu
from tests.helpers.ranks import meet
from tests.helpers.runs import DEFAULT, Trainer

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("single_process"), long_on_cpu]

SCHEMES = [(name, None) for name in OF_ANY_MODEL]
SCHEMES += [(name, "selected") for name in ("attn_token", "block_token", "attn_token+mlp_token")]
AT_ITS_END = 2  # waits of a step: whether it is finite, and Megatron's norm of the gradient


@contextlib.contextmanager
def waits() -> Iterator[list]:
    """The times that the host waits for the device in the block; on a CPU it never does."""
    seen: list = []
    if not HAS_GPU:
        yield seen
        return
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield seen
        finally:
            torch.cuda.set_sync_debug_mode("default")
            seen += [w for w in said if "synchronizing" in str(w.message)]


def count(waited: int) -> int:
    return waited if HAS_GPU else 0


def layer_of(routing: RoutingConfig, implementation: str):
    """The only layer of a model with weights from a seed, its rotary table, and its input."""
    from megatron_mod.model.architecture import Architecture
    from megatron_mod.model.builder import build_model, transformer_config

    arch = Architecture(
        num_layers=1, hidden_size=256, ffn_hidden_size=512, num_attention_heads=4,
        num_query_groups=2, kv_channels=64, vocab_size=64, max_sequence_length=128,
        layernorm_epsilon=1e-5, rotary_base=10000.0, tied_embeddings=True,
    )  # fmt: skip
    config = transformer_config(arch, dtype=torch.bfloat16)
    model = build_model(arch, config, routing, implementation=implementation)[0]
    generator = torch.Generator().manual_seed(4)
    for name, parameter in sorted(model.named_parameters()):
        scale = 0.3 if "router" in name else 0.05
        values = torch.randn(parameter.shape, generator=generator) * scale
        parameter.data.copy_(1 + values if "norm" in name else values)
    hidden = torch.randn(32, 8, 256, generator=torch.Generator().manual_seed(8))
    hidden = hidden.to(device.device(), torch.bfloat16).requires_grad_()
    return model.decoder.layers[0], model.rotary_pos_emb(32), hidden


@pytest.mark.parametrize("stand_in_rank", [None, 3])
@pytest.mark.parametrize("implementation", ["local", "transformer_engine"])
@pytest.mark.parametrize(("granularity", "keys_values"), SCHEMES)
def test_a_routed_layer_waits_for_its_number_of_tokens(
    granularity, keys_values, implementation, stand_in_rank
):
    for compute, expected in (("dense", 0), ("sparse", 1)):
        capacity = (0.5,) * len(Scheme.parse(granularity).targets)
        routing = RoutingConfig(
            granularity, (0,), capacity, keys_values=keys_values, training_compute=compute,
            bias=True, stand_in_rank=stand_in_rank, capacity_loss_weight="auto",
        )  # fmt: skip
        with layers_of(implementation):
            layer, rotary, hidden = layer_of(routing, implementation)
            for training, most in ((True, expected), (False, 1)):
                layer.train(training)
                for measured in (False, True):  # what is made once is made in the first
                    for router in layer.routers.values():
                        router.reset(notes_every=2 if training else 0)
                    with waits() as seen:
                        output, _ = layer(hidden, rotary_pos_emb=rotary)
                        output.sum().backward()
                    if measured:
                        assert len(seen) == count(most), (compute, training)
        for router in layer.routers.values():
            kept, valid = float(router.kept), float(router.valid)
            assert 0 < kept < valid, "the case skips nothing or everything"


@pytest.fixture(scope="module")
def case(tmp_path_factory, single_process):
    return make_case(tmp_path_factory.mktemp("waits"), "llama", {"num_key_value_heads": 2})


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("loss", ["task", "both"])
@pytest.mark.parametrize("compute", ["dense", "sparse"])
@pytest.mark.parametrize("implementation", ["local", "transformer_engine"])
def test_forward_and_backward_of_a_step(case, implementation, compute, loss, packed):
    from megatron_mod.conversion.restore import put_added
    from megatron_mod.routing.capacity import CapacityController
    from megatron_mod.training.optimizer import wrap_ddp
    from megatron_mod.training.plan import LOSSES
    from megatron_mod.training.step import run_schedule

    _, base, samples, added = case
    routing = cases.routing_config(
        granularity="attn_token", training_compute=compute, bias=True, stand_in_rank=3,
        capacity_loss_weight="auto",
    )  # fmt: skip
    ranks = meet()
    with layers_of(implementation):
        model = cases.build(
            base, ranks, routing=routing, implementation=implementation, dtype=torch.bfloat16
        )
        put_added(model, cases.only(added, routing))
        chunks = wrap_ddp(model, use_distributed_optimizer=False)
        controller = CapacityController(routing, device=device.device())
        batch = cases.pack(samples) if packed else cases._loader(samples, ranks, False).step(0)
        for measured in (False, True):
            for chunk in chunks:
                chunk.zero_grad_buffer()
            with waits() as seen:
                result = run_schedule(
                    chunks, model, batch, routing, controller=controller, loss=LOSSES[loss](),
                    note_units=True,
                )  # fmt: skip
                controller.end_step(result.capacity, result.pull, result.num_units)
            if measured:
                skips = len(routing.layers) * len(batch.micro_batches)
                assert len(seen) == count(skips if compute == "sparse" else 0)
    assert 0 < float(result.capacity.mean()) < 1


@pytest.mark.parametrize("settings", [{}, {"train__recompute": "full", "train__loss": "both"}])
def test_a_whole_step_of_dense_training_waits_at_its_end(tmp_path, settings):
    """With routers' biases that follow, stand-ins, and a price."""
    from megatron_mod.config import cli
    from megatron_mod.training.loop import Training
    from megatron_mod.training.plan import prepare
    from megatron_mod.training.resume import RunCheckpoints
    from megatron_mod.training.run_folder import RunFolder

    trainer = Trainer(tmp_path / "trainer", num_key_value_heads=2)
    settings = {**DEFAULT, "logging__interval": 100, "model__dtype": "bfloat16", **settings}
    config = cli.parse(trainer.arguments(tmp_path / "run", **settings))
    plan, folder = prepare(config), RunFolder(config.checkpoint)
    with folder.held():
        training = Training(config, plan, RunCheckpoints(config, folder, plan))
        for step in (1, 2):
            training.take(step)
        with waits() as seen:
            training.take(3)
    assert len(seen) <= AT_ITS_END
    assert training.state.metrics.tokens > 0
