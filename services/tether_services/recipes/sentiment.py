"""Labelled sentences: reading, overlap between files, and the variants that training shows."""

from __future__ import annotations

import csv
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tether.errors import InvalidArgumentError
from tether_services.recipes.documents import read_text

LABEL_BY_SUFFIX = {".pos": 1, ".neg": 0}
"""Text files whose name says the label of every line."""
NOT_A_WORD = re.compile(r"[^a-z0-9]+")
SPACE_BEFORE = re.compile(r"\s+([.,!?;:)\]%])")
SPACE_AFTER = re.compile(r"([(\[$])\s+")
QUOTED = re.compile(r'"\s+([^"]*?)\s+"')


@dataclass(frozen=True, slots=True)
class LabelledText:
    """A text and what people said about it."""

    text: str
    label: int
    """1 positive, 0 negative."""


def read_labelled(paths: Sequence[Path], *, field: str) -> list[LabelledText]:
    """Return the labelled sentences of CSV, `.pos` and `.neg` files in order.

    Raises:
        InvalidArgumentError: A file cannot be read or has another form; the message names the file and the row.
    """
    return [item for path in paths for item in _read_one(path, field=field)]


def _read_one(path: Path, *, field: str) -> list[LabelledText]:
    text = read_text(path, field=field)
    if path.suffix == ".csv":
        return _parse_csv(text, path=path, field=field)
    if path.suffix not in LABEL_BY_SUFFIX:
        raise InvalidArgumentError(f"{path.name} must end in .csv, .pos or .neg", field=field)
    lines = (tidy_spacing(line) for line in text.splitlines())
    return [LabelledText(line, LABEL_BY_SUFFIX[path.suffix]) for line in lines if line]


def _parse_csv(text: str, *, path: Path, field: str) -> list[LabelledText]:
    items = []
    for number, row in enumerate(csv.DictReader(text.splitlines()), start=2):
        label, sentence = row.get("label"), row.get("sentence")
        if label not in ("0", "1") or not sentence or not sentence.strip():
            raise InvalidArgumentError(
                f"row {number} of {path.name} needs a label of 0 or 1 and a sentence in columns of those names",
                field=field,
            )
        items.append(LabelledText(sentence.strip(), int(label)))
    return items


def tidy_spacing(text: str) -> str:
    """Return text with the spaces around punctuation of an ordinary English sentence."""
    text = QUOTED.sub(r'"\1"', text.strip())
    return SPACE_AFTER.sub(r"\1", SPACE_BEFORE.sub(r"\1", text))


def overlap_key(text: str) -> str:
    """Return the letters and digits of a text in lower case: equal for one sentence in two spellings."""
    return NOT_A_WORD.sub("", text.lower())


def remove_overlap(
    items: Sequence[LabelledText], *, reserved: Sequence[LabelledText]
) -> tuple[list[LabelledText], int]:
    """Return the items that do not occur in `reserved`, each once, and how many of them did occur there.

    Of two equal sentences the first is kept with its label: name the file with the better labels first.
    """
    reserved_keys = {overlap_key(item.text) for item in reserved}
    fresh = [item for item in items if overlap_key(item.text) not in reserved_keys]
    first: dict[str, LabelledText] = {}
    for item in fresh:
        first.setdefault(overlap_key(item.text), item)
    return list(first.values()), len(items) - len(fresh)


def vary_case(text: str, *, rng: random.Random) -> str:
    """Return the text as it is, in lower case, or with a capital first letter, one in three each."""
    choice = rng.randrange(3)
    return (text, text.lower(), text[:1].upper() + text[1:])[choice]


def join_sentences(sentences: Sequence[str]) -> str:
    """Return one text of several sentences; one that ends without a mark gets a full stop."""
    ended = (sentence if sentence[-1:] in '.!?"' else sentence + "." for sentence in sentences[:-1])
    return " ".join([*ended, *sentences[-1:]])
