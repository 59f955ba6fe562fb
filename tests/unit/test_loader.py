"""Samples to batches: order, rows and shares."""

from __future__ import annotations

import pytest
import torch

from megatron_mod.data.batch import collate
from megatron_mod.data.chat import IGNORE, Sample
from megatron_mod.data.loader import Loader
from megatron_mod.data.order import Order, steps_of
from megatron_mod.data.packing import packed
from megatron_mod.routing.masks import TokenRole


def made(lengths):
    """Samples whose ids tell them apart; the first two tokens are the prompt."""
    return [
        Sample(list(range(100 * i, 100 * i + n)), [k >= min(2, n - 1) for k in range(n)], str(i))
        for i, n in enumerate(lengths)
    ]


P, A, X = TokenRole.PROMPT, TokenRole.ANSWER, TokenRole.PADDING


def test_a_batch_pads_right_and_shifts_labels():
    batch = collate(made([3, 5]), multiple=4)
    assert batch.input_ids.tolist() == [
        [0, 1, 2, 0, 0, 0, 0, 0],
        [100, 101, 102, 103, 104, 0, 0, 0],
    ]
    assert batch.labels[0].tolist() == [IGNORE, 2] + [IGNORE] * 6
    assert batch.labels[1].tolist() == [IGNORE, 102, 103, 104] + [IGNORE] * 4
    assert batch.roles.tolist() == [[P, P, A, X, X, X, X, X], [P, P, A, A, A, X, X, X]]
    assert batch.position_ids[1].tolist() == list(range(8))
    assert batch.documents == ((3,), (5,))


def test_a_packed_row_keeps_its_documents_apart():
    first, second, third = made([3, 4, 5])
    batch = collate([[first, second], [third]], multiple=4)
    assert batch.input_ids[0].tolist() == [0, 1, 2, 100, 101, 102, 103, 0]
    assert batch.position_ids[0].tolist() == [0, 1, 2, 0, 1, 2, 3, 4]
    # The last token of the first document predicts nothing of the second.
    assert batch.labels[0].tolist() == [IGNORE, 2, IGNORE, IGNORE, 102, 103, IGNORE, IGNORE]
    assert batch.roles[0].tolist() == [P, P, A, P, P, A, A, X]
    assert batch.documents == ((3, 4), (5,))
    assert batch.to(torch.device("cpu")).documents == batch.documents


def loader(samples, **changes):
    settings = {"global_batch_size": 4, "micro_batch_size": 2, "seed": 3, **changes}
    return Loader(samples, **settings)


def documents(batches):
    """Every document of these step batches as (ids, labels, roles, positions), in their order."""
    found = []
    for batch in batches:
        for micro in batch.micro_batches:
            for row, lengths in enumerate(micro.documents):
                first = 0
                for length in lengths:
                    cut = slice(first, first + length)
                    tensors = (micro.input_ids, micro.labels, micro.roles, micro.position_ids)
                    found.append(tuple(tuple(t[row, cut].tolist()) for t in tensors))
                    first += length
                assert (micro.roles[row, first:] == X).all()
                assert (micro.labels[row, first:] == IGNORE).all()
    return found


def who(batches):
    """Which samples: the first token's hundreds."""
    return sorted(document[0][0] // 100 for document in documents(batches))


@pytest.mark.parametrize("row_length", [None, 20], ids=["rows", "packed"])
def test_order_is_a_function_of_seed_and_step_and_differs_by_epoch(row_length):
    samples = made([3, 4, 5, 6, 7, 8])
    first = loader(samples, row_length=row_length)
    wanted = [first.step(n) for n in range(6)]
    again = loader(samples, row_length=row_length)
    for n in (5, 0, 3):  # any order of asking
        assert documents([again.step(n)]) == documents([wanted[n]])
    # 24 positions are 4 epochs of 6: every sample 4 times, in an order of its own each.
    assert who(wanted) == sorted(list(range(6)) * 4)
    order = Order([(50, 1.0)], seed=3)
    epochs = [[order[50 * e + i] for i in range(50)] for e in range(3)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    other = Order([(50, 1.0)], seed=4)
    assert [other[i] for i in range(50)] != epochs[0]
    assert wanted[0].num_sequences == 4


@pytest.mark.parametrize("row_length", [None, 30], ids=["rows", "packed"])
def test_the_global_batch_is_the_same_for_any_number_of_data_ranks(row_length):
    samples = made(torch.randint(3, 25, (40,), generator=torch.Generator().manual_seed(0)).tolist())
    settings = {"global_batch_size": 16, "row_length": row_length}
    whole = loader(samples, **settings).step(2)
    micro_batches = [m.documents for m in whole.micro_batches]
    for ranks in (2, 4):
        shares = [
            loader(samples, data_rank=r, data_ranks=ranks, **settings).step(2) for r in range(ranks)
        ]
        assert len({len(share.micro_batches) for share in shares}) == 1
        assert sorted(documents(shares)) == sorted(documents([whole]))
        dealt = [m.documents for share in shares for m in share.micro_batches]
        assert sorted(dealt) == sorted(micro_batches)
        counts = {(s.num_sequences, s.num_tokens, s.num_labels) for s in shares}
        assert counts == {(whole.num_sequences, whole.num_tokens, whole.num_labels)}
        assert {s.num_positions for s in shares} == {
            sum(m.input_ids.numel() for s in shares for m in s.micro_batches)
        }


@pytest.mark.parametrize("ranks", [2, 4])
def test_no_rank_gets_the_long_rows(ranks):
    samples = made(list(range(3, 35)))  # 16 pairs of rows, each longer by 2 than the one before
    shares = [
        loader(samples, global_batch_size=32, data_rank=r, data_ranks=ranks).step(0)
        for r in range(ranks)
    ]
    positions = [sum(m.input_ids.numel() for m in share.micro_batches) for share in shares]
    assert len(set(positions)) == 1
    for share in shares:
        lengths = [m.input_ids.shape[1] for m in share.micro_batches]
        longest = lengths.index(max(lengths))
        assert lengths[:longest] == sorted(lengths[:longest])
        assert lengths[longest:] == sorted(lengths[longest:], reverse=True)
        assert 0 < longest < len(lengths) - 1


@pytest.mark.parametrize("multiple", [1, 8])
def test_packing_changes_the_rows_and_nothing_else(multiple):
    lengths = torch.randint(3, 60, (64,), generator=torch.Generator().manual_seed(1)).tolist()
    samples = made(lengths)
    settings = {"global_batch_size": 32, "multiple": multiple}
    plain = loader(samples, **settings)
    rows = loader(samples, row_length=64, **settings)
    for step in range(3):
        one, many = plain.step(step), rows.step(step)
        assert sorted(documents([one])) == sorted(documents([many]))
        assert (one.num_labels, one.num_tokens) == (many.num_labels, many.num_tokens)
        for micro in many.micro_batches:
            assert micro.input_ids.shape[1] % multiple == 0
            assert max(map(sum, micro.documents)) <= 64
        assert many.padding < one.padding
        labels = sum(int((m.labels >= 0).sum()) for m in many.micro_batches)
        assert labels == many.num_labels
        assert many.padding == pytest.approx(
            sum(int((m.roles == X).sum()) for m in many.micro_batches) / many.num_positions
        )


def test_packing_uses_as_few_rows_as_the_tokens_need():
    rows = packed(made([50] * 2 + [25] * 4), length=100, num_rows_multiple=1)
    assert [sum(len(s.ids) for s in row) for row in rows] == [100, 100]
    rows = packed(made([90, 80, 10, 20]), length=100, num_rows_multiple=1)
    assert [sum(len(s.ids) for s in row) for row in rows] == [100, 100]
    # Three rows would do; micro-batches of four get four, as even as documents allow.
    rows = packed(made([60] * 4 + [20] * 4), length=160, num_rows_multiple=4)
    assert [sum(len(s.ids) for s in row) for row in rows] == [80] * 4
    # Even rows would overfill one (50 + 30 + 30): the packing that fits stays.
    rows = packed(made([50, 50, 34, 33, 33]), length=100, num_rows_multiple=1)
    assert [sum(len(s.ids) for s in row) for row in rows] == [100, 100]
    assert len(packed(made([5, 5]), length=100, num_rows_multiple=4)) == 2


def test_an_epoch_holds_each_file_as_often_as_it_weighs():
    order = Order([(10, 2.9), (4, 1.0), (10, 0.5)], seed=1)
    assert order.epoch_length == 29 + 4 + 5
    epochs = [[order[38 * e + i] for i in range(38)] for e in range(2)]
    for epoch in epochs:
        counts = [epoch.count(i) for i in range(24)]
        assert sorted(counts[:10]) == [2] + [3] * 9
        assert counts[10:14] == [1] * 4
        assert sorted(counts[14:]) == [0] * 5 + [1] * 5
    drawn = [{i for i in epoch if i >= 14} for epoch in epochs]
    assert drawn[0] != drawn[1]


@pytest.mark.parametrize(
    ("epochs", "samples", "batch", "steps"),
    [(3.0, 20, 8, 8), (1.1, 100, 10, 11), (0.01, 20, 8, 1), (2.0, 32, 8, 8)],
)
def test_epochs_are_as_many_steps_as_it_takes(epochs, samples, batch, steps):
    assert steps_of(epochs, samples=samples, batch=batch) == steps


@pytest.mark.parametrize("row_length", [None, 8], ids=["rows", "packed"])
def test_a_pass_counts_every_sample_once_on_uneven_ranks(row_length):
    samples = made([3, 4, 5, 6, 7])
    settings = {"micro_batch_size": 1, "data_ranks": 2, "row_length": row_length}
    found = [list(loader(samples, data_rank=r, **settings).passes()) for r in (0, 1)]
    assert who(found[0] + found[1]) == list(range(5))
    labels = sum(int((m.labels >= 0).sum()) for f in found for b in f for m in b.micro_batches)
    assert labels == sum(b.num_labels for b in found[0])
    assert [len(b.micro_batches) for b in found[0]] == [len(b.micro_batches) for b in found[1]]
    blank = found[1][-1].micro_batches[-1]
    assert blank.documents == ((),)
    assert (blank.roles == X).all()
