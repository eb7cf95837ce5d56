"""The elements of a JSON array, one by one: a file of any size in little memory, each element with its line."""

from __future__ import annotations

import re
from collections.abc import Iterator

from tether_services.recipes.data.lines import CHUNK_BYTES, GuardedFile, Line
from tether_services.recipes.data.problems import Malformed
from tether_services.recipes.data.records import Place

__all__ = ["read_elements"]

OUTSIDE_TEXT = re.compile(rb'["\[\]{},]')
INSIDE_TEXT = re.compile(rb'["\\]')
SPACE = b" \t\r\n"


class _Cutter:
    """Finds the commas between the elements; it only tells text from structure and counts brackets."""

    def __init__(self, *, source: str, max_bytes: int) -> None:
        self._source, self._max_bytes = source, max_bytes
        self._depth = 0
        self._in_text = False
        self._skip = 0
        """Bytes of the next chunk that a backslash takes the meaning of."""
        self._held: list[bytes] = []
        self._num_held = 0
        self._num_elements = 0
        self._line = 1
        """Line on which the element that is held begins, blank lines before it included."""
        self.is_closed = False
        self.rest = b""
        """What follows the array in the chunk that closed it."""

    def feed(self, chunk: bytes) -> Iterator[Line | Malformed]:
        """Yield the elements that end in a chunk."""
        start, position, self._skip = 0, self._skip, 0
        while found := (INSIDE_TEXT if self._in_text else OUTSIDE_TEXT).search(chunk, position):
            position, mark = found.end(), found.group()
            if mark == b"\\":
                position += 1
                self._skip = max(0, position - len(chunk))
            elif self._ends_element(mark):
                self._hold(chunk[start : found.start()])
                start = position
                yield from self._release()
                if self.is_closed:
                    self.rest = chunk[start:]
                    return
            elif mark == b"[" and self._depth == 1:
                self._count_lines(chunk[start:position])
                start = position
        self._hold(chunk[start:])

    def _ends_element(self, mark: bytes) -> bool:
        """Take note of a mark and return whether an element ends there."""
        if mark == b'"':
            self._in_text = not self._in_text
        elif mark in b"[{":
            self._depth += 1
        elif mark in b"]}":
            self._depth -= 1
            self.is_closed = self._depth == 0
            return self.is_closed
        return mark == b"," and self._depth == 1

    def _hold(self, piece: bytes) -> None:
        self._num_held += len(piece)
        # Of an element that is too long the first piece stays for its place, the rest only to count its lines.
        is_too_long = self._num_held > self._max_bytes and self._held
        self._held.append(b"\n" * piece.count(b"\n") if is_too_long else piece)

    def _count_lines(self, piece: bytes) -> None:
        self._line += piece.count(b"\n")

    def _release(self) -> Iterator[Line | Malformed]:
        content, num_held = b"".join(self._held), self._num_held
        self._held, self._num_held = [], 0
        body = content.lstrip(SPACE)
        number = self._line + content[: len(content) - len(body)].count(b"\n")
        self._count_lines(content)
        body = body.rstrip(SPACE)
        is_empty_array = self.is_closed and not self._num_elements and not body
        self._num_elements += 1
        if num_held > self._max_bytes:
            yield Malformed(Place(self._source, number), "row_too_long", f"more than {self._max_bytes} bytes")
        elif not is_empty_array:
            yield Line(number, body)


def read_elements(file: GuardedFile, *, source: str, max_bytes: int) -> Iterator[Line | Malformed]:
    """Yield the text of each element of the array that a file holds, with the line on which it begins.

    Raises:
        InvalidArgumentError: The array is not closed, or something follows it: what was read cannot be trusted then.
    """
    cutter = _Cutter(source=source, max_bytes=max_bytes)
    while not cutter.is_closed:
        chunk = file.read(CHUNK_BYTES)
        if not chunk:
            raise file.refuse("the JSON array is not closed; the file is cut off or a quotation mark is missing")
        yield from cutter.feed(chunk)
    rest = cutter.rest
    while rest:
        if rest.strip(SPACE):
            raise file.refuse("text follows the JSON array")
        rest = file.read(CHUNK_BYTES)
