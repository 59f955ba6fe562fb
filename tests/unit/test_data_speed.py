"""What the data benchmark says of padding, and the method it compares with."""

from __future__ import annotations

import pytest

from megatron_mod.benchmark.data_speed import measure, retokenised
from megatron_mod.data.encoding import Encoder
from tests.helpers.text import write_lines


def test_padding_is_counted_for_each_way(tokenizer, tmp_path):
    """Eight answers of 4 and of 64 bytes, a step of all of them, two rows a micro-batch."""
    lengths = [4, 64] * 4
    path = write_lines(
        tmp_path / "data.jsonl", [{"prompt": "ab", "completion": "c" * n} for n in lengths]
    )
    template = len("<|user|>\nab\n<|assistant|>\n") + 1
    short, long = template + 4, template + 64
    result = measure(
        path, tokenizer, max_length=2 * (short + long), global_batch_size=8, micro_batch_size=2,
        repeats=1,
    )  # fmt: skip
    tokens = 4 * (short + long)
    assert result["tokens"] == tokens
    # Sorted, equal rows meet; packed, two rows hold two of each; drawn, k of the four pairs differ.
    assert result["padding"]["bucketed"] == result["padding"]["packed"] == 0
    possible = [1 - tokens / (tokens + k * (long - short)) for k in (0, 2, 4)]
    assert any(result["padding"]["neither"] == pytest.approx(share) for share in possible)
    assert set(result["tokens_per_second"]) >= {"prepare", "batch_encoding", "retokenising"}


def test_what_is_compared_with_does_the_same_where_borders_are_clean(tokenizer):
    messages = [
        {"role": "user", "content": "a?"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c?"},
        {"role": "assistant", "content": "d"},
    ]
    ((encoded,),) = Encoder(tokenizer, max_length=60, template="published").encode([messages])
    ids, labelled = retokenised(messages, tokenizer, 60)
    assert ids == encoded.ids
    assert labelled == [any(a <= i < b for a, b in encoded.spans) for i in range(len(ids))]


def test_texts_have_no_labelling_to_measure(tokenizer, tmp_path):
    (tmp_path / "some.txt").write_text("Words.")
    with pytest.raises(ValueError, match=r"some\.txt: has texts"):
        measure(
            tmp_path / "some.txt", tokenizer, max_length=60, global_batch_size=4,
            micro_batch_size=2, repeats=1,
        )  # fmt: skip
