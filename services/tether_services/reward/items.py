"""Items as callers send them, turned into what the components of a model read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tether.errors import InvalidArgumentError
from tether_services.reward.engine import ScoreTask
from tether_services.runtime.checks import check_text, check_token_ids
from tether_services.runtime.text import Message, TextCodec, check_messages


@dataclass(frozen=True, slots=True)
class ScoreInput:
    """One item as a caller sent it: text, a conversation, or token ids."""

    prompt: str = ""
    """Text form."""
    response: str = ""
    """Text form."""
    messages: tuple[Message, ...] = ()
    """Chat form; the last one is the response."""
    prompt_token_ids: tuple[int, ...] = ()
    """Token form."""
    response_token_ids: tuple[int, ...] = ()
    """Token form."""


@dataclass(frozen=True, slots=True)
class PreparedItem:
    """An item that can be scored."""

    task: ScoreTask
    """What the engines get."""
    truncated: bool
    """Whether prompt tokens were cut."""
    digest: bytes = b""
    """Its key in the score cache; empty if it is not to be cached."""


@dataclass(frozen=True, slots=True)
class ItemReader:
    """Checks items and brings them into the forms that the components of one model read."""

    codec: TextCodec | None
    """Tokenizer of the model; None if it has only rules and none was configured."""
    reads_text: bool
    """Whether a component judges text."""
    reads_tokens: bool
    """Whether a component judges token ids."""
    vocab_size: int
    """Number of token ids; 0 if no component reads them."""
    max_model_len: int
    """Tokens per item at most; 0 if no component reads them."""
    max_text_chars: int
    """Characters at most of a prompt, of a response and of a conversation."""
    ends_text: bool = False
    """Whether the end token is put behind a response that came as text."""

    def prepare(self, item: ScoreInput) -> PreparedItem:
        """Return the item in the forms that the components read. Slow for long text: call it in a thread.

        Raises:
            InvalidArgumentError: Names the field, relative to the item.
            FailedPreconditionError: A conversation was sent and the model has no chat template.
        """
        form = check_form(item)
        check_text(item.prompt, field="prompt", max_chars=self.max_text_chars)
        check_text(item.response, field="response", max_chars=self.max_text_chars)
        check_messages(item.messages, field="messages", max_chars=self.max_text_chars)
        prompt, response = self._as_text(item) if self.reads_text else ("", "")
        if not self.reads_tokens:
            return PreparedItem(ScoreTask(prompt, response), truncated=False)
        prompt_ids, response_ids = self._as_token_ids(item)
        self._check_ids(prompt_ids, response_ids, form=form, vocab_size=self.vocab_size)
        kept, truncated = cut_prompt(prompt_ids, response_ids, max_model_len=self.max_model_len, field=form)
        return PreparedItem(ScoreTask(prompt, response, kept, tuple(response_ids)), truncated)

    def _as_text(self, item: ScoreInput) -> tuple[str, str]:
        """Return (prompt, response); earlier turns of a conversation become `role: content` lines."""
        if item.messages:
            earlier = [f"{message.role}: {message.content}" for message in item.messages[:-1]]
            return "\n".join(earlier), item.messages[-1].content
        if not item.response_token_ids:
            return item.prompt, item.response
        codec, prompt, response = self._needed_codec(), item.prompt_token_ids, item.response_token_ids
        self._check_ids(prompt, response, form="response_token_ids", vocab_size=codec.vocab_size)
        return codec.decode(prompt), codec.decode(response)

    def _as_token_ids(self, item: ScoreInput) -> tuple[Sequence[int], Sequence[int]]:
        """Return (prompt ids, response ids); ids that were sent stay as they are."""
        if item.response_token_ids:
            return item.prompt_token_ids, item.response_token_ids
        codec = self._needed_codec()
        if item.messages:
            return encode_conversation(codec, item.messages)
        prompt = codec.encode(item.prompt, add_special_tokens=True)
        response = codec.encode(item.response, add_special_tokens=False)
        return prompt, codec.end(response) if self.ends_text else response

    def _needed_codec(self) -> TextCodec:
        if self.codec is None:
            raise InvalidArgumentError(
                "The model has only rules and no tokenizer to read token ids with. "
                "Send text, or configure a tokenizer for the model.",
                field="response_token_ids",
                reason="NO_TOKENIZER",
            )
        return self.codec

    def _check_ids(self, prompt: Sequence[int], response: Sequence[int], *, form: str, vocab_size: int) -> None:
        if prompt:
            check_token_ids(prompt, field=form.replace("response", "prompt"), vocab_size=vocab_size)
        check_token_ids(response, field=form, vocab_size=vocab_size)


def cut_prompt(
    prompt_token_ids: Sequence[int], response_token_ids: Sequence[int], *, max_model_len: int, field: str
) -> tuple[tuple[int, ...], bool]:
    """Return the prompt cut from the left so that it fits beside the response, and whether it was cut.

    Raises:
        InvalidArgumentError: The response alone is too long; it is never cut.
    """
    room = max_model_len - len(response_token_ids)
    if room < 0:
        raise InvalidArgumentError(
            f"The response has {len(response_token_ids)} tokens; the model reads at most {max_model_len}.",
            field=field,
            reason="TOO_LONG",
        )
    cut = max(0, len(prompt_token_ids) - room)
    return tuple(prompt_token_ids[cut:] if cut else prompt_token_ids), cut > 0


def check_form(item: ScoreInput) -> str:
    """Return the name of the field that holds the response.

    Raises:
        InvalidArgumentError: The item has no response, or is in more than one form.
    """
    has_text, has_ids = item.prompt or item.response, item.prompt_token_ids or item.response_token_ids
    if sum(map(bool, (has_text, item.messages, has_ids))) > 1:
        raise InvalidArgumentError(
            "More than one of text, messages and token ids is set; an item has exactly one form.",
            reason="SEVERAL_FORMS",
        )
    if item.messages:
        if item.messages[-1].role != "assistant":
            raise InvalidArgumentError(
                "The last message is what is judged and must be the assistant's.",
                field=f"messages[{len(item.messages) - 1}].role",
            )
        return "messages"
    field = "response_token_ids" if has_ids else "response"
    if not (item.response or item.response_token_ids):
        raise InvalidArgumentError("The response is empty; there is nothing to judge.", field=field, reason="EMPTY")
    return field


def encode_conversation(codec: TextCodec, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
    """Return (prompt ids, response ids) of a conversation: the rendered whole, split before the last answer."""
    whole = codec.encode_chat(messages, add_generation_prompt=False)
    if len(messages) == 1:
        return [], whole
    asked = codec.encode_chat(messages[:-1], add_generation_prompt=True)
    pairs = zip(whole, asked, strict=False)
    common = next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(whole), len(asked)))
    return whole[:common], whole[common:]
