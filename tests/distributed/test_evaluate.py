"""lm-eval's requests on a Megatron model at every topology against lm-eval's own ``hf`` model."""

from __future__ import annotations

import pytest

pytest.importorskip("lm_eval", reason="needs the 'eval' extra")

from transformers import AutoTokenizer

from tests.distributed import cases
from tests.helpers import asked
from tests.helpers.ranks import meet, run_ranks
from tests.helpers.routed import save_export

TOPOLOGIES = [{"tensor": 2, "pipeline": 2}, {"pipeline": 2}, {"tensor": 2}, {}]  # the rest: data
SCHEME = "attn_sequence"
ROUNDING = 1e-5  # relative, fp32


def answers(base, routers) -> list[dict]:
    """What every topology answers, pooling ``all`` and ``prompt``, and the capacities."""
    from megatron_mod.data.tokenizer import load_tokenizer
    from megatron_mod.evaluation.lm_eval_model import BackendLM
    from megatron_mod.evaluation.megatron_backend import MegatronBackend

    tokenizer = load_tokenizer(base / "huggingface", vocab_size=259)
    routing = cases.routing_config(layers=tuple(routers), capacity=(0.5,) * len(routers))
    found = []
    for topology in TOPOLOGIES:
        model = cases.build(base, meet(**topology), routing=routing)
        for layer, router in model.routers().items():
            router.weight.data.copy_(routers[layer])
        answered = {}
        for pooling in ("all", "prompt"):
            backend = MegatronBackend(model, tokenizer, batch_size=2, pooling=pooling)
            answered[pooling] = asked.ask(BackendLM(backend))
            answered[pooling]["capacity"] = backend.capacity()
        found.append(answered)
    return found


def test_answers_equal_lm_evals_at_every_topology(tmp_path, single_process):
    from megatron_mod.evaluation.huggingface_backend import HuggingFaceBackend, load_huggingface
    from megatron_mod.evaluation.lm_eval_model import BackendLM

    hf = asked.save_model(tmp_path / "hf")
    tokenizer = AutoTokenizer.from_pretrained(hf)
    routers = asked.mixed_routers(hf, tokenizer, SCHEME)
    export = save_export(tmp_path / "export", hf, routers)
    cases.convert(hf, tmp_path / "base")
    expected = asked.ask(asked.lm_eval_hf(export))
    honest = asked.prompt_pooled(hf, tokenizer, routers, SCHEME)
    capacities = {}
    for pooling in ("all", "prompt"):
        backend = HuggingFaceBackend(*load_huggingface(export), pooling=pooling)
        asked.ask(BackendLM(backend))
        capacities[pooling] = backend.capacity()
    ranks = run_ranks(answers, tmp_path / "base", routers, world=4, folder=tmp_path / "ranks")
    for per_rank in ranks:
        for topology, found in zip(TOPOLOGIES, per_rank, strict=True):
            for kind in ("loglikelihood", "loglikelihood_rolling"):
                difference = asked.largest_difference(found["all"][kind], expected[kind])
                assert difference <= ROUNDING, (topology, kind)
            ours = [nats for nats, _ in found["prompt"]["loglikelihood"]]
            assert asked.largest_difference(ours, honest) <= ROUNDING, topology
            for pooling, values in found.items():
                assert values["generate_until"] == expected["generate_until"], topology
                assert values["capacity"] == capacities[pooling], (topology, pooling)
