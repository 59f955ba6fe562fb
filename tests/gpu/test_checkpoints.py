"""Checkpoints do not tell which layers wrote them, and a run that goes on is the one in one go."""

from __future__ import annotations

import contextlib
import json
import shutil

import pytest
import torch
from megatron.core import dist_checkpointing

from megatron_mod.checkpoint.distributed import load_tensors
from megatron_mod.conversion.convert import megatron_to_hf
from megatron_mod.conversion.hf_reader import HFReader
from megatron_mod.conversion.source import open_base, open_source
from megatron_mod.evaluation.parity import max_relative_difference, megatron_logits, prompt_batch
from megatron_mod.parallel.topology import ONE_RANK
from megatron_mod.training.checkpoint import RANDOM
from tests.distributed import cases
from tests.distributed.test_granularities import make_case
from tests.gpu.where import HAS_GPU, layers_of, long_on_cpu
from tests.helpers.ranks import meet
from tests.helpers.runs import DEFAULT, Trainer, metrics

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("single_process"), long_on_cpu]

IMPLEMENTATIONS = ("local", "transformer_engine")
SHAPE = {"num_key_value_heads": 2, "head_dim": 16}


@pytest.fixture(scope="module")
def case(tmp_path_factory, single_process):
    return make_case(tmp_path_factory.mktemp("qwen3"), "qwen3", SHAPE)


@contextlib.contextmanager
def can_run(implementation: str, monkeypatch):
    """Trainings and evaluations take an implementation for one that works here."""
    with layers_of(implementation), monkeypatch.context() as patched:
        if not HAS_GPU:
            patched.setattr(
                "megatron_mod.training.plan.choose_implementation", lambda *_, **__: implementation
            )
            patched.setattr(
                "megatron_mod.conversion.restore.choose_implementation",
                lambda *_, **__: implementation,
            )
            patched.setattr(
                "megatron_mod.conversion.restore.why_not_transformer_engine", lambda: None
            )
        yield


@pytest.mark.parametrize(("wrote", "reads"), [IMPLEMENTATIONS, IMPLEMENTATIONS[::-1]])
@pytest.mark.parametrize("routed", [False, True], ids=["dense", "routed"])
def test_what_one_wrote_the_other_loads(case, tmp_path, wrote, reads, routed):
    """As Megatron-LM saves it, with Transformer Engine's own states beside the parameters."""
    hf, base, *_ = case
    routing = cases.routing_config(granularity="attn_token") if routed else None
    folder = tmp_path / "iter_0000001"
    folder.mkdir()
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("1")
    parameters = []
    ranks = meet()
    with layers_of("transformer_engine"):
        (model,) = cases.build(base, ranks, implementation=wrote, routing=routing)
        state = {k: v for k, v in model.sharded_state_dict().items() if "router" not in k}
        if wrote == "transformer_engine":
            assert any("_extra_state" in name for name in state)
        dist_checkpointing.save(state, str(folder))
        opened = open_base(tmp_path, hf_path=hf)
        for source in (opened, base, hf):
            (model,) = cases.build(source, ranks, implementation=reads, routing=routing)
            described = model.sharded_state_dict()
            parameters.append({described[n].key: p.detach() for n, p in model.named_parameters()})
    for found in parameters[1:]:
        assert found.keys() == parameters[0].keys()
        assert all(torch.equal(found[key], parameters[0][key]) for key in found)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_logits_equal_hugging_faces_and_the_way_back_is_exact(case, tmp_path, implementation):
    hf, base, samples, _ = case
    megatron_to_hf(base, tmp_path / "back")
    with HFReader(hf) as ours, HFReader(tmp_path / "back") as theirs:
        assert ours.names() == theirs.names()
        assert all(torch.equal(ours.tensor(n), theirs.tensor(n)) for n in ours.names())
    batches = [prompt_batch([sample.ids for sample in samples])]
    with layers_of(implementation):
        model = cases.build(base, meet(), implementation=implementation)
        difference = max_relative_difference(model, tmp_path / "back", batches)
    tf32 = HAS_GPU and implementation == "transformer_engine"
    assert difference <= (1e-2 if tf32 else 2e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_run_that_goes_on_is_the_one_in_one_go(tmp_path, monkeypatch, implementation, dtype):
    trainer = Trainer(tmp_path / "trainer", **SHAPE)
    trainer.write_distinct()
    settings = {
        **DEFAULT, "model__dtype": dtype, "model__transformer_impl": implementation,
        "train__deterministic": "true", "router__training_compute": "sparse",
    }  # fmt: skip
    whole, again, other = (tmp_path / name for name in ("whole", "again", "other"))
    with can_run(implementation, monkeypatch):
        trainer.train(whole, **settings)
        shutil.copytree(whole, again)
        shutil.rmtree(again / "step_00000006")
        (again / "summary.json").unlink()
        trainer.train(again, **settings)
        trainer.train(other, **settings)  # in one go too: equal steps are equal
        manifest = json.loads((whole / "step_00000006" / "megatron_mod.json").read_text())
        assert manifest["implementation"] == implementation
        for run in (again, other):
            assert metrics(run) == metrics(whole)
            found, wanted = (load_tensors(r / "step_00000006" / "state") for r in (run, whole))
            assert found.keys() == wanted.keys()
            # A run in the same process does not begin at the same random state, and asks for none.
            compared = [k for k in found if run == again or not k.startswith(RANDOM)]
            assert all(torch.equal(found[key], wanted[key]) for key in compared), run


def test_a_run_of_one_is_evaluated_by_both(tmp_path, monkeypatch):
    from megatron_mod.conversion.restore import restore_model

    trainer = Trainer(tmp_path / "trainer", **SHAPE)
    run = tmp_path / "run"
    settings = {**DEFAULT, "model__transformer_impl": "transformer_engine", "train__steps": 2}
    with can_run("transformer_engine", monkeypatch):
        trainer.train(run, **settings)
        logits = []
        for asked in (None, "local"):
            model, _ = restore_model(
                open_source(run), ONE_RANK, implementation=asked, dtype=torch.bfloat16
            )
            kinds = {type(m).__name__ for m in model.modules()}
            assert ("TECoreAttention" in kinds) == (asked is None)
            (found,) = megatron_logits(model, [prompt_batch([list(range(5, 40))])])
            logits.append(found.float())
    assert (logits[0] - logits[1]).norm() <= 0.05 * logits[1].norm()
