"""The rows of a pretraining."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import groupby

import pytest

from tether.errors import InvalidArgumentError
from tether_services.recipes.blocks import Blocks


def cut(encoded: Sequence[Sequence[int]], *, block_tokens: int, seed: int = 0, epoch: int = 0) -> list[list[int]]:
    """Return the blocks of an epoch, each with the id after its last input."""
    blocks = Blocks(encoded, block_tokens=block_tokens, seed=seed)
    blocks.set_epoch(epoch)
    rows = [blocks[index] for index in range(len(blocks))]
    return [[*row["input_ids"].tolist(), int(row["shift_labels"][-1])] for row in rows]


def test_an_epoch_makes_every_token_a_target_once() -> None:
    encoded = [[1, 5, 6, 2], [1, 7, 2], [1, 8, 9, 10, 11, 2]]
    blocks = cut(encoded, block_tokens=4)
    assert [len(block) for block in blocks] == [5, 5, 5]
    targets = Counter(token for block in blocks for token in block[1:])
    assert targets == Counter(token for ids in encoded for token in ids) - Counter([1])  # the first id starts the epoch


def test_a_target_is_the_id_after_its_input() -> None:
    row = Blocks([list(range(3, 50))], block_tokens=8, seed=0)[2]
    assert set(row) == {"input_ids", "labels", "shift_labels"}
    assert row["shift_labels"].tolist() == (row["input_ids"] + 1).tolist() == row["labels"].tolist()


def test_a_block_is_text_without_gaps() -> None:
    for block in cut([list(range(3, 50))], block_tokens=8):
        assert block == list(range(block[0], block[0] + 9))
        assert (block[0] - 3) % 8 == 0


def test_blocks_of_a_long_document_do_not_come_in_a_row() -> None:
    book, stories = [7] * 4000, [[8] * 40] * 100
    kinds = [block[20] for block in cut([book, *stories], block_tokens=40)]
    assert len(kinds) == 199
    assert max(len(list(group)) for _, group in groupby(kinds)) < 20


def test_text_shorter_than_a_block_names_the_setting() -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        Blocks([[1, 2, 3]], block_tokens=3, seed=0)
    assert caught.value.violations[0].field == "block_tokens"


def test_the_order_changes_between_epochs_and_follows_the_seed() -> None:
    encoded = [[index] for index in range(100)]
    first, second = (cut(encoded, block_tokens=1, seed=1, epoch=epoch) for epoch in (0, 1))
    assert len({block[0] for block in first}) == len({block[0] for block in second}) == 99
    assert first != second
    assert cut(encoded, block_tokens=1, seed=1, epoch=1) == second
    assert cut(encoded, block_tokens=1, seed=2) != first


def test_an_epoch_does_not_depend_on_the_epochs_before_it() -> None:
    encoded = [[index] * 3 for index in range(50)]
    blocks = Blocks(encoded, block_tokens=4, seed=3)
    for epoch in (4, 1, 2):
        blocks.set_epoch(epoch)
    assert blocks[0]["input_ids"].tolist() == cut(encoded, block_tokens=4, seed=3, epoch=2)[0][:-1]
