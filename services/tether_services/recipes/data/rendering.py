"""Records as token ids, the way that the services read them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

from tether.errors import InvalidArgumentError
from tether_services.recipes.data.records import Prompt, Turn
from tether_services.recipes.data.transcripts import is_transcript
from tether_services.runtime.text import encode_document

__all__ = ["Renderer", "Template", "check_template", "fit"]

Template = Literal["auto", "chat", "dialogue", "plain"]
SPEAKERS = {"user": "Human", "assistant": "Assistant"}
PROMPT_SHARE = 4
"""Truncation leaves a prompt this part of the tokens if it has as many: an answer without its question says little."""
MIN_TOKENS = 8


class Renderer:
    """Turns prompts and answers into token ids with one tokenizer and one template.

    Words of the data that spell a special token, such as `</s>`, stay words.
    """

    def __init__(self, tokenizer: Any, template: Template = "auto", *, field: str = "template") -> None:
        """Check that the tokenizer can do it.

        Args:
            tokenizer: Of transformers; with an end-of-text token.
            template: "chat": the tokenizer's own; a text becomes one turn of the user. "dialogue": turns after
                `Human:` and `Assistant:`, as in the HH transcripts. "plain": turns with a blank line after each; a text
                is continued as it stands. "auto": the chat template where there is one, but for texts that are
                transcripts. Where there is none, a conversation as dialogue; a text is continued as it stands, after a
                space where neither the prompt nor the answer has one.
            field: The setting that names the template, for errors.

        Raises:
            InvalidArgumentError: There is no such template, no end token, or no chat template where one is asked for.
        """
        check_template(template, field=field)
        if tokenizer.eos_token_id is None:
            raise InvalidArgumentError("the tokenizer has no end-of-text token; set its eos_token", field=field)
        if template == "chat" and not tokenizer.chat_template:
            raise InvalidArgumentError("the tokenizer has no chat template; take dialogue or plain", field=field)
        self._tokenizer, self._template, self._field = tokenizer, template, field
        self._last: tuple[Prompt, list[int]] | None = None
        added = tokenizer.added_tokens_decoder.items()
        self._special_ids = {token_id for token_id, token in added if token.special} | {tokenizer.eos_token_id}
        self._special = sorted((token.content for _, token in added if token.special), key=len, reverse=True)

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """Return the ids before an answer, with the beginning-of-text token if the tokenizer or its template adds one.

        Raises:
            InvalidArgumentError: The chat template refuses the conversation (reason CHAT_TEMPLATE_REFUSED).
        """
        if self._last is None or self._last[0] != prompt:  # the answers of a ranking share their prompt
            self._last = prompt, self._encode_prompt(prompt)
        return list(self._last[1])

    def _encode_prompt(self, prompt: Prompt) -> list[int]:
        if self._form(prompt) == "chat":
            marks = self._marks(_turns(prompt))
            return self._marked_ids(self._chat_text(_turns(prompt), marks, is_open=True), marks)
        return self._text_ids(self._prompt_text(prompt))

    def prompt_text(self, prompt: Prompt) -> str:
        """Return a prompt as the text whose ids are `prompt_ids`.

        Raises:
            InvalidArgumentError: The form is the chat template, whose marks no text can spell.
        """
        if self._form(prompt) == "chat":
            message = "a prompt in the chat template's form is no plain text; take the template dialogue or plain"
            raise InvalidArgumentError(message, field=self._field)
        return self._prompt_text(prompt)

    def answer_ids(self, prompt: Prompt, answer: str) -> list[int]:
        """Return the ids that follow those of the prompt, the end token included.

        The whole is tokenised at once, so that the answer begins as it would be generated; only where that changes the
        prompt's own ids, the answer is tokenised alone.

        Raises:
            InvalidArgumentError: As `prompt_ids`.
        """
        if self._form(prompt) == "chat":
            return self._end(self._chat_ids(prompt, answer))
        before = self.prompt_ids(prompt)
        text = self._prompt_text(prompt)
        is_joined = self._template == "plain" or text[-1:].isspace() or answer[:1].isspace()
        whole = self._text_ids(text + answer if is_joined else f"{text} {answer}")
        is_prefix = len(whole) > len(before) and whole[: len(before)] == before
        answer_ids = whole[len(before) :] if is_prefix else self._ordinary_ids(answer)
        return [*answer_ids, self._tokenizer.eos_token_id]

    def document_ids(self, text: str, *, is_finished: bool = True) -> list[int]:
        """Return the ids of a text, with the end token if it is finished; see `encode_document`."""
        return encode_document(self._tokenizer, text, is_finished=is_finished)

    def _form(self, prompt: Prompt) -> Literal["chat", "dialogue", "plain"]:
        if self._template != "auto":
            return self._template
        if isinstance(prompt, str) and (is_transcript(prompt) or not self._tokenizer.chat_template):
            return "plain"
        return "chat" if self._tokenizer.chat_template else "dialogue"

    def _prompt_text(self, prompt: Prompt) -> str:
        if self._form(prompt) == "dialogue":
            return "".join(_spoken(turn) for turn in _turns(prompt)) + "\n\nAssistant:"
        return prompt if isinstance(prompt, str) else "".join(f"{turn.content}\n\n" for turn in prompt)

    def _text_ids(self, text: str) -> list[int]:
        """Return the ids as the services compute them: with the tokens the tokenizer puts in front, none at the end."""
        return self.document_ids(text, is_finished=False)

    def _ordinary_ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(
            text, add_special_tokens=False, split_special_tokens=True, verbose=False
        )
        return ids

    def _chat_ids(self, prompt: Prompt, answer: str) -> list[int]:
        """Return the ids of the answer in a conversation, whatever the template puts behind it included."""
        turns = (*_turns(prompt), Turn("assistant", answer))
        marks = self._marks(turns)
        before = self._chat_text(turns[:-1], marks, is_open=True)
        whole = self._chat_text(turns, marks, is_open=False)
        before_ids, whole_ids = self._marked_ids(before, marks), self._marked_ids(whole, marks)
        if whole_ids[: len(before_ids)] != before_ids and whole.startswith(before):
            # The first characters of the answer would melt into the prompt's last token.
            return self._marked_ids(whole[len(before) :], marks)
        return whole_ids[_common_length(before_ids, whole_ids) :]

    def _chat_text(self, turns: Sequence[Turn], marks: dict[str, str], *, is_open: bool) -> str:
        """Return the rendered conversation; `is_open`: up to where the assistant begins to speak."""
        from jinja2 import TemplateError

        content = [{"role": turn.role, "content": _hide(turn.content, marks)} for turn in turns]
        try:
            return str(self._tokenizer.apply_chat_template(content, add_generation_prompt=is_open, tokenize=False))
        except TemplateError as error:
            raise InvalidArgumentError(
                f"the chat template refuses this conversation: {str(error)[:200]}",
                field=self._field,
                reason="CHAT_TEMPLATE_REFUSED",
            ) from error

    def _marks(self, turns: Sequence[Turn]) -> dict[str, str]:
        """Return a private character for each special string that the turns contain."""
        said = "".join(turn.content for turn in turns)
        found = [name for name in self._special if name in said]
        free = (chr(code) for code in range(0xE000, 0xF8FF) if chr(code) not in said) if found else iter(())
        return dict(zip(found, free, strict=False))

    def _marked_ids(self, text: str, marks: dict[str, str]) -> list[int]:
        """Return the ids of a rendered text in which marks stand for words that are no special tokens."""
        ids: list[int] = []
        names = {mark: name for name, mark in marks.items()}
        piece = ""
        for character in [*text, ""]:
            if character and character not in names:
                piece += character
                continue
            ids += self._template_ids(piece) if piece else []
            ids += self._ordinary_ids(names[character]) if character else []
            piece = ""
        return ids

    def _template_ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(
            text, add_special_tokens=False, split_special_tokens=False, verbose=False
        )
        return ids

    def _end(self, answer_ids: list[int]) -> list[int]:
        """Return the ids up to the token that ends the turn, without the space that templates put behind it."""
        ids = list(answer_ids)
        while ids and ids[-1] not in self._special_ids and not self._tokenizer.decode(ids[-1:]).strip():
            ids.pop()
        return ids if ids and ids[-1] in self._special_ids else [*ids, self._tokenizer.eos_token_id]


def check_template(name: str, *, field: str) -> None:
    """Refuse a name that is no template.

    Raises:
        InvalidArgumentError: With the names that there are.
    """
    if name not in get_args(Template):
        message = f"there is no template {name!r}; there are {', '.join(get_args(Template))}"
        raise InvalidArgumentError(message, field=field)


def _turns(prompt: Prompt) -> tuple[Turn, ...]:
    return (Turn("user", prompt),) if isinstance(prompt, str) else prompt


def _spoken(turn: Turn) -> str:
    return turn.content if turn.role == "system" else f"\n\n{SPEAKERS[turn.role]}: {turn.content}"


def _hide(text: str, marks: dict[str, str]) -> str:
    for name, mark in marks.items():
        text = text.replace(name, mark)
    return text


def _common_length(first: Sequence[int], second: Sequence[int]) -> int:
    pairs = zip(first, second, strict=False)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def fit(
    prompt_ids: Sequence[int],
    answers: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    overlong: Literal["truncate", "drop"],
) -> tuple[list[int], list[list[int]]] | None:
    """Return the prompt and its answers such that the prompt with each of them has at most `max_tokens` tokens.

    "truncate" cuts the front of the prompt but for its first token, which begins the text, down to a quarter of the
    tokens; then the end of the answers but for the last token, which ends them. Answers share one prompt. No answer
    becomes empty.

    Args:
        prompt_ids: Begin with the beginning-of-text token where there is one.
        answers: Each of at least one token, the end token last.
        max_tokens: At least 8.
        overlong: "drop" returns None for what does not fit.

    Raises:
        InvalidArgumentError: `max_tokens` is too small, or an answer is empty.
    """
    if max_tokens < MIN_TOKENS:
        raise InvalidArgumentError(f"max_tokens is {max_tokens}; at least {MIN_TOKENS} are needed", field="max_tokens")
    if not answers or not all(answers):
        raise InvalidArgumentError("an answer has no token", field="answers")
    longest = max(len(answer) for answer in answers)
    if len(prompt_ids) + longest <= max_tokens:
        return list(prompt_ids), [list(answer) for answer in answers]
    if overlong == "drop":
        return None
    room = max(max_tokens - longest, max_tokens // PROMPT_SHARE)
    prompt = _cut_front(prompt_ids, room)
    return prompt, [_cut_back(answer, max_tokens - len(prompt)) for answer in answers]


def _cut_front(ids: Sequence[int], most: int) -> list[int]:
    return list(ids) if len(ids) <= most else [ids[0], *ids[len(ids) - most + 1 :]]


def _cut_back(ids: Sequence[int], most: int) -> list[int]:
    return list(ids) if len(ids) <= most else [*ids[: most - 1], ids[-1]]
