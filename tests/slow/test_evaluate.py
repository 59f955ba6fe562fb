"""Evaluation under torchrun, and lm-eval's whole collection (slow to read)."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("lm_eval", reason="needs the 'eval' extra")

from megatron_mod.conversion.convert import hf_to_megatron
from tests.helpers import asked

ROOT = Path(__file__).resolve().parents[2]
TOOL = str(ROOT / "tools/evaluate.py")
TASK = """
task: tiny_rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: byte_perplexity}}]
"""


def save_task(folder: Path) -> list[str]:
    texts = ["Four, says everybody.", "Paris is the capital of France.", "Three texts, two ranks."]
    data = folder / "texts.jsonl"
    data.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    (folder / "rolling.yaml").write_text(TASK.format(data=data))
    return texts


@pytest.mark.parametrize("degree", ["--tensor", "--pipeline", None], ids=["tp", "pp", "dp"])
def test_two_ranks_report_what_lm_evals_hf_model_finds(degree, tmp_path, single_process):
    from lm_eval.api.instance import Instance

    hf = asked.save_model(tmp_path / "hf")
    hf_to_megatron(hf, tmp_path / "megatron")
    texts = save_task(tmp_path)
    degrees = [degree, "2"] if degree else []
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
    ]
    where = ["--load", tmp_path / "megatron", "--include_path", tmp_path]
    what = ["--tasks", "tiny_rolling", "--json", tmp_path / "out.json", "--batch_size", "2"]
    subprocess.run([*launch, TOOL, *map(str, (*where, *what, *degrees))], check=True)
    report = json.loads((tmp_path / "out.json").read_text())
    requests = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in texts]
    nats = sum(asked.lm_eval_hf(hf).loglikelihood_rolling(requests))
    expected = math.exp(-nats / sum(len(text.encode()) for text in texts))
    found = report["results"]["tiny_rolling"]["byte_perplexity,none"]
    assert math.isclose(found, expected, rel_tol=1e-4)
    assert report["capacity"] is None


def test_an_unknown_task_is_told_with_the_nearest_names(tmp_path):
    from megatron_mod.config.evaluation import Request
    from megatron_mod.evaluation.tasks import find_tasks

    hf = asked.save_model(tmp_path / "hf")
    save_task(tmp_path)
    with pytest.raises(ValueError, match="unknown task 'tiny_roling'.*'tiny_rolling'"):
        find_tasks(Request(str(hf), tasks=("tiny_roling",), include_path=str(tmp_path)))
