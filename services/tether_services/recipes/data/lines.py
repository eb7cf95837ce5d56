"""Files as numbered lines of text, whatever is in them: long lines, other encodings, broken or malicious gzip."""

from __future__ import annotations

import codecs
import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from tether.errors import InvalidArgumentError
from tether_services.recipes.data.problems import Malformed
from tether_services.recipes.data.records import Place

__all__ = ["GuardedFile", "Line", "decode_line", "open_guarded", "read_lines"]

CHUNK_BYTES = 1 << 16
FREE_BYTES = 64 * 1024 * 1024
"""A gzip file may always unpack to this."""
MAX_UNPACK_RATIO = 200
"""Beyond `FREE_BYTES`, a gzip file may unpack to this many times its size; text packs 3 to 20 times."""


@dataclass(frozen=True, slots=True)
class Line:
    """A line without its end."""

    number: int
    """From 1."""
    content: bytes


class GuardedFile:
    """A file open for reading that turns every failure into an error which names it."""

    def __init__(self, file: io.BufferedReader[Any], *, source: str, field: str, max_bytes: int | None) -> None:
        """Wrap an open file.

        Args:
            file: Open for reading bytes.
            source: Its name, for errors.
            field: The setting that names it, for errors.
            max_bytes: It may not give more than this; None for a file that is not packed.
        """
        self._file, self._source, self._field, self._max_bytes = file, source, field, max_bytes
        self._num_bytes = 0
        self.line = 1
        """Line that is read next."""

    def read(self, size: int) -> bytes:
        """Return up to `size` bytes, none at the end of the file."""
        return self._guard(lambda: self._file.read(size))

    def read_line(self, size: int) -> bytes:
        """Return the rest of the line with its end, or `size` bytes of it."""
        return self._guard(lambda: self._file.readline(size))

    def peek(self) -> bytes:
        """Return some of the next bytes, which stay to be read."""
        return self._guard(lambda: self._file.peek(CHUNK_BYTES), is_taken=False)

    def refuse(self, problem: str) -> InvalidArgumentError:
        """Return the error for a file that cannot be read on, with the line."""
        return InvalidArgumentError(f"{self._source}:{self.line}: {problem}", field=self._field)

    def _guard(self, read: Callable[[], bytes], *, is_taken: bool = True) -> bytes:
        try:
            content = read()
        except (OSError, EOFError, zlib.error) as error:
            raise self.refuse(f"cannot be read on: {str(error) or type(error).__name__}") from error
        if not is_taken:
            return content
        self._num_bytes += len(content)
        if self._max_bytes is not None and self._num_bytes > self._max_bytes:
            raise self.refuse(f"unpacks to more than {self._max_bytes} bytes; unpack the file yourself if it is sound")
        self.line += content.count(b"\n")
        return content


@contextmanager
def open_guarded(path: Path, *, source: str, field: str) -> Iterator[GuardedFile]:
    """Yield an open file, unpacked where its name ends in .gz, behind its byte-order mark.

    Raises:
        InvalidArgumentError: It cannot be opened, or is UTF-16.
    """
    is_packed = path.suffix == ".gz"
    try:
        limit = max(FREE_BYTES, MAX_UNPACK_RATIO * path.stat().st_size) if is_packed else None
        file = path.open("rb")
    except OSError as error:
        raise InvalidArgumentError(f"cannot open {source}: {error}", field=field) from error
    with file:
        unpacked = io.BufferedReader(cast(io.RawIOBase, gzip.GzipFile(fileobj=file))) if is_packed else file
        guarded = GuardedFile(unpacked, source=source, field=field, max_bytes=limit)
        _skip_mark(guarded)
        yield guarded


def _skip_mark(file: GuardedFile) -> None:
    start = file.peek()
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise file.refuse("is UTF-16; convert it to UTF-8")
    if start.startswith(codecs.BOM_UTF8):
        file.read(len(codecs.BOM_UTF8))


def read_lines(file: GuardedFile, *, source: str, max_bytes: int) -> Iterator[Line | Malformed]:
    """Yield the lines of a file without their ends; of one that is too long no more than `max_bytes` is ever held."""
    while True:
        number = file.line
        content = file.read_line(max_bytes + 2)  # room for a line end of two bytes
        if not content:
            return
        line = content.rstrip(b"\r\n") if content.endswith(b"\n") else content
        if len(line) <= max_bytes:
            yield Line(number, line)
            continue
        while not content.endswith(b"\n") and content:
            content = file.read_line(CHUNK_BYTES)
        yield Malformed(Place(source, number), "row_too_long", f"more than {max_bytes} bytes")


def decode_line(line: Line, *, source: str) -> str | Malformed:
    """Return the text of a line, or what is wrong with it."""
    try:
        return line.content.decode("utf-8")
    except UnicodeDecodeError as error:
        return Malformed(Place(source, line.number), "not_utf8", f"byte {error.start + 1} of the line")
