"""The shapes that rows come in: an example of each, and how one is told from the keys of a row."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from tether_services.recipes.data.instruction_shapes import (
    parse_instruction,
    parse_labelled,
    parse_messages,
    parse_text,
)
from tether_services.recipes.data.preference_shapes import parse_hh, parse_oasst, parse_pair, parse_ranked
from tether_services.recipes.data.problems import Dropped
from tether_services.recipes.data.records import Demonstration, Document, LabelledText, Place, Ranking

__all__ = ["SHAPES", "Record", "RowShape", "detect_shape", "shapes_of"]

Record = Demonstration | Document | LabelledText | Ranking
Parse = Callable[[Mapping[str, object], Place], Iterator[Record | Dropped]]


@dataclass(frozen=True, slots=True)
class RowShape:
    """How one kind of row becomes records."""

    name: str
    record: type[Record]
    """What it holds."""
    parse: Parse
    """Yields the records of a row; raises `RowError` for a malformed one."""
    example: str
    """One row, and what else is accepted."""


SHAPES: dict[str, RowShape] = {
    shape.name: shape
    for shape in (
        RowShape(
            "hh",
            Ranking,
            parse_hh,
            '{"chosen": "\\n\\nHuman: Hi\\n\\nAssistant: Hello!",\n'
            ' "rejected": "\\n\\nHuman: Hi\\n\\nAssistant: What?"}\n'
            "Two whole transcripts that differ in the last reply.",
        ),
        RowShape(
            "pairs",
            Ranking,
            parse_pair,
            '{"prompt": "Hi", "chosen": "Hello!", "rejected": "What?", "margin": 1.5}\n'
            "Each field is a text or a list of messages; without prompt, chosen and rejected are whole conversations.\n"
            "margin is optional. instruction and input may stand in place of prompt.\n"
            "A prompt that is a text is a user's turn where there is a chat template, else continued as it stands.",
        ),
        RowShape(
            "ranked",
            Ranking,
            parse_ranked,
            '{"prompt": "Hi", "answers": ["Hello!", "Hey.", "What?"], "ranks": [0, 1, 1]}\n'
            "ranks: smaller is better; or scores: higher is better. Ties are allowed, margin is optional. Also\n"
            "answers:\n"
            '[{"text": "Hello!", "rank": 0}, ...] or [{"text": "Hello!", "score": 3.5}, ...].',
        ),
        RowShape(
            "instruction",
            Demonstration,
            parse_instruction,
            '{"instruction": "Add the numbers.", "input": "1 and 2", "output": "3"}\n'
            'input is optional. Also {"instruction": "...", "instances": [{"input": "", "output": "..."}]}\n'
            'and {"prompt": "...", "completion": "..."}.',
        ),
        RowShape(
            "messages",
            Demonstration,
            parse_messages,
            '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}\n'
            'The last turn is learned. Also {"conversations": [{"from": "human", "value": "Hi"}, ...]}.',
        ),
        RowShape(
            "text",
            Document,
            parse_text,
            '{"text": "Once upon a time."}\n'
            "Also .txt files: a separator line ends a document; without one the file is one document.",
        ),
        RowShape(
            "labelled",
            LabelledText,
            parse_labelled,
            '{"sentence": "A warm film.", "label": 1}\n'
            "text in place of sentence. Also CSV with these columns, and .pos and .neg files, one sentence a line.",
        ),
        RowShape(
            "oasst",
            Ranking,
            parse_oasst,
            '{"message_tree_id": "...", "prompt": {"text": "Hi", "role": "prompter", "replies": [\n'
            '  {"text": "Hello!", "role": "assistant", "rank": 0, "replies": []},\n'
            '  {"text": "What?", "role": "assistant", "rank": 1, "replies": []}]}}\n'
            "Every group of two or more ranked replies of the assistant is one ranking.",
        ),
    )
}


def shapes_of(record: type[Record]) -> list[str]:
    """Return the names of the shapes that hold a kind of record."""
    return [name for name, shape in SHAPES.items() if shape.record is record]


def detect_shape(row: Mapping[str, object]) -> RowShape | None:
    """Return the shape that the keys of a row tell, or None; a field without a value counts as absent."""
    keys = {key for key, value in row.items() if value is not None}
    if {"chosen", "rejected"} <= keys:
        is_transcript = isinstance(row["chosen"], str) and not keys & {"prompt", "instruction"}
        return SHAPES["hh" if is_transcript else "pairs"]
    for name, wanted in KEYS:
        if wanted <= keys:
            return SHAPES[name]
    return None


KEYS: tuple[tuple[str, set[str]], ...] = (
    ("oasst", {"message_tree_id", "prompt"}),
    ("ranked", {"prompt", "answers"}),
    ("messages", {"messages"}),
    ("messages", {"conversations"}),
    ("instruction", {"instruction", "output"}),
    ("instruction", {"instruction", "instances"}),
    ("instruction", {"prompt", "completion"}),
    ("labelled", {"sentence", "label"}),
    ("labelled", {"text", "label"}),
    ("text", {"text"}),
)
"""The first shape whose keys a row has is taken."""
