from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from tests.unit.tiny_reward import VOCABULARY, write_tokenizer
from tether.errors import FailedPreconditionError, InvalidArgumentError
from tether_services.reward.engine import ScoreTask
from tether_services.reward.engines.fake import fake_score, fake_text_score
from tether_services.reward.items import ItemReader, ScoreInput, check_form, cut_prompt, encode_conversation
from tether_services.runtime.text import ByteCodec, HfCodec, Message, TextCodec

TALK = (Message("user", "cat ran"), Message("assistant", "happy cat"))


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> HfCodec:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return HfCodec(folder)


def reader(
    codec: TextCodec | None, *, reads_text: bool = False, reads_tokens: bool = True, max_model_len: int = 12
) -> ItemReader:
    return ItemReader(
        codec=codec,
        reads_text=reads_text,
        reads_tokens=reads_tokens,
        vocab_size=len(VOCABULARY),
        max_model_len=max_model_len,
        max_text_chars=60,
    )


def words(text: str) -> list[int]:
    return [VOCABULARY[word] for word in text.split()]


def test_text_becomes_prompt_with_bos_and_response_without(codec: HfCodec) -> None:
    task = reader(codec).prepare(ScoreInput(prompt="the cat", response="is happy")).task
    assert task == ScoreTask(prompt_token_ids=(1, *words("the cat")), response_token_ids=tuple(words("is happy")))


def test_a_model_trained_on_ended_texts_reads_the_end_token_behind_a_text_and_nothing_behind_token_ids(
    codec: HfCodec,
) -> None:
    ending = replace(reader(codec), ends_text=True)
    assert ending.prepare(ScoreInput(prompt="the", response="cat")).task.response_token_ids == (*words("cat"), 2)
    assert ending.prepare(ScoreInput(response_token_ids=(5, 6))).task.response_token_ids == (5, 6)
    bytes_read = replace(ending, codec=ByteCodec(), vocab_size=ByteCodec.vocab_size)
    assert bytes_read.prepare(ScoreInput(response="a")).task.response_token_ids == (100, ByteCodec.eos_id)


def test_text_and_token_forms_agree(codec: HfCodec) -> None:
    as_text = reader(codec).prepare(ScoreInput(prompt="the cat", response="is happy"))
    ids = ScoreInput(prompt_token_ids=(1, *words("the cat")), response_token_ids=tuple(words("is happy")))
    assert reader(codec).prepare(ids) == as_text


def test_token_ids_are_taken_exactly_as_sent(codec: HfCodec) -> None:
    sent = ScoreInput(prompt_token_ids=(0, 2, 1), response_token_ids=(2, 0, 2))
    task = reader(codec).prepare(sent).task
    assert (task.prompt_token_ids, task.response_token_ids) == ((0, 2, 1), (2, 0, 2))


def test_an_empty_prompt_is_accepted_in_each_form(codec: HfCodec) -> None:
    assert reader(codec).prepare(ScoreInput(response="cat")).task.prompt_token_ids == (1,)
    assert reader(codec).prepare(ScoreInput(response_token_ids=(5,))).task.prompt_token_ids == ()


def test_special_strings_in_text_are_ordinary_characters() -> None:
    task = reader(ByteCodec()).prepare
    with pytest.raises(InvalidArgumentError):  # bytes are beyond the small vocabulary of this reader
        task(ScoreInput(response="</s>"))
    free = ItemReader(ByteCodec(), False, True, ByteCodec.vocab_size, 20, 60)
    assert ByteCodec.eos_id not in free.prepare(ScoreInput(response="</s>")).task.response_token_ids


def test_rules_read_text_and_token_ids_are_decoded_for_them(codec: HfCodec) -> None:
    text_reader = reader(codec, reads_text=True, reads_tokens=False)
    assert text_reader.prepare(ScoreInput(prompt="p", response="r")).task == ScoreTask("p", "r")
    ids = ScoreInput(prompt_token_ids=(1, *words("the cat")), response_token_ids=(*words("is sad"), 2))
    assert text_reader.prepare(ids).task == ScoreTask("the cat", "is sad")


def test_both_forms_are_filled_where_both_are_read(codec: HfCodec) -> None:
    task = reader(codec, reads_text=True).prepare(ScoreInput(prompt="the", response="cat")).task
    assert (task.response, task.response_token_ids) == ("cat", tuple(words("cat")))


def test_token_ids_for_rules_without_a_tokenizer_are_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="configure a tokenizer") as caught:
        reader(None, reads_text=True, reads_tokens=False).prepare(ScoreInput(response_token_ids=(5,)))
    assert (caught.value.reason, caught.value.violations[0].field) == ("NO_TOKENIZER", "response_token_ids")


def test_a_conversation_is_split_before_the_last_answer(codec: HfCodec) -> None:
    prompt, response = encode_conversation(codec, TALK)
    assert prompt == words("user: cat ran end assistant:")
    assert response == words("happy cat end")
    assert prompt + response == codec.encode_chat(TALK, add_generation_prompt=False)


def test_a_conversation_of_one_answer_has_no_prompt(codec: HfCodec) -> None:
    assert encode_conversation(codec, TALK[1:]) == ([], words("assistant: happy cat end"))


def test_rules_read_earlier_turns_as_lines(codec: HfCodec) -> None:
    messages = (Message("system", "on"), *TALK)
    task = reader(codec, reads_text=True, reads_tokens=False).prepare(ScoreInput(messages=messages)).task
    assert task == ScoreTask("system: on\nuser: cat ran", "happy cat")


def test_a_model_without_a_chat_template_says_so(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, chat_template=None)
    with pytest.raises(FailedPreconditionError) as caught:
        reader(HfCodec(tmp_path)).prepare(ScoreInput(messages=TALK))
    assert (caught.value.reason, caught.value.violations[0].field) == ("NO_CHAT_TEMPLATE", "messages")


@pytest.mark.parametrize(
    ("prompt_count", "response_count", "kept", "truncated"),
    [(3, 4, 3, False), (6, 4, 6, False), (7, 4, 6, True), (50, 9, 1, True), (50, 10, 0, True), (0, 10, 0, False)],
)
def test_a_long_prompt_is_cut_from_the_left(prompt_count: int, response_count: int, kept: int, truncated: bool) -> None:
    prompt = list(range(prompt_count))
    got = cut_prompt(prompt, [0] * response_count, max_model_len=10, field="response")
    assert got == (tuple(prompt[prompt_count - kept :]), truncated)


def test_a_response_is_never_cut(codec: HfCodec) -> None:
    with pytest.raises(InvalidArgumentError, match="13 tokens") as caught:
        reader(codec).prepare(ScoreInput(response_token_ids=(5,) * 13))
    assert (caught.value.reason, caught.value.violations[0].field) == ("TOO_LONG", "response_token_ids")
    item = reader(codec).prepare(ScoreInput(prompt_token_ids=(4, 4, 4), response_token_ids=(5,) * 11))
    assert (item.task.prompt_token_ids, item.truncated, item.task.num_tokens) == ((4,), True, 12)


@pytest.mark.parametrize(
    ("item", "field"),
    [
        (ScoreInput(), "response"),
        (ScoreInput(prompt="the cat"), "response"),
        (ScoreInput(prompt_token_ids=(4,)), "response_token_ids"),
        (ScoreInput(response_token_ids=(4, 99)), "response_token_ids[1]"),
        (ScoreInput(response_token_ids=(4, -1)), "response_token_ids[1]"),
        (ScoreInput(prompt_token_ids=(4, 5, 18), response_token_ids=(4,)), "prompt_token_ids[2]"),
        (ScoreInput(response="cat " * 16), "response"),
        (ScoreInput(prompt="cat " * 16, response="cat"), "prompt"),
        (ScoreInput(response="  "), "response"),
        (ScoreInput(messages=TALK[:1]), "messages[0].role"),
        (ScoreInput(messages=(Message("robot", "hi"), *TALK)), "messages[0].role"),
        (ScoreInput(messages=(*TALK, Message("assistant", ""))), "messages[2].content"),
        (ScoreInput(messages=(Message("user", "cat " * 16), *TALK)), "messages"),
    ],
)
def test_a_bad_item_names_the_field(codec: HfCodec, item: ScoreInput, field: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        reader(codec).prepare(item)
    assert [violation.field for violation in caught.value.violations] == [field]


@pytest.mark.parametrize(
    "item",
    [
        ScoreInput(response="cat", response_token_ids=(4,)),
        ScoreInput(prompt="the", response_token_ids=(4,)),
        ScoreInput(response="cat", messages=TALK),
        ScoreInput(prompt_token_ids=(4,), messages=TALK),
    ],
)
def test_more_than_one_form_is_refused(item: ScoreInput) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        check_form(item)
    assert caught.value.reason == "SEVERAL_FORMS"


def test_the_fake_oracle_for_text_is_that_of_its_bytes() -> None:
    expected = fake_score([1, *(3 + byte for byte in b"Hi ")], [3 + byte for byte in b"you"])
    assert fake_text_score("Hi ", "you") == expected


def test_fake_scores_depend_on_the_split_and_fill_their_range() -> None:
    def scores(ids: Sequence[int]) -> list[float]:
        return [fake_score(ids, [token]) for token in range(200)]

    assert fake_score([1, 2], [3]) != fake_score([1], [2, 3])
    values = scores([1])
    assert all(-1.0 <= value < 1.0 for value in values)
    assert min(values) < -0.9 and max(values) > 0.9
    assert abs(sum(values) / 200) < 0.15
