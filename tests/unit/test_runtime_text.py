"""The tokenizer of a model folder, as several threads of a service use it."""

from __future__ import annotations

import json
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tether.errors import InvalidArgumentError
from tether_services.recipes.data.rendering import Renderer
from tether_services.recipes.tokenizer import train_tokenizer
from tether_services.runtime.text import HfCodec, Message, check_message_count, encode_document

PACKAGED_POLICY = Path(__file__).parents[2] / "services/tether_services/demo/models/policy"
TEMPLATE = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('system turns are not supported') }}{% endif %}"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
)


@pytest.fixture
def chat_model(tmp_path: Path) -> Path:
    """A tokenizer that reads special strings, unless told not to, and has a chat template: the usual kind."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(PACKAGED_POLICY / name, folder)
    config = json.loads((PACKAGED_POLICY / "tokenizer_config.json").read_text(encoding="utf-8"))
    config |= {"split_special_tokens": False, "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.fixture
def eager_threads() -> Iterator[None]:
    """Switch threads as often as possible."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("eager_threads")
def test_text_keeps_its_ids_while_conversations_are_encoded_in_another_thread(chat_model: Path) -> None:
    codec = HfCodec(chat_model)
    text = "Tom said <s> and </s> to the cat."
    expected = codec.encode(text, add_special_tokens=True)
    assert expected.count(1) == 1, "only the beginning-of-text token is special"
    stop = threading.Event()

    def talk() -> None:
        while not stop.is_set():
            codec.encode_chat([Message("user", "hello")], add_generation_prompt=False)

    talking = [threading.Thread(target=talk) for _ in range(3)]
    for thread in talking:
        thread.start()
    try:
        different = [ids for _ in range(2000) if (ids := codec.encode(text, add_special_tokens=True)) != expected]
    finally:
        stop.set()
        for thread in talking:
            thread.join()
    assert different == []


def test_the_marks_of_a_template_are_special_tokens_whatever_the_tokenizer_does_with_text(chat_model: Path) -> None:
    settings = json.loads((chat_model / "tokenizer_config.json").read_text(encoding="utf-8"))
    template = "{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}"
    ids = []
    for splits in (False, True):
        changed = settings | {"split_special_tokens": splits, "chat_template": template}
        (chat_model / "tokenizer_config.json").write_text(json.dumps(changed), encoding="utf-8")
        ids.append(HfCodec(chat_model).encode_chat([Message("user", "hello")], add_generation_prompt=False))
    assert ids[0] == ids[1]
    assert (ids[0][0], ids[0][-1], ids[0].count(1)) == (1, 2, 1)


def test_a_conversation_that_the_template_refuses_is_the_callers_mistake(chat_model: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="system turns are not supported") as caught:
        HfCodec(chat_model).encode_chat([Message("system", "x")], add_generation_prompt=True)
    assert (caught.value.reason, caught.value.violations[0].field) == ("CHAT_TEMPLATE_REFUSED", "messages")


@pytest.mark.parametrize("content", [None, "{", '{"version": 1}'])
def test_a_tokenizer_that_cannot_be_read_names_the_setting(chat_model: Path, content: str | None) -> None:
    (chat_model / "tokenizer.json").unlink()
    if content is not None:
        (chat_model / "tokenizer.json").write_text(content, encoding="utf-8")
    with pytest.raises(InvalidArgumentError) as caught:
        HfCodec(chat_model, field="models[0].tokenizer")
    assert caught.value.violations[0].field == "models[0].tokenizer"


def test_a_conversation_has_a_bounded_number_of_turns() -> None:
    check_message_count(1024, field="messages")
    with pytest.raises(InvalidArgumentError) as caught:
        check_message_count(1025, field="messages")
    assert caught.value.violations[0].field == "messages"


DOCUMENTS = ["The cat sat.", "Once </s>", "<s>Once", "\n\n two  lines\n", "caf\u00e9"]


@pytest.mark.parametrize("text", DOCUMENTS)
@pytest.mark.parametrize("lowercase", [False, True])
def test_a_document_is_the_same_tokens_wherever_it_is_read(text: str, lowercase: bool, tmp_path: Path) -> None:
    tokenizer = train_tokenizer(DOCUMENTS, vocab_size=264, max_length=64, lowercase=lowercase)
    tokenizer.save_pretrained(tmp_path)
    whole = encode_document(tokenizer, text)
    assert (whole[0], whole[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert {tokenizer.bos_token_id, tokenizer.eos_token_id}.isdisjoint(whole[1:-1])
    assert whole == HfCodec(tmp_path).encode_document(text)
    assert whole == Renderer(tokenizer).document_ids(text)
    assert whole[:-1] == encode_document(tokenizer, text, is_finished=False) == Renderer(tokenizer).prompt_ids(text)


def test_a_document_begins_and_ends_as_the_tokenizer_does_it() -> None:
    from tokenizers import processors

    tokenizer = train_tokenizer(DOCUMENTS, vocab_size=264, max_length=64)
    whole = encode_document(tokenizer, "cat")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A $B", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    assert encode_document(tokenizer, "cat") == whole, "an end of its own is not doubled"
    assert encode_document(tokenizer, "cat", is_finished=False) == whole[:-1]
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    assert encode_document(tokenizer, "cat") == whole[1:], "no start where the tokenizer puts none"
    tokenizer.eos_token = None
    assert encode_document(tokenizer, "cat") == whole[1:-1], "no end where the tokenizer has none"
