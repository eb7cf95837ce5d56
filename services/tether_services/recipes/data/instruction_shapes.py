"""Rows that show an answer to learn, and rows of plain or labelled text."""

from __future__ import annotations

from collections.abc import Iterator

from tether_services.recipes.data.fields import (
    Fields,
    check_prompt,
    list_of,
    object_of,
    read_prompt,
    read_turns,
    text_of,
)
from tether_services.recipes.data.problems import RowError
from tether_services.recipes.data.records import Demonstration, Document, LabelledText, Place, Turn

__all__ = ["instruction_prompt", "parse_instruction", "parse_labelled", "parse_messages", "parse_text"]

LABELS: dict[object, int] = {"0": 0, "1": 1, "0.0": 0, "1.0": 1, 0: 0, 1: 1}
"""Labels as CSV and as JSON write them; 0 and 1 find 0.0 and 1.0 too."""


def instruction_prompt(row: Fields, instance: Fields) -> tuple[Turn, ...]:
    """Return one turn of the user: the instruction, and after a blank line the input if there is one.

    Raises:
        RowError: empty_prompt, or as `check_text`.
    """
    instruction = text_of(row, "instruction", blank="empty_prompt")
    given = "" if instance.get("input") is None else text_of(instance, "input", blank=None)
    return (Turn("user", f"{instruction}\n\n{given}" if given.strip() else instruction),)


def parse_instruction(row: Fields, place: Place) -> Iterator[Demonstration]:
    """Yield the demonstrations of a row: one, or one for each of its instances.

    Raises:
        RowError: empty_answer, or as `instruction_prompt` and `read_prompt`.
    """
    if row.get("instruction") is None and row.get("prompt") is not None:
        prompt = read_prompt(row["prompt"], name="prompt")
        yield Demonstration(prompt, text_of(row, "completion", blank="empty_answer"), place)
        return
    instances = list_of(row, "instances") if row.get("instances") is not None else [row]
    for instance in instances:
        fields = object_of(instance, name="instances")
        prompt = instruction_prompt(row, fields)
        yield Demonstration(prompt, text_of(fields, "output", blank="empty_answer"), place)


def parse_messages(row: Fields, place: Place) -> Iterator[Demonstration]:
    """Yield the last turn of a conversation as the answer to all before it.

    Raises:
        RowError: no_reply, empty_prompt, or as `read_turns`.
    """
    name = "messages" if row.get("messages") is not None else "conversations"
    turns = read_turns(list_of(row, name), name=name)
    if not turns or turns[-1].role != "assistant":
        raise RowError("no_reply", "the last turn is not the assistant's")
    yield Demonstration(check_prompt(turns[:-1], name=name), turns[-1].content, place)


def parse_text(row: Fields, place: Place) -> Iterator[Document]:
    """Yield the document of a row.

    Raises:
        RowError: empty_text, or as `check_text`.
    """
    yield Document(text_of(row, "text", blank="empty_text"), place)


def parse_labelled(row: Fields, place: Place) -> Iterator[LabelledText]:
    """Yield a text with the label 1 (positive) or 0 (negative).

    Raises:
        RowError: bad_label, empty_text, or as `check_text`.
    """
    label = row.get("label")
    if label is None:
        raise RowError("missing_field", "label")
    if isinstance(label, bool) or not isinstance(label, str | int | float) or label not in LABELS:
        raise RowError("bad_label", "label must be 0 or 1")
    name = "sentence" if row.get("sentence") is not None else "text"
    yield LabelledText(text_of(row, name, blank="empty_text").strip(), LABELS[label], place)
