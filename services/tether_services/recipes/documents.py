"""Plain text files as documents, and their split into training and held-out parts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tether.errors import InvalidArgumentError

HASH_RANGE = 2**32
"""Documents are split by the first four bytes of their SHA-256."""


@dataclass(frozen=True, slots=True)
class DocumentSplit:
    """Documents of several files, apart by use."""

    train: tuple[str, ...]
    """Documents to learn from, in file order."""
    held_out: tuple[str, ...]
    """Documents to measure on, none of them in `train`."""
    dropped_count: int
    """Unfinished documents left out."""


def read_text(path: Path, *, field: str) -> str:
    """Return the text of a UTF-8 file.

    Raises:
        InvalidArgumentError: Not a readable UTF-8 file.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgumentError(f"cannot read {path} as UTF-8 text: {error}", field=field) from error


def split_text(text: str, *, separator: str) -> tuple[list[str], int]:
    """Return the documents that a separator line ends, and how many unfinished ones were dropped (0 or 1)."""
    parts: list[list[str]] = [[]]
    for line in text.splitlines():
        if line.strip() == separator:
            parts.append([])
        else:
            parts[-1].append(line)
    *finished, rest = ("\n".join(part).strip() for part in parts)
    return [document for document in finished if document], int(bool(rest))


def unwrap_lines(text: str) -> str:
    """Return hard-wrapped text with one line for each paragraph; blank lines separate paragraphs."""
    paragraphs: list[list[str]] = [[]]
    for line in text.splitlines():
        words = line.split()
        if words:
            paragraphs[-1].extend(words)
        elif paragraphs[-1]:
            paragraphs.append([])
    return "\n".join(" ".join(words) for words in paragraphs if words)


def is_held_out(text: str, *, fraction: float) -> bool:
    """Return whether a document belongs to the held-out part; equal texts always get the same answer."""
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return int.from_bytes(digest[:4], "big") < fraction * HASH_RANGE


def read_documents(
    paths: Sequence[Path], *, separator: str, held_out_fraction: float, field: str = "text_files"
) -> DocumentSplit:
    """Return the documents of text files, apart by hash of the text.

    A file without the separator is one hard-wrapped document and is only trained on: held out whole, it would take
    its share at once. Of equal documents the first is kept.

    Raises:
        InvalidArgumentError: A file cannot be read, or nothing is left to train or to measure on.
    """
    train: list[str] = []
    held_out: list[str] = []
    dropped_count = 0
    for path in paths:
        documents, dropped = split_text(text := read_text(path, field=field), separator=separator)
        if not documents:
            train.append(unwrap_lines(text))
            continue
        dropped_count += dropped
        for document in documents:
            (held_out if is_held_out(document, fraction=held_out_fraction) else train).append(document)
    if not any(train) or not held_out:
        raise InvalidArgumentError(
            f"{len(train)} documents to train on and {len(held_out)} held out; "
            f"give text with more documents that end in a line {separator!r}",
            field=field,
        )
    return DocumentSplit(_distinct(train), _distinct(held_out), dropped_count)


def _distinct(documents: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(document for document in documents if document))
