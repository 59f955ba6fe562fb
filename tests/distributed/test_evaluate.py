"""lm-eval's requests on a Megatron model at every topology against lm-eval's own ``hf`` model."""

from __future__ import annotations

import pytest

pytest.importorskip("lm_eval", reason="needs the 'eval' extra")

from transformers import AutoTokenizer

from tests.distributed import cases
from tests.helpers import asked, formula, tiny
from tests.helpers.ranks import meet, run_ranks
from tests.helpers.routed import save_export

QUICK = [{"tensor": 2, "pipeline": 2}]
REST = [{"pipeline": 2}, {"tensor": 2}, {}]  # of four ranks; the rest: data
CASES = [("attn_sequence", "all"), ("attn_sequence", "prompt"), ("block_token_all", None)]
ROUNDING = 1e-5  # relative, fp32


def answers(base, routers, topologies: list[dict]) -> list[dict]:
    """What a Megatron model answers in each topology and case, and its capacities."""
    from megatron_mod.data.tokenizer import load_tokenizer
    from megatron_mod.evaluation.lm_eval_model import BackendLM
    from megatron_mod.evaluation.megatron_backend import MegatronBackend

    tokenizer = load_tokenizer(base / "huggingface", vocab_size=tiny.VOCAB)
    found = []
    for topology in topologies:
        ranks, answered = meet(**topology), {}
        for scheme, pooling in CASES:
            layers = tuple(dict.fromkeys(layer for layer, _ in routers[scheme]))
            settings = {"layers": layers, "capacity": (0.5,) * len(layers)}
            routing = cases.routing_config(**settings, **formula.SCHEMES[scheme])
            model = cases.build(base, ranks, routing=routing)
            for place, router in model.routers().items():
                router.weight.data.copy_(routers[scheme][place])
            backend = MegatronBackend(model, tokenizer, batch_size=2, pooling=pooling)
            answered[scheme, pooling] = asked.ask(BackendLM(backend))
            answered[scheme, pooling]["capacity"] = backend.capacity()
        found.append(answered)
    return found


def capacity(export, pooling: str | None) -> dict:
    """What the export itself reports of the same requests, one at a time."""
    from megatron_mod.evaluation.huggingface import load_huggingface
    from megatron_mod.evaluation.huggingface_backend import HuggingFaceBackend
    from megatron_mod.evaluation.lm_eval_model import BackendLM

    backend = HuggingFaceBackend(*load_huggingface(export), pooling=pooling)
    asked.ask(BackendLM(backend))
    return backend.capacity()


@pytest.mark.parametrize(
    "topologies", [QUICK, pytest.param(REST, marks=pytest.mark.slow)], ids=["quick", "rest"]
)
def test_answers_equal_lm_evals_at_every_topology(tmp_path, topologies, single_process):
    hf = asked.save_model(tmp_path / "hf")
    cases.convert(hf, tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(hf)
    routers, expected, capacities = {}, {}, {}
    for scheme, pooling in CASES:
        if scheme not in routers:
            routers[scheme] = asked.mixed_routers(hf, tokenizer, scheme)
            settings = formula.SCHEMES[scheme]
            export = save_export(tmp_path / scheme, hf, routers[scheme], **settings)
            expected[scheme] = asked.ask(asked.lm_eval_hf(export))
        capacities[scheme, pooling] = capacity(tmp_path / scheme, pooling)
    honest = asked.prompt_pooled(hf, tokenizer, routers["attn_sequence"], "attn_sequence")
    ranks = run_ranks(
        answers, tmp_path / "base", routers, topologies, world=4, folder=tmp_path / "ranks"
    )
    for topology, found in (
        (t, f) for rank in ranks for t, f in zip(topologies, rank, strict=True)
    ):
        for (scheme, pooling), values in found.items():
            where = (topology, scheme, pooling)
            assert values["generate_until"] == expected[scheme]["generate_until"], where
            assert values["capacity"] == capacities[scheme, pooling], where
            if pooling == "prompt":
                ours = [nats for nats, _ in values["loglikelihood"]]
                assert asked.largest_difference(ours, honest) <= ROUNDING, where
                continue
            for kind in ("loglikelihood", "loglikelihood_rolling"):
                difference = asked.largest_difference(values[kind], expected[scheme][kind])
                assert difference <= ROUNDING, (*where, kind)
