"""Documents of plain text files."""

from __future__ import annotations

from collections.abc import Iterator

from tether_services.recipes.data.lines import GuardedFile, decode_line, read_lines
from tether_services.recipes.data.problems import Dropped, Malformed
from tether_services.recipes.data.records import Place

__all__ = ["read_text_rows", "unwrap_lines"]


def read_text_rows(
    file: GuardedFile, *, source: str, separator: str, max_bytes: int
) -> Iterator[tuple[Place, str] | Malformed | Dropped]:
    """Yield the documents of a text file with the line on which each begins.

    A separator line ends a document, and text after the last one is unfinished and dropped. A file without separators
    is one hard-wrapped document and gets one line for each paragraph. A document of more than `max_bytes` is divided at
    the next blank line; a document with a line that cannot be read loses that line only.
    """
    held: list[str] = []
    first_line, num_held, is_separated = 1, 0, False
    for line in read_lines(file, source=source, max_bytes=max_bytes):
        text = line if isinstance(line, Malformed) else decode_line(line, source=source)
        if isinstance(text, Malformed):
            yield text
            continue
        is_end = text.strip() == separator
        is_separated |= is_end
        if is_end or (num_held > max_bytes and not text.strip()):
            yield from _document(Place(source, first_line), held, is_wrapped=not is_separated)
            held, num_held = [], 0
        elif held or text.strip():
            first_line = first_line if held else file.line - 1
            held.append(text)
            num_held += len(text)
    if is_separated and held:
        yield Dropped("unfinished")
    else:
        yield from _document(Place(source, first_line), held, is_wrapped=True)


def _document(place: Place, lines: list[str], *, is_wrapped: bool) -> Iterator[tuple[Place, str]]:
    text = unwrap_lines(lines) if is_wrapped else "\n".join(lines).strip()
    if text:
        yield place, text


def unwrap_lines(lines: list[str]) -> str:
    """Return hard-wrapped lines as one line for each paragraph; blank lines separate paragraphs."""
    paragraphs: list[list[str]] = [[]]
    for line in lines:
        words = line.split()
        if words:
            paragraphs[-1].extend(words)
        elif paragraphs[-1]:
            paragraphs.append([])
    return "\n".join(" ".join(words) for words in paragraphs if words)
