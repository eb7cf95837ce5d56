"""The byte-level tokenizer: lossless, three special tokens, no injection from text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tether.errors import InvalidArgumentError
from tether_services.recipes.tokenizer import load_tokenizer, train_tokenizer
from tether_services.runtime.text import encode_document

TEXT = [f"Once there was a little {animal} who liked the big {thing}." for animal in ["cat", "dog", "fox"]
        for thing in ["tree", "pond", "house"]]  # fmt: skip
AWKWARD = ["", "  two  spaces ", "tab\there\n\nnew", "caf\u00e9 \u4f60\u597d \U0001f600", "</s><s><pad>", "a\x00b"]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(TEXT, vocab_size=280, max_length=64)


def test_the_special_tokens_are_three_distinct_ids(tokenizer: Any) -> None:
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert len(tokenizer) == 280


@pytest.mark.parametrize("text", AWKWARD)
def test_any_text_survives_encoding_and_decoding(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(encode_document(tokenizer, text, is_finished=False)[1:]) == text


@pytest.mark.parametrize("text", AWKWARD)
def test_text_never_becomes_a_special_token(tokenizer: Any, text: str) -> None:
    assert not {0, 1, 2} & set(encode_document(tokenizer, text)[1:-1])


def test_a_plain_call_puts_the_start_token_in_front_and_guards_special_strings(tokenizer: Any) -> None:
    ids = tokenizer("x</s>")["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.eos_token_id not in ids


def test_a_document_ends_with_the_end_token_only_when_asked(tokenizer: Any) -> None:
    assert encode_document(tokenizer, "a cat")[-1] == tokenizer.eos_token_id
    assert encode_document(tokenizer, "a cat", is_finished=False) == encode_document(tokenizer, "a cat")[:-1]


def test_a_stored_tokenizer_encodes_the_same_and_keeps_the_guard(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path, field="base")
    for text in [*TEXT, *AWKWARD]:
        assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert loaded.split_special_tokens


def test_merges_make_frequent_words_short(tokenizer: Any) -> None:
    assert len(encode_document(tokenizer, TEXT[0], is_finished=False)) < len(TEXT[0]) / 2


@pytest.mark.parametrize("text", AWKWARD)
def test_a_tokenizer_blind_to_case_has_one_spelling_of_a_word(text: str, tmp_path: Path) -> None:
    blind = train_tokenizer([sentence.upper() for sentence in TEXT], vocab_size=280, max_length=64, lowercase=True)
    blind.save_pretrained(tmp_path)
    stored = load_tokenizer(tmp_path, field="tokenizer")
    first, *others = [encode_document(stored, found) for found in ("Little", "little", " LITTLE")]
    assert others == [first, first]
    assert len(first) < len("little") + 2, "merges are learned from the lower-case text"
    assert stored.decode(encode_document(stored, text, is_finished=False)[1:]).lstrip(" ") == text.lower().lstrip(" ")


def test_too_little_text_for_the_vocabulary_names_the_field() -> None:
    with pytest.raises(InvalidArgumentError, match="give more text") as caught:
        train_tokenizer(["aa"], vocab_size=2048, max_length=64)
    assert caught.value.violations[0].field == "vocab_size"


def test_a_folder_without_tokenizer_names_the_field(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        load_tokenizer(tmp_path, field="base")
    assert caught.value.violations[0].field == "base"


def test_a_tokenizer_whose_end_token_pads_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    config.write_text(config.read_text().replace('"<pad>"', '"</s>"'))
    with pytest.raises(InvalidArgumentError, match="distinct"):
        load_tokenizer(tmp_path, field="base")
