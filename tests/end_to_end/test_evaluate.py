"""Evaluation of exports against lm-eval's ``hf`` model, the formula and Hugging Face's loss."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

pytest.importorskip("lm_eval", reason="needs the 'eval' extra")

from megatron_mod.config.evaluation import Request
from megatron_mod.evaluation.evaluate import evaluate as evaluate_on
from megatron_mod.evaluation.evaluate import table
from megatron_mod.evaluation.huggingface import load_huggingface
from megatron_mod.evaluation.huggingface_backend import HuggingFaceBackend
from megatron_mod.evaluation.lm_eval_model import BackendLM
from megatron_mod.evaluation.tasks import find_tasks
from tests.helpers import asked, formula
from tests.helpers.routed import save_export

ROOT = Path(__file__).resolve().parents[2]
ROUNDING = 1e-5  # relative, fp32
SCHEMES = ("attn_sequence", "block_token_all")
TASK = """
task: tiny_choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
DOCUMENTS = [
    {"question": "What is two and two?", "choices": ["four", "five"], "answer": 0},
    {"question": "The capital of France is", "choices": ["Rome", "Paris"], "answer": 1},
    {"question": "", "choices": ["yes", "no"], "answer": 1},
]


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """Dense folder, tokenizer, and per scheme its routers and export."""
    folder = tmp_path_factory.mktemp("evaluate")
    hf = asked.save_model(folder / "hf")
    tokenizer = AutoTokenizer.from_pretrained(hf)
    routers = {name: asked.mixed_routers(hf, tokenizer, name) for name in SCHEMES}
    exports = {
        name: save_export(folder / name, hf, routers[name], **formula.SCHEMES[name])
        for name in SCHEMES
    }
    return hf, tokenizer, routers, exports


def ours(folder, *, closed: bool = False, **settings) -> BackendLM:
    model, tokenizer = load_huggingface(folder)
    if closed:
        model.set_thresholds(0.0)
    return BackendLM(HuggingFaceBackend(model, tokenizer, **settings))


def compare(found: dict, expected: dict) -> None:
    for kind in ("loglikelihood", "loglikelihood_rolling"):
        assert asked.largest_difference(found[kind], expected[kind]) <= ROUNDING, kind
    assert found["generate_until"] == expected["generate_until"]


@pytest.mark.parametrize(
    ("scheme", "pooling"), [("attn_sequence", "all"), ("block_token_all", None)], ids=SCHEMES
)
def test_whole_rows_equal_lm_evals_hf_model(case, scheme, pooling):
    _, _, _, exports = case
    expected = asked.ask(asked.lm_eval_hf(exports[scheme]))
    for batch_size in (1, 4):
        lm = ours(exports[scheme], pooling=pooling, batch_size=batch_size)
        compare(asked.ask(lm), expected)
        assert 0 < min(lm.model.capacity().values()) < 1


def test_routers_off_equal_lm_evals_hf_model_on_the_dense_folder(case):
    hf, _, _, exports = case
    expected = asked.ask(asked.lm_eval_hf(hf))
    compare(asked.ask(ours(hf, batch_size=4)), expected)
    for scheme in SCHEMES:
        compare(asked.ask(ours(exports[scheme], closed=True, batch_size=4)), expected)


def test_by_default_the_decision_sees_the_context_only(case):
    hf, tokenizer, routers, exports = case
    expected = asked.prompt_pooled(hf, tokenizer, routers["attn_sequence"], "attn_sequence")
    for batch_size in (1, 4):
        found = asked.ask(ours(exports["attn_sequence"], batch_size=batch_size))
        nats = [score for score, _ in found["loglikelihood"]]
        assert asked.largest_difference(nats, expected) <= ROUNDING
    whole = [
        s for s, _ in asked.ask(ours(exports["attn_sequence"], pooling="all"))["loglikelihood"]
    ]
    assert asked.largest_difference(whole, expected) > 100 * ROUNDING


def test_a_window_of_a_text_is_decided_on_as_a_whole_unless_asked(case, tmp_path):
    """Its prompt would be one token."""
    _, _, _, exports = case
    text = tmp_path / "text.txt"
    text.write_text("What is two and two? Four, says everybody in Paris.")
    (nats,) = asked_about(
        asked.lm_eval_hf(exports["attn_sequence"]), "loglikelihood_rolling", [(text.read_text(),)]
    )
    reports = {}
    for pooling in (None, "all", "prompt"):
        lm = ours(exports["attn_sequence"], pooling=pooling)
        request = Request(str(exports["attn_sequence"]), perplexity=str(text), pooling=pooling)
        report = reports[pooling] = evaluate_on(request, lm.model, None, is_first_rank=True)
        whole = pooling != "prompt"
        assert report["pooling"] == report["text_pooling"] == ("all" if whole else "prompt")
        found = -math.log(report["perplexity"]) * report["perplexity_tokens"]
        assert math.isclose(found, nats, rel_tol=1e-4) == whole
        (rolled,) = asked_about(lm, "loglikelihood_rolling", [(text.read_text(),)])
        assert math.isclose(rolled, found, rel_tol=1e-6)
        said = "a window sees all of it" if whole else "sees one token, the one before it"
        assert said in table(report)
    assert reports[None]["capacity"] == reports["all"]["capacity"]


def test_generation_ends_at_a_stop_string_of_several_tokens(case):
    _, _, _, exports = case
    free = asked.ask(ours(exports["attn_sequence"]))["generate_until"]
    stop = free[0][4:7]
    found = asked.ask(ours(exports["attn_sequence"], batch_size=4), until=(stop,))
    assert found["generate_until"] == [text.split(stop)[0] for text in free]
    assert len(found["generate_until"][0]) <= 4


def test_the_tool_reports_perplexity_tasks_capacity_and_pooling(case, tmp_path):
    _, tokenizer, _, exports = case
    data = tmp_path / "choices.jsonl"
    data.write_text("\n".join(map(json.dumps, DOCUMENTS)))
    (tmp_path / "choices.yaml").write_text(TASK.format(data=data))
    text = tmp_path / "text.txt"
    text.write_text("What is two and two? Four, says everybody in Paris.")
    done = evaluate(
        *("--load", exports["attn_sequence"], "--perplexity", text, "--pooling", "all"),
        *("--tasks", "tiny_choices", "--include_path", tmp_path, "--json", tmp_path / "out.json"),
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out.json").read_text())
    lm = asked.lm_eval_hf(exports["attn_sequence"])
    (nats,) = asked_about(lm, "loglikelihood_rolling", [(text.read_text(),)])
    tokens = len(tokenizer.encode(text.read_text()))
    assert report["perplexity_tokens"] == tokens
    assert math.isclose(report["perplexity"], math.exp(-nats / tokens), rel_tol=1e-4)
    right = 0
    for document in DOCUMENTS:
        pairs = [(document["question"], f" {choice}") for choice in document["choices"]]
        scores = [score for score, _ in asked_about(lm, "loglikelihood", pairs)]
        right += scores.index(max(scores)) == document["answer"]
    assert math.isclose(report["results"]["tiny_choices"]["acc,none"], right / len(DOCUMENTS))
    assert report["pooling"] == "all"
    layers = report["capacity"]["per_layer"]
    assert set(layers) == {"1", "2", "3"}
    assert math.isclose(report["capacity"]["mean"], sum(layers.values()) / 3)
    assert "tiny_choices" in done.stdout
    assert "pooling     all" in done.stdout


def asked_about(lm, kind, requests):
    from lm_eval.api.instance import Instance

    return getattr(lm, kind)([Instance(kind, {}, one, i) for i, one in enumerate(requests)])


def test_perplexity_of_conversations_equals_hugging_faces_loss(case, tmp_path):
    from megatron_mod.evaluation.perplexity import perplexity, read_rows

    hf, tokenizer, _, _ = case
    path = tmp_path / "two.jsonl"
    records = [("What is two?", "A number."), ("And three?", "Another, larger number.")]
    path.write_text("\n".join(json.dumps({"prompt": p, "completion": c}) for p, c in records))
    model, _ = load_huggingface(hf)
    nats = tokens = 0
    for prompt, completion in records:
        before = tokenizer.encode(f"<|user|>\n{prompt}\n<|assistant|>\n")
        answer = tokenizer.encode(f"{completion}</s>")
        ids = torch.tensor([before + answer])
        labels = torch.tensor([[-100] * len(before) + answer])
        nats += float(model(ids, labels=labels).loss.detach()) * len(answer)
        tokens += len(answer)
    rows = read_rows(path, tokenizer, max_length=90)
    (tmp_path / "two.json").write_text(
        json.dumps([{"prompt": p, "completion": c} for p, c in records])
    )
    assert read_rows(tmp_path / "two.json", tokenizer, max_length=90) == rows
    found = perplexity(HuggingFaceBackend(model, tokenizer, batch_size=2), rows)
    assert found.tokens == tokens
    assert math.isclose(found.perplexity, math.exp(nats / tokens), rel_tol=1e-4)


def test_what_would_be_ignored_is_refused(case, tmp_path):
    hf, _, _, exports = case
    (tmp_path / "choices.yaml").write_text(TASK.format(data="nowhere") + "num_fewshot: 0\n")
    with pytest.raises(ValueError, match="--include.path nowhere: no such folder"):
        find_tasks(Request(str(hf), tasks=("tiny_choices",), include_path="nowhere"))
    settings = {"include_path": str(tmp_path), "num_fewshot": 2}
    with pytest.raises(ValueError, match="--num_fewshot 2: .*'tiny_choices' fixes 0"):
        find_tasks(Request(str(hf), tasks=("tiny_choices",), **settings))
    with pytest.raises(ValueError, match="each token decides for itself"):
        ours(exports["block_token_all"], pooling="prompt")
    with pytest.raises(ValueError, match="no routers"):
        ours(hf, pooling="prompt")
    with pytest.raises(ValueError, match="96 positions"):
        ours(hf, max_length=97)
    with pytest.raises(ValueError, match=r"do_sample = True.*greedy"):
        asked_about(ours(hf), "generate_until", [("a", {"do_sample": True, "temperature": 1.0})])
    with pytest.raises(ValueError, match="max_gen_toks = 96"):
        asked_about(ours(hf), "generate_until", [("a", {"max_gen_toks": 96})])
    with pytest.raises(ValueError, match="continuation of 97 tokens"):
        asked_about(ours(hf), "loglikelihood", [("a", "b" * 97)])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "nothing to evaluate"),
        ({"perplexity": "x.txt", "limit": 1}, "--limit belongs to --tasks"),
        ({"tasks": ("a",), "limit": 0}, "--limit 0"),
        ({"perplexity": "nowhere.txt"}, "--perplexity nowhere.txt: no such file"),
        ({"tasks": ("a",), "json": "nowhere/out.json"}, "--json .* folder does not exist"),
        ({"tasks": ("a",), "load": "tests"}, "neither a Hugging Face folder"),
        ({"tasks": ("a",), "load": "nowhere"}, "--load nowhere: no such folder"),
        ({"tasks": ("a",), "base": "tests"}, "--base tests: would be ignored"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(case, settings, message):
    with pytest.raises(ValueError, match=message):
        Request(**{"load": str(case[0]), **settings})


def test_parallel_degrees_need_a_megatron_checkpoint(case):
    with pytest.raises(ValueError, match="--pipeline 2: a Hugging Face folder"):
        Request(str(case[0]), tasks=("a",), pipeline=2)


def test_a_mistake_on_the_command_line_is_one_message(tmp_path):
    done = evaluate("--load", tmp_path, "--tasks", "a")
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: --load {tmp_path}: neither")
    assert done.stderr.count("\n") == 1


def evaluate(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "tools/evaluate.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)
