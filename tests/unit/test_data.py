"""Text to ids, labels and batches."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoTokenizer

from megatron_mod.data.chat import IGNORE, Sample, messages_of, render, tokenize
from megatron_mod.data.dataset import load_samples
from megatron_mod.data.loader import Loader, collate
from megatron_mod.data.python_docs import records, write_splits
from megatron_mod.routing.masks import TokenRole
from tests.helpers import tiny

OWN_TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "Häh?"},
    {"role": "assistant", "content": "Four, the number."},
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return AutoTokenizer.from_pretrained(tiny.save_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.mark.parametrize("template", [None, OWN_TEMPLATE], ids=["published", "own"])
def test_labels_are_the_answers_and_their_end_of_text(tokenizer, template):
    tokenizer.chat_template = template
    sample = tokenize(TURNS, tokenizer, max_length=500, source="here")
    labelled = [token for token, label in zip(sample.ids, sample.labelled, strict=True) if label]
    assert tokenizer.decode(labelled) == "4</s>Four, the number.</s>"
    prompt = tokenizer.decode(sample.ids[: sample.prompt_length])
    assert prompt.endswith("<|user|>\n2 + 2?\n<|assistant|>\n")
    text, spans = render(TURNS, tokenizer)
    assert [text[a:b] for a, b in spans] == ["4</s>", "Four, the number.</s>"]


def test_cutting_keeps_the_start(tokenizer):
    tokenizer.chat_template = None
    whole = tokenize(TURNS, tokenizer, max_length=500, source="")
    cut = tokenize(TURNS, tokenizer, max_length=60, source="")
    assert cut.ids == whole.ids[:60]
    assert cut.labelled == whole.labelled[:60]


def test_prompt_and_completion_are_two_turns():
    assert messages_of({"prompt": "a", "completion": "b"}) == [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
    ]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{not json", "not JSON"),
        (b"[1]", "must be a JSON object"),
        (b'{"text": "x"}', "needs 'messages', or 'prompt' and 'completion'"),
        (b'{"messages": []}', "non-empty list"),
        (b'{"messages": [{"role": "wizard", "content": "x"}]}', "'role' out of"),
        (b'{"messages": [{"role": "user", "content": 3}]}', "'content' that is text"),
        (b'{"messages": [{"role": "user", "content": "x"}]}', "no assistant turn"),
        (b'{"messages": [{"role": "assistant", "content": "x"}]}', "starts with the assistant"),
        (b'{"prompt": "a", "completion": " "}', "no assistant turn"),
        (b'{"prompt": "\xff", "completion": "b"}', "not UTF-8"),
    ],
)
def test_a_bad_line_is_named(tokenizer, tmp_path, line, reason):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"prompt": "a", "completion": "b"}\n\n' + line + b"\n")
    with pytest.raises(ValueError) as caught:
        load_samples(path, tokenizer, max_length=50)
    assert f"{path}:3: " in str(caught.value)
    assert reason in str(caught.value)


def test_answers_cut_away_are_counted_and_none_left_is_an_error(tokenizer, tmp_path, caplog):
    tokenizer.chat_template = None
    path = tmp_path / "data.jsonl"
    lines = [{"prompt": "a" * n, "completion": "b"} for n in (5, 500)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert len(load_samples(path, tokenizer, max_length=100)) == 1
    assert "1 of 2 samples left out" in caplog.text
    with pytest.raises(ValueError, match="no usable sample"):
        load_samples(path, tokenizer, max_length=10)
    with pytest.raises(ValueError, match="no such file"):
        load_samples(tmp_path / "none.jsonl", tokenizer, max_length=10)


def made(lengths):
    return [
        Sample(list(range(10 * i, 10 * i + n)), [False] * 2 + [True] * (n - 2), str(i))
        for i, n in enumerate(lengths)
    ]


def test_a_batch_pads_right_and_shifts_labels():
    batch = collate(made([3, 5]), multiple=4)
    assert batch.input_ids.tolist() == [[0, 1, 2, 0, 0, 0, 0, 0], [10, 11, 12, 13, 14, 0, 0, 0]]
    assert batch.labels[0].tolist() == [IGNORE, 2] + [IGNORE] * 6
    assert batch.labels[1].tolist() == [IGNORE, 12, 13, 14] + [IGNORE] * 4
    p, a, x = TokenRole.PROMPT, TokenRole.ANSWER, TokenRole.PADDING
    assert batch.roles.tolist() == [[p, p, a, x, x, x, x, x], [p, p, a, a, a, x, x, x]]
    assert batch.position_ids[1].tolist() == list(range(8))


def loader(samples, **changes):
    settings = {"global_batch_size": 4, "micro_batch_size": 2, "seed": 3, **changes}
    return Loader(samples, **settings)


def rows(batches):
    """The rows' first tokens: which sample each is."""
    return sorted(int(i) for b in batches for m in b.micro_batches for i in m.input_ids[:, 0])


def test_order_is_a_function_of_seed_and_step_and_differs_by_epoch():
    samples = made([3, 4, 5, 6, 7, 8])
    first, again = loader(samples), loader(samples)
    wanted = [first.step(n) for n in range(6)]
    for n in (5, 0, 3):  # any order of asking
        assert torch.equal(
            again.step(n).micro_batches[0].input_ids, wanted[n].micro_batches[0].input_ids
        )
    # 24 positions are 4 epochs of 6: every sample 4 times.
    assert rows(wanted) == sorted(10 * i for i in range(6) for _ in range(4))
    other = loader(samples, seed=4)
    assert any(rows([other.step(n)]) != rows([wanted[n]]) for n in range(6))
    assert wanted[0].num_sequences == 4


def test_data_ranks_share_the_same_global_batch():
    samples = made(range(3, 11))
    whole = loader(samples, global_batch_size=8).step(2)
    shares = [
        loader(samples, global_batch_size=8, data_rank=r, data_ranks=2).step(2) for r in (0, 1)
    ]
    assert rows(shares) == rows([whole])
    assert {(s.num_tokens, s.num_labels) for s in shares} == {(whole.num_tokens, whole.num_labels)}
    assert whole.num_labels == sum(n - 2 for n in range(3, 11))


def test_a_pass_counts_every_sample_once_on_uneven_ranks():
    samples = made([3, 4, 5, 6, 7])
    found = [
        list(loader(samples, micro_batch_size=1, data_rank=r, data_ranks=2).passes())
        for r in (0, 1)
    ]
    labels = sum(int((m.labels >= 0).sum()) for f in found for b in f for m in b.micro_batches)
    assert labels == sum(b.num_labels for b in found[0]) == sum(n - 2 for n in (3, 4, 5, 6, 7))
    assert [len(b.micro_batches) for b in found[0]] == [len(b.micro_batches) for b in found[1]]


def test_python_docs_are_real_and_split_without_overlap(tmp_path):
    assert len(records()) > 500
    paths = write_splits(tmp_path, {"held_out": 20, "train": 0})
    read = {name: path.read_text().splitlines() for name, path in paths.items()}
    assert len(read["held_out"]) == 20
    assert not set(read["held_out"]) & set(read["train"])
    completions = [json.loads(line)["completion"] for lines in read.values() for line in lines]
    assert len(set(completions)) == len(completions)
    assert all(120 <= len(text) <= 900 for text in completions)
