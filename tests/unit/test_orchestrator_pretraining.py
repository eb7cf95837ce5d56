"""Pretraining text of PPO-ptx: the sequences of a step."""

from __future__ import annotations

import random

from tether_services.orchestrator.pretraining import PretrainingText
from tether_services.orchestrator.prompts import step_prompts
from tether_services.runtime.text import ByteCodec

CODEC = ByteCodec()
DOCUMENTS = [f"document {number}" for number in range(7)]


def encode(text: str) -> list[int]:
    return [*CODEC.encode(text, add_special_tokens=True), CODEC.eos_id]


def new_text(documents: list[str] = DOCUMENTS, *, length: int = 64, seed: int = 0) -> PretrainingText:
    return PretrainingText(documents, encode, length, seed)


def test_d29_short_documents_come_whole_with_their_begin_and_end() -> None:
    rows = new_text().rows(step=0, count=7)
    assert sorted(CODEC.decode(row) for row in rows) == DOCUMENTS
    assert {row[0] for row in rows} == {CODEC.bos_id}
    assert {row[-1] for row in rows} == {CODEC.eos_id}


def test_d29_consecutive_steps_read_every_document_once_per_pass() -> None:
    text = new_text()
    read = [CODEC.decode(row) for step in range(7) for row in text.rows(step=step, count=2)]
    assert sorted(read) == sorted(DOCUMENTS * 2)


def test_d29_a_step_is_a_pure_function_of_its_number_and_the_seed() -> None:
    random.seed(1)
    first = new_text().rows(step=3, count=4)
    random.seed(2)
    assert new_text().rows(step=3, count=4) == first
    assert new_text(seed=1).rows(step=3, count=4) != first
    assert new_text().rows(step=4, count=4) != first


def test_d29_the_order_of_the_text_is_not_that_of_the_prompts() -> None:
    prompts = step_prompts(DOCUMENTS, step=0, count=7, seed=0)
    assert [CODEC.decode(row) for row in new_text().rows(step=0, count=7)] != prompts


def test_d29_a_long_document_gives_sequences_from_different_places() -> None:
    book = "".join(f"{number:06d} " for number in range(2000))
    rows = new_text([book], length=16).rows(step=0, count=20)
    assert {len(row) for row in rows} == {16}
    assert all(CODEC.decode(row) in book for row in rows)
    assert len({CODEC.decode(row) for row in rows}) > 15
    assert not any(CODEC.eos_id in row for row in rows), "none of them is the end of the document"


def test_d29_a_document_of_one_token_has_nothing_to_learn() -> None:
    text = PretrainingText(["x", "long"], lambda text: list(range(len(text))), 8, 0)
    assert text.rows(step=0, count=2) == [[0, 1, 2, 3]]
