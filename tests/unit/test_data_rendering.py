"""Records as token ids: templates, the end token, special strings, and what is cut."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.data_inputs import SHARED_DATA
from tether.errors import InvalidArgumentError
from tether_services.recipes.data.records import Prompt, Turn
from tether_services.recipes.data.rendering import Renderer, fit
from tether_services.recipes.tokenizer import train_tokenizer
from tether_services.reward.items import encode_conversation
from tether_services.runtime.text import HfCodec, Message

CHATML = (
    "{% for m in messages %}{{ '<s>' + m.role + '\n' + m.content + '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)
STRICT = "{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}" + CHATML
DIALOGUE: tuple[Turn, ...] = (Turn("user", "Who are you?"), Turn("assistant", "A cat."), Turn("user", "Why?"))
PROMPTS: tuple[Prompt, ...] = ("Once upon a time", DIALOGUE, (Turn("system", "Be kind."), *DIALOGUE[:1]))
ANSWERS = ("Because.", " spaced", "two\nlines\n", "\n", "</s>", "a <s> b </s> c", "<pad>", "caf\u00e9", "\ue000 </s>")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    words = "Human: Assistant: user assistant system who are you because a cat time why once upon be kind"
    return train_tokenizer([words, words.title()], vocab_size=290, max_length=512)


@pytest.fixture
def chat(tokenizer: Any) -> Any:
    tokenizer.chat_template = CHATML
    yield tokenizer
    tokenizer.chat_template = None


def text_of(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def test_a_text_is_continued_as_it_stands(tokenizer: Any) -> None:
    renderer = Renderer(tokenizer)
    prompt, answer = renderer.prompt_ids("Once upon"), renderer.answer_ids("Once upon", " a time")
    assert text_of(tokenizer, prompt) == "<s>Once upon" and text_of(tokenizer, answer) == " a time</s>"
    assert prompt[0] == tokenizer.bos_token_id and answer[-1] == tokenizer.eos_token_id


def test_a_conversation_without_a_chat_template_reads_like_an_hh_transcript(tokenizer: Any) -> None:
    renderer = Renderer(tokenizer)
    whole = renderer.prompt_ids(DIALOGUE) + renderer.answer_ids(DIALOGUE, "Because.")
    said = "\n\nHuman: Who are you?\n\nAssistant: A cat.\n\nHuman: Why?\n\nAssistant: Because."
    assert text_of(tokenizer, whole) == f"<s>{said}</s>"
    assert whole == tokenizer(f"{said}")["input_ids"] + [tokenizer.eos_token_id]


def test_a_system_turn_stands_before_the_dialogue(tokenizer: Any) -> None:
    ids = Renderer(tokenizer, template="dialogue").prompt_ids((Turn("system", "Be kind."), Turn("user", "Hi")))
    assert text_of(tokenizer, ids) == "<s>Be kind.\n\nHuman: Hi\n\nAssistant:"


def test_the_plain_template_has_no_speakers(tokenizer: Any) -> None:
    ids = Renderer(tokenizer, template="plain").prompt_ids(DIALOGUE)
    assert text_of(tokenizer, ids) == "<s>Who are you?\n\nA cat.\n\nWhy?\n\n"


def test_a_text_becomes_a_turn_where_a_template_is_named(chat: Any) -> None:
    dialogue = Renderer(chat, template="dialogue").prompt_ids("Hi")
    assert text_of(chat, dialogue) == "<s>\n\nHuman: Hi\n\nAssistant:"
    assert text_of(chat, Renderer(chat, template="chat").prompt_ids("Hi")) == "<s>user\nHi</s>\n<s>assistant\n"
    assert text_of(chat, Renderer(chat, template="plain").prompt_ids("Hi")) == "<s>Hi"


def test_auto_takes_a_text_for_a_turn_of_the_user_where_there_is_a_chat_template(chat: Any) -> None:
    auto, named = Renderer(chat), Renderer(chat, template="chat")
    for prompt in ("Hi", "Once upon a time", (Turn("user", "Hi"),)):
        assert auto.prompt_ids(prompt) == named.prompt_ids(prompt)
        assert auto.answer_ids(prompt, "Because.") == named.answer_ids(prompt, "Because.")


def test_auto_leaves_a_transcript_as_it_stands_whatever_the_tokenizer(chat: Any) -> None:
    text = "\n\nHuman: Why?\n\nAssistant:"
    for answer in ("Because.", " Because."):
        whole = Renderer(chat).prompt_ids(text) + Renderer(chat).answer_ids(text, answer)
        assert text_of(chat, whole) == f"<s>{text} Because.</s>"
    assert Renderer(chat).prompt_text(text) == text


SEAMS = [
    ("Hi", "Hello", "Hi Hello"),
    ("Hi ", "Hello", "Hi Hello"),
    ("Hi", " Hello", "Hi Hello"),
    ("Hi", "\nx", "Hi\nx"),
]


@pytest.mark.parametrize(("prompt", "answer", "whole"), SEAMS)
def test_auto_puts_a_space_between_a_text_and_its_answer_where_there_is_none(
    tokenizer: Any, prompt: str, answer: str, whole: str
) -> None:
    for template in ("auto", "plain"):
        renderer = Renderer(tokenizer, template=template)
        before, after = renderer.prompt_ids(prompt), renderer.answer_ids(prompt, answer)
        assert before == tokenizer.encode(prompt), "what a policy is given to go on from"
        said = whole if template == "auto" else prompt + answer
        assert text_of(tokenizer, before + after) == f"<s>{said}</s>"


def test_a_template_that_there_is_not_is_refused_by_name(tokenizer: Any) -> None:
    name: Any = "chatml"
    with pytest.raises(InvalidArgumentError, match="'chatml'; there are auto, chat, dialogue, plain") as caught:
        Renderer(tokenizer, template=name, field="--template")
    assert caught.value.violations[0].field == "--template"


def test_a_chat_template_gives_the_ids_that_the_reward_service_scores(chat: Any, tmp_path: Path) -> None:
    chat.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    # The services read a chat as the tokenizer says; one that reads special strings as text would split the template.
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"split_special_tokens": False}))
    codec, renderer = HfCodec(tmp_path), Renderer(chat)
    for prompt in PROMPTS[1:]:
        assert not isinstance(prompt, str)
        turns = [Message(turn.role, turn.content) for turn in (*prompt, Turn("assistant", "Because."))]
        asked, answered = encode_conversation(codec, turns)
        assert renderer.prompt_ids(prompt) == asked
        # The template ends with a line break behind the end token, which no model generates.
        assert renderer.answer_ids(prompt, "Because.") == answered[: answered.index(chat.eos_token_id) + 1]


@pytest.mark.parametrize("template", ["chat", "dialogue", "plain"])
@pytest.mark.parametrize("answer", ANSWERS)
def test_special_strings_in_the_data_stay_text_and_every_answer_ends_once(
    chat: Any, template: Any, answer: str
) -> None:
    renderer = Renderer(chat, template=template)
    for prompt in (*PROMPTS, (Turn("user", "What is </s>? <pad> \ue001"),)):
        answer_ids, prompt_ids = renderer.answer_ids(prompt, answer), renderer.prompt_ids(prompt)
        special = {chat.bos_token_id, chat.eos_token_id, chat.pad_token_id}
        assert answer_ids[-1] == chat.eos_token_id and not special & set(answer_ids[:-1])
        assert text_of(chat, answer_ids[:-1]).strip(" ") == answer.strip(" ")
        said = prompt if isinstance(prompt, str) else "".join(turn.content for turn in prompt)
        for name, token_id in (("</s>", chat.eos_token_id), ("<pad>", chat.pad_token_id)):
            marks = len(prompt) if template == "chat" and name == "</s>" and not isinstance(prompt, str) else 0
            marks += template == "chat" and name == "</s>" and isinstance(prompt, str)
            assert prompt_ids.count(token_id) == marks
            assert text_of(chat, prompt_ids).count(name) == said.count(name) + marks


def test_a_template_that_puts_no_end_token_behind_the_answer_gets_one(tokenizer: Any) -> None:
    tokenizer.chat_template = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    try:
        ids = Renderer(tokenizer, template="chat").answer_ids(DIALOGUE, "Because")
    finally:
        tokenizer.chat_template = None
    assert text_of(tokenizer, ids).endswith("Because</s>")


def test_an_answer_that_melts_into_the_prompt_is_tokenised_alone() -> None:
    tokenizer = train_tokenizer(["\n\n\n\n a\n\n\n b"] * 3, vocab_size=262, max_length=64)
    tokenizer.chat_template = CHATML
    prompts: tuple[tuple[Prompt, Any], ...] = (("x\n", "plain"), ((Turn("user", "Hi"),), "chat"))
    for prompt, template in prompts:
        renderer, answer = Renderer(tokenizer, template=template), "\n\ny"
        assert text_of(tokenizer, renderer.answer_ids(prompt, answer)) == f"{answer}</s>"
        whole = renderer.prompt_ids(prompt) + renderer.answer_ids(prompt, answer)
        assert text_of(tokenizer, whole).count("\n") == (3 if isinstance(prompt, str) else 5)


def test_a_conversation_that_the_template_refuses_names_the_reason(tokenizer: Any) -> None:
    tokenizer.chat_template = STRICT
    try:
        with pytest.raises(InvalidArgumentError, match="user first") as caught:
            Renderer(tokenizer, template="chat", field="template").prompt_ids((Turn("system", "Be kind."), *DIALOGUE))
    finally:
        tokenizer.chat_template = None
    assert (caught.value.reason, caught.value.violations[0].field) == ("CHAT_TEMPLATE_REFUSED", "template")


def test_a_tokenizer_that_cannot_do_it_is_refused_at_once(tokenizer: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="no chat template") as caught:
        Renderer(tokenizer, template="chat", field="data.template")
    assert caught.value.violations[0].field == "data.template"
    eos, tokenizer.eos_token = tokenizer.eos_token, None
    try:
        with pytest.raises(InvalidArgumentError, match="no end-of-text token"):
            Renderer(tokenizer)
    finally:
        tokenizer.eos_token = eos


def test_a_document_begins_and_ends(tokenizer: Any) -> None:
    renderer = Renderer(tokenizer)
    assert text_of(tokenizer, renderer.document_ids("Once")) == "<s>Once</s>"
    assert text_of(tokenizer, renderer.document_ids("Once </s>", is_finished=False)) == "<s>Once </s>"
    assert renderer.document_ids("Once </s>", is_finished=False).count(tokenizer.eos_token_id) == 0


def test_a_tokenizer_that_marks_spaces_in_front_begins_answers_as_they_are_generated() -> None:
    folder = SHARED_DATA.parent / "models" / "stories260k"
    if not folder.is_dir():
        pytest.skip("../shared/models is absent; the templates are tested with a tokenizer made here")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    renderer = Renderer(tokenizer)
    answer = renderer.answer_ids(DIALOGUE, "He was sad.")
    assert tokenizer.convert_ids_to_tokens(answer)[0].startswith("\u2581")
    assert renderer.prompt_ids(DIALOGUE) + answer[:-1] == tokenizer.encode(
        "\n\nHuman: Who are you?\n\nAssistant: A cat.\n\nHuman: Why?\n\nAssistant: He was sad."
    )


def test_a_tokenizer_that_ends_texts_by_itself_gives_no_second_end(tokenizer: Any) -> None:
    from tokenizers import processors

    ended = copy.deepcopy(tokenizer)
    ended.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A $B", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    ours, theirs = Renderer(tokenizer), Renderer(ended)
    for prompt in PROMPTS:
        assert theirs.prompt_ids(prompt) == ours.prompt_ids(prompt)
        assert theirs.answer_ids(prompt, "Because.") == ours.answer_ids(prompt, "Because.")
    assert theirs.document_ids("Once") == ours.document_ids("Once")


def test_prompts_are_not_mixed_up_when_they_change(tokenizer: Any) -> None:
    renderer = Renderer(tokenizer)
    first = [renderer.prompt_ids(prompt) for prompt in PROMPTS]
    renderer.prompt_ids(PROMPTS[0]).clear()
    assert [renderer.prompt_ids(prompt) for prompt in reversed(PROMPTS)] == first[::-1]
    assert [Renderer(tokenizer).prompt_ids(prompt) for prompt in PROMPTS] == first


# Fitting

END = 9


def test_what_fits_stays() -> None:
    assert fit([1, 2, 3], [[4, END], [5, 6, 7, 8, END]], max_tokens=8, overlong="drop") == (
        [1, 2, 3],
        [[4, END], [5, 6, 7, 8, END]],
    )


def test_the_front_of_a_long_prompt_is_cut_for_the_longest_answer() -> None:
    answers = [[4, END], [5, 6, 7, END]]
    fitted = fit([1, *range(10, 30)], answers, max_tokens=10, overlong="truncate")
    assert fitted == ([1, 25, 26, 27, 28, 29], answers)


def test_a_long_answer_loses_its_end_but_not_the_end_token_and_the_prompt_keeps_a_quarter() -> None:
    fitted = fit([1, 2, 3, 4, 5], [[*range(10, 50), END], [7, END]], max_tokens=12, overlong="truncate")
    assert fitted == ([1, 4, 5], [[*range(10, 18), END], [7, END]])


def test_a_short_prompt_leaves_its_room_to_the_answer() -> None:
    assert fit([1], [[*range(10, 50), END]], max_tokens=12, overlong="truncate") == ([1], [[*range(10, 20), END]])


def test_what_does_not_fit_is_dropped_where_that_is_asked_for() -> None:
    assert fit([1] * 5, [[2] * 4, [2] * 3], max_tokens=8, overlong="drop") is None
    assert fit([1] * 5, [[2] * 3, [2] * 3], max_tokens=8, overlong="drop") is not None


@given(
    prompt=st.lists(st.integers(10, 99), max_size=40),
    answers=st.lists(st.lists(st.integers(10, 99), min_size=1, max_size=40), min_size=1, max_size=5),
    max_tokens=st.integers(8, 30),
)
def test_whatever_is_cut_fits_and_keeps_its_ends(prompt: list[int], answers: list[list[int]], max_tokens: int) -> None:
    fitted = fit(prompt, answers, max_tokens=max_tokens, overlong="truncate")
    assert fitted is not None
    kept, cut = fitted
    assert kept[:1] == prompt[:1]
    assert len(kept) < 2 or kept[1:] == prompt[1 - len(kept) :]
    for answer, short in zip(answers, cut, strict=True):
        assert short and short[-1] == answer[-1] and short[:-1] == answer[: len(short) - 1]
        assert len(kept) + len(short) <= max_tokens


@pytest.mark.parametrize(
    ("answers", "max_tokens", "field"), [([[1]], 7, "max_tokens"), ([[1], []], 8, "answers"), ([], 8, "answers")]
)
def test_an_answer_without_tokens_or_room_is_refused(answers: list[list[int]], max_tokens: int, field: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        fit([1], answers, max_tokens=max_tokens, overlong="truncate")
    assert caught.value.violations[0].field == field
