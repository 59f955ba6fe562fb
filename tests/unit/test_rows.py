"""Rows of text in batches."""

import torch

from megatron_mod.evaluation.rows import level_batches


def test_level_batches_are_of_one_length_without_padding():
    texts = [[number] * length for number, length in enumerate((9, 2, 7, 4, 5, 3, 8, 1, 6, 2))]
    batches = level_batches(texts, size=2)
    assert [batch.tolist() for batch in batches] == [
        [[6] * 5, [0] * 5],
        [[8] * 5, [2] * 5],
    ], "of the five texts of 5 to 9 tokens the shortest is over"


def test_fewer_texts_than_a_batch_takes_are_one():
    (batch,) = level_batches([[3, 4, 5], [6, 7], [8]], size=8)
    assert torch.equal(batch, torch.tensor([[6, 7], [3, 4]]))
