"""Text to token ids and back, for callers that do not send token ids."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tether.errors import FailedPreconditionError, InvalidArgumentError


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: str
    """"system", "user" or "assistant"."""
    content: str
    """What is said."""


class TextCodec(Protocol):
    """Encodes and decodes the text of one model."""

    vocab_size: int
    """Number of token ids."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Return the ids; special strings inside the text are read as ordinary characters."""
        ...

    def end(self, token_ids: Sequence[int]) -> list[int]:
        """Return the ids with the end token behind them, once; as they are where the model has none."""
        ...

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text without special tokens."""
        ...

    def encode_chat(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> list[int]:
        """Return the ids of a conversation rendered with the model's own template.

        Raises:
            FailedPreconditionError: The model has no chat template.
        """
        ...


class ByteCodec:
    """One token per UTF-8 byte: id 0 pads, 1 begins and 2 ends a text, byte b is 3 + b. For the fake engines."""

    vocab_size = 259
    bos_id = 1
    eos_id = 2

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Return one id per byte."""
        ids = [3 + byte for byte in text.encode("utf-8")]
        return [self.bos_id, *ids] if add_special_tokens else ids

    def end(self, token_ids: Sequence[int]) -> list[int]:
        """Return the ids with the end token behind them, once."""
        return [*token_ids] if token_ids[-1:] == [self.eos_id] else [*token_ids, self.eos_id]

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text; bytes that are not UTF-8 become the replacement character."""
        return bytes(token - 3 for token in token_ids if 3 <= token < self.vocab_size).decode("utf-8", "replace")

    def encode_chat(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> list[int]:
        """Return the ids of `role: content` lines."""
        lines = [f"{message.role}: {message.content}\n" for message in messages]
        return self.encode("".join(lines) + ("assistant: " if add_generation_prompt else ""), add_special_tokens=True)


def encode_document(tokenizer: Any, text: str, *, is_finished: bool = True) -> list[int]:
    """Return the ids of a document as prompts begin and answers end: with the tokenizer's own start, and one end token.

    Special strings in the text are read as ordinary characters.

    Args:
        tokenizer: Of transformers; what it puts in front of a text, mostly a beginning-of-text token, stays.
        text: The document.
        is_finished: Whether the end token follows, where the tokenizer has one; otherwise none is left at the end.
    """
    ids = [
        int(token)
        for token in tokenizer.encode(text, add_special_tokens=True, split_special_tokens=True, verbose=False)
    ]
    end = tokenizer.eos_token_id
    body = ids[:-1] if len(ids) > 1 and ids[-1] == end else ids  # some tokenizers end texts by themselves
    return [*body, int(end)] if is_finished and end is not None else body


class HfCodec:
    """The tokenizer of a transformers model folder or hub name."""

    def __init__(self, model: str | Path, *, field: str = "model") -> None:
        """Load the tokenizer.

        Args:
            model: Folder or hub name.
            field: Name of the setting that holds it, for errors.

        Raises:
            InvalidArgumentError: There is none, or it cannot be read.
        """
        from transformers import AutoTokenizer

        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(str(model), trust_remote_code=False)
        except Exception as error:  # the tokenizers library raises bare Exception for a malformed file
            raise InvalidArgumentError(f"The tokenizer of {model} cannot be loaded: {error}", field=field) from error
        self.vocab_size = len(self._tokenizer)
        # How special strings are read is state of the tokenizer that encode and encode_chat set differently.
        self._lock = threading.Lock()

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Return the ids, with the beginning-of-text token if the tokenizer adds one."""
        with self._lock:
            ids = self._tokenizer.encode(text, add_special_tokens=add_special_tokens, split_special_tokens=True)
        return [int(token) for token in ids]

    def encode_document(self, text: str) -> list[int]:
        """Return the ids of a whole document; see the function of that name."""
        with self._lock:
            return encode_document(self._tokenizer, text)

    def end(self, token_ids: Sequence[int]) -> list[int]:
        """Return the ids with the end token behind them, once; as they are where the tokenizer has none."""
        end = self._tokenizer.eos_token_id
        ids = [*token_ids]
        return ids if end is None or ids[-1:] == [end] else [*ids, int(end)]

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text without special tokens."""
        with self._lock:
            return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def encode_chat(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> list[int]:
        """Return the rendered conversation's ids.

        Raises:
            FailedPreconditionError: The model has no chat template.
            InvalidArgumentError: The template refuses the conversation, for example the order of its roles.
        """
        from jinja2 import TemplateError

        if not self._tokenizer.chat_template:
            raise FailedPreconditionError(
                "The model has no chat template; send text or token ids instead.",
                field="messages",
                reason="NO_CHAT_TEMPLATE",
            )
        plain = [{"role": message.role, "content": message.content} for message in messages]
        try:
            with self._lock:
                ids = self._tokenizer.apply_chat_template(
                    plain,
                    add_generation_prompt=add_generation_prompt,
                    tokenize=True,
                    return_dict=False,
                    tokenizer_kwargs={"split_special_tokens": False},  # else the template's marks would be words
                )
        except TemplateError as error:
            raise InvalidArgumentError(
                f"The model's chat template refuses this conversation: {str(error)[:200]}",
                field="messages",
                reason="CHAT_TEMPLATE_REFUSED",
            ) from error
        return [int(token) for token in ids]


ROLES = ("system", "user", "assistant")
MAX_MESSAGES = 1024
"""Turns of a conversation at most."""


def check_message_count(count: int, *, field: str) -> None:
    """Refuse a conversation of too many turns; cheap, so that it comes before the turns are read.

    Raises:
        InvalidArgumentError: Names the field.
    """
    if count > MAX_MESSAGES:
        raise InvalidArgumentError(f"{count} messages; at most {MAX_MESSAGES} are accepted.", field=field)


def check_messages(messages: Sequence[Message], *, field: str, max_chars: int) -> None:
    """Refuse a conversation with an unknown role, an empty turn or too much text.

    Raises:
        InvalidArgumentError: Names the message.
    """
    for index, message in enumerate(messages):
        if message.role not in ROLES:
            raise InvalidArgumentError(f"Role {message.role!r} is not one of {ROLES}.", field=f"{field}[{index}].role")
        if not message.content:
            raise InvalidArgumentError("The content is empty.", field=f"{field}[{index}].content")
    total = sum(len(message.content) for message in messages)
    if total > max_chars:
        raise InvalidArgumentError(f"{total} characters; at most {max_chars} are accepted.", field=field)
