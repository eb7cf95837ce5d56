from __future__ import annotations

import random

import pytest
import torch

from tether_services.runtime.padding import padded_batches


def test_the_documented_example() -> None:
    batches = padded_batches([[5, 6, 7], [1] * 9, [8]], max_tokens=6)
    assert [batch.indices for batch in batches] == [(2, 0), (1,)]
    assert batches[0].token_ids.tolist() == [[8, 0, 0], [5, 6, 7]]
    assert batches[0].position_ids.tolist() == [[0, 1, 2]]
    assert batches[0].lengths.tolist() == [1, 3]


def test_every_row_is_in_exactly_one_batch_within_the_budget() -> None:
    rng = random.Random(0)
    rows = [[rng.randrange(1, 9)] * rng.randint(1, 30) for _ in range(50)]
    batches = padded_batches(rows, max_tokens=64)
    assert sorted(index for batch in batches for index in batch.indices) == list(range(50))
    for batch in batches:
        assert batch.token_ids.numel() <= 64
        for place, index in enumerate(batch.indices):
            length = int(batch.lengths[place])
            assert batch.token_ids[place, :length].tolist() == rows[index]
            assert not batch.token_ids[place, length:].any()


def test_a_row_beyond_the_budget_goes_alone() -> None:
    assert [batch.indices for batch in padded_batches([[1] * 10, [2]], max_tokens=4)] == [(1,), (0,)]


def test_no_rows_make_no_batches_and_an_empty_row_is_refused() -> None:
    assert padded_batches([], max_tokens=4) == []
    with pytest.raises(ValueError, match="empty row"):
        padded_batches([[1], []], max_tokens=4)


def test_ids_are_integers_that_an_embedding_takes() -> None:
    assert padded_batches([[1, 2]], max_tokens=4)[0].token_ids.dtype == torch.int64
