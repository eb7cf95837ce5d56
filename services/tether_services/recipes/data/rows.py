"""The rows of a source, one by one: every kind of file, folder and data set gives the same thing."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from tether.errors import InvalidArgumentError
from tether_services.recipes.data.hub import read_dataset
from tether_services.recipes.data.json_array import read_elements
from tether_services.recipes.data.lines import GuardedFile, Line, decode_line, open_guarded, read_lines
from tether_services.recipes.data.problems import Dropped, Malformed, RowError
from tether_services.recipes.data.records import Place
from tether_services.recipes.data.text_file import read_text_rows
from tether_services.recipes.data.wording import tidy_spacing

__all__ = ["FILE_SUFFIXES", "Row", "RowLimits", "is_file_name", "read_rows"]

LABEL_BY_SUFFIX = {".pos": 1, ".neg": 0}
"""Text files whose name says the label of every line."""


@dataclass(frozen=True, slots=True)
class Row:
    """A row as it was found."""

    place: Place
    value: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class RowLimits:
    """How a source is read."""

    max_row_bytes: int
    """Longer lines, elements and rows are malformed."""
    max_rows: int | None
    """Rows of one source at most; None: all."""
    separator: str
    """The line that ends a document in a text file."""
    field: str
    """The setting that names the source, for errors."""


Found = Row | Malformed | Dropped
Reader = Callable[[GuardedFile, str, RowLimits], Iterator[Found]]


def read_rows(source: str, limits: RowLimits) -> Iterator[Found]:
    """Yield the rows of a file, a folder of data files, or a data set on a hub, and what is malformed.

    Raises:
        InvalidArgumentError: The source cannot be read, or the file as a whole is broken; names the file and line.
    """
    rows = _read_file(source, limits) if os.path.isfile(source) else _read_data_set(source, limits)
    return islice(rows, limits.max_rows)


def is_file_name(source: str) -> bool:
    """Return whether a source ends as data files do; no hub need be asked for it."""
    return source.endswith((*FILE_SUFFIXES, ".gz"))


def _read_file(source: str, limits: RowLimits) -> Iterator[Found]:
    path = Path(source)
    suffix = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    if suffix == ".parquet":
        yield from _read_data_set(source, limits)
        return
    reader = READERS.get(suffix.lower())
    if reader is None:
        raise InvalidArgumentError(
            f"{source} must end in {', '.join(FILE_SUFFIXES)}, or that and .gz", field=limits.field
        )
    with open_guarded(path, source=source, field=limits.field) as file:
        yield from reader(file, source, limits)


def _read_data_set(source: str, limits: RowLimits) -> Iterator[Found]:
    if not os.path.exists(source) and is_file_name(source):
        raise InvalidArgumentError(f"there is no file {source}", field=limits.field)
    for number, value in enumerate(read_dataset(source, field=limits.field), start=1):
        place = Place(source, number)
        if _count_text(value) > limits.max_row_bytes:
            yield Malformed(place, "row_too_long", f"more than {limits.max_row_bytes} characters")
        else:
            yield Row(place, value)


def _count_text(value: object) -> int:
    """Return the characters of all texts in nested lists and dictionaries."""
    waiting, count = [value], 0
    while waiting:
        item = waiting.pop()
        if isinstance(item, str):
            count += len(item)
        elif isinstance(item, Mapping):
            waiting.extend(item.values())
        elif isinstance(item, list | tuple):
            waiting.extend(item)
    return count


def _read_json_lines(file: GuardedFile, source: str, limits: RowLimits) -> Iterator[Found]:
    yield from _parse_lines(read_lines(file, source=source, max_bytes=limits.max_row_bytes), source=source)


def _read_json(file: GuardedFile, source: str, limits: RowLimits) -> Iterator[Found]:
    """Yield the rows of a file with one JSON array or with a JSON object on each line."""
    if not file.peek().lstrip().startswith(b"["):
        yield from _read_json_lines(file, source, limits)
        return
    elements = read_elements(file, source=source, max_bytes=limits.max_row_bytes)
    yield from _parse_lines(elements, source=source, are_elements=True)


def _parse_lines(lines: Iterator[Line | Malformed], *, source: str, are_elements: bool = False) -> Iterator[Found]:
    """Yield a row for each line; blank lines, unlike blank elements, mean nothing."""
    for line in lines:
        if isinstance(line, Malformed):
            yield line
        elif are_elements or line.content.strip():
            yield _parse_line(line, source=source)


def _parse_line(line: Line, *, source: str) -> Row | Malformed:
    place, text = Place(source, line.number), decode_line(line, source=source)
    if isinstance(text, Malformed):
        return text
    try:
        return Row(place, parse_object(text))
    except RowError as error:
        return Malformed(place, error.reason, error.detail)


def parse_object(text: str) -> dict[str, object]:
    """Return the JSON object that a text spells.

    Raises:
        RowError: bad_json, too_deep, duplicate_key (which value counts would be a guess), or not_an_object.
    """
    try:
        value = json.loads(text, object_pairs_hook=_refuse_duplicate_keys)
    except RecursionError as error:
        raise RowError("too_deep") from error
    except json.JSONDecodeError as error:
        raise RowError("bad_json", f"{error.msg} at character {error.pos + 1}") from error
    except ValueError as error:  # a number of thousands of digits
        raise RowError("bad_json", "a number is too long") from error
    if not isinstance(value, dict):
        raise RowError("not_an_object", f"it is a {type(value).__name__}")
    return value


def _refuse_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise RowError("duplicate_key")
    return value


def _read_csv(file: GuardedFile, source: str, limits: RowLimits) -> Iterator[Found]:
    """Yield the rows of a CSV file with a header; a record may span lines.

    A broken record counts as many rows as it has lines, so that a missing quotation mark cannot hide a loss. Fields end
    at the 128 KiB of the csv module.
    """
    skipped: list[Malformed] = []
    records = csv.reader(_csv_lines(file, source, limits, skipped), strict=True)
    header: list[str] | None = None
    last_line = 0
    while True:
        first_line = last_line + 1
        try:
            fields = next(records, None)
            problem = None
        except csv.Error as error:
            fields, problem = [], str(error)
        last_line = records.line_num
        if fields and skipped:
            problem = "a line of it cannot be read"
        yield from skipped
        skipped.clear()
        if fields is None:
            return
        if header is None:
            header = _check_header(fields, source=source, field=limits.field)
        elif fields or problem:
            place = Place(source, first_line)
            yield _parse_record(fields, header, place=place, problem=problem, num_lines=last_line - first_line + 1)


def _csv_lines(file: GuardedFile, source: str, limits: RowLimits, skipped: list[Malformed]) -> Iterator[str]:
    """Yield the lines for the csv module, a blank one for each that cannot be read, so that its count stays right."""
    for line in read_lines(file, source=source, max_bytes=limits.max_row_bytes):
        text = line if isinstance(line, Malformed) else decode_line(line, source=source)
        if isinstance(text, Malformed):
            skipped.append(text)
        yield "\n" if isinstance(text, Malformed) else text + "\n"


def _check_header(fields: list[str], *, source: str, field: str) -> list[str]:
    header = [name.strip() for name in fields]
    if not header or not all(header) or len(set(header)) < len(header):
        raise InvalidArgumentError(f"{source}:1: the first line must name every column once", field=field)
    return header


def _parse_record(
    fields: list[str], header: list[str], *, place: Place, problem: str | None, num_lines: int
) -> Row | Malformed:
    if problem:
        return Malformed(place, "bad_csv", problem, num_rows=num_lines)
    if len(fields) != len(header):
        return Malformed(place, "bad_csv", f"{len(fields)} fields under {len(header)} columns", num_rows=num_lines)
    return Row(place, dict(zip(header, fields, strict=True)))


def _read_text(file: GuardedFile, source: str, limits: RowLimits) -> Iterator[Found]:
    rows = read_text_rows(file, source=source, separator=limits.separator, max_bytes=limits.max_row_bytes)
    for row in rows:
        yield Row(row[0], {"text": row[1]}) if isinstance(row, tuple) else row


def _read_labelled_lines(file: GuardedFile, source: str, limits: RowLimits) -> Iterator[Found]:
    """Yield a labelled row for each line of a .pos or .neg file."""
    label = LABEL_BY_SUFFIX[next(part for part in reversed(Path(source).suffixes) if part in LABEL_BY_SUFFIX)]
    for line in read_lines(file, source=source, max_bytes=limits.max_row_bytes):
        text = line if isinstance(line, Malformed) else decode_line(line, source=source)
        if isinstance(text, Malformed):
            yield text
        elif text.strip():
            assert isinstance(line, Line)
            yield Row(Place(source, line.number), {"text": tidy_spacing(text), "label": label})


READERS: dict[str, Reader] = {
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".txt": _read_text,
    ".pos": _read_labelled_lines,
    ".neg": _read_labelled_lines,
}
FILE_SUFFIXES = (*READERS, ".parquet")
