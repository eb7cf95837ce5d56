"""Files as they come: line ends, marks, encodings, gzip, arrays of any size, text and labels."""

from __future__ import annotations

import codecs
import gzip
import json
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.unit.data_inputs import GOOD_ROWS, data_config, write_rows
from tether.errors import InvalidArgumentError
from tether_services.recipes.data import lines
from tether_services.recipes.data.problems import Dropped, Malformed
from tether_services.recipes.data.records import Document, LabelledText
from tether_services.recipes.data.rows import Row, RowLimits, read_rows
from tether_services.recipes.data.text_file import unwrap_lines

LIMITS = RowLimits(max_row_bytes=2000, max_rows=None, separator="<|endoftext|>", field="sources")


def read(path: Path, **limits: Any) -> list[Any]:
    """Return the rows, each as (line, value) or (line, reason)."""
    found = read_rows(str(path), RowLimits(**{**{n: getattr(LIMITS, n) for n in LIMITS.__slots__}, **limits}))
    return [_seen(item) for item in found]


def _seen(item: Row | Malformed | Dropped) -> tuple[int, Any]:
    if isinstance(item, Dropped):
        return 0, item.reason
    return item.place.row, item.value if isinstance(item, Row) else item.reason


def refusal(path: Path) -> str:
    """Return the message with which a file is refused."""
    with pytest.raises(InvalidArgumentError) as caught:
        read(path)
    assert caught.value.violations[0].field == "sources"
    return caught.value.message


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_line_ends_marks_and_gzip_make_no_difference(
    tmp_path: Path, end: str, mark: bytes, pack: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / ("rows.jsonl" if pack is bytes else "rows.jsonl.gz")
    path.write_bytes(pack(mark + end.join(['{"text": "a"}', "", " ", '{"text": "b\\u00e9"}']).encode()))
    assert read(path) == [(1, {"text": "a"}), (4, {"text": "b\u00e9"})]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_a_utf16_file_is_refused_at_its_first_line_or_all_rows_are_malformed(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes('{"text": "a"}\n'.encode(encoding))
    if encoding == "utf-16":
        assert "rows.jsonl:1: is UTF-16; convert it to UTF-8" in refusal(path)
    else:
        assert {reason for _, reason in read(path)} == {"bad_json"}


def test_a_cut_off_gzip_file_is_refused_with_the_line_reached(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    rows = "".join(json.dumps({"text": os.urandom(300).hex()}) + "\n" for _ in range(1000))
    path.write_bytes(gzip.compress(rows.encode())[:-1000])
    line = int(refusal(path).split("rows.jsonl.gz:")[1].split(":")[0])
    assert 900 < line <= 1000


@pytest.mark.parametrize("content", [b"no gzip at all", b""])
def test_a_file_that_is_no_gzip_gives_no_rows_or_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(content)
    if content:
        assert "cannot be read on" in refusal(path)
    else:
        assert read(path) == []


def test_a_gzip_bomb_is_refused_before_it_has_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "FREE_BYTES", 1 << 20)
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(b" " * (64 << 20)))
    assert f"unpacks to more than {200 * path.stat().st_size} bytes" in refusal(path)


def test_repetitive_rows_that_pack_well_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "FREE_BYTES", 1 << 10)
    path = tmp_path / "rows.jsonl.gz"
    write_rows(path, [{"text": f"story {n} " + os.urandom(8).hex()} for n in range(2000)])
    assert len(read(path)) == 2000


@pytest.mark.parametrize("array", [False, True])
def test_a_row_of_any_length_is_skipped_without_being_held(tmp_path: Path, array: bool) -> None:
    path = tmp_path / ("rows.json" if array else "rows.jsonl")
    rows = ['{"text": "a"}', '{"text": "' + "x" * 30_000_000 + '"}', '{"text": "b"}']
    path.write_text("[" + ",\n".join(rows) + "]" if array else "\n".join(rows), encoding="utf-8")
    del rows
    tracemalloc.start()
    found = read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == [(1, {"text": "a"}), (2, "row_too_long"), (3, {"text": "b"})]
    assert peak < 3_000_000


def test_a_row_exactly_as_long_as_allowed_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    exact = json.dumps({"text": "x" * (2000 - len('{"text": ""}'))})
    path.write_bytes(f'{exact}\r\n{exact[:-2]}xx"}}\r\n{exact}\n{exact}'.encode())
    assert [row if isinstance(row[1], str) else row[0] for row in read(path)] == [1, (2, "row_too_long"), 3, 4]


def test_an_element_exactly_as_long_as_allowed_is_kept(tmp_path: Path) -> None:
    exact = json.dumps({"text": "x" * (2000 - len('{"text": ""}'))})
    path = write_array(tmp_path / "rows.json", f'[{exact},{exact[:-2]}x"}},{exact}]')
    assert [row[1] if isinstance(row[1], str) else "kept" for row in read(path)] == ["kept", "row_too_long", "kept"]


def test_what_is_no_utf8_is_named_by_its_byte_and_what_is_too_long_by_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "caf\xe9"}\n' + b"x" * 2001)
    found = [str(item) for item in read_rows(str(path), LIMITS)]
    assert found == [
        f"{path}:1: not_utf8 (byte 14 of the line)",
        f"{path}:2: row_too_long (more than 2000 bytes)",
    ]


def test_max_rows_ends_the_reading_of_a_source(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    write_rows(path, [{"text": str(n)} for n in range(10)])
    assert [line for line, _ in read(path, max_rows=3)] == [1, 2, 3]


@pytest.mark.parametrize("name", ["rows.tsv", "rows", "rows.jsonl.zip", "rows.gz", "rows.pkl"])
def test_another_suffix_is_refused_and_the_known_ones_are_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    assert all(suffix in refusal(tmp_path / name) for suffix in (".jsonl", ".csv", ".txt", ".gz"))


@pytest.mark.parametrize("name", ["absent.jsonl", "data/train.csv", "data/a.jsonl.gz", "no/such/folder/rows.json"])
def test_a_file_that_is_not_there_is_refused_by_name_and_not_looked_up_on_a_hub(name: str) -> None:
    assert refusal(Path(name)) == f"there is no file {name}"


def test_a_name_that_nothing_can_have_is_refused() -> None:
    assert "is no file, no folder, and no data set name" in refusal(Path("rows\0.jso"))


# JSON arrays


def write_array(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_elements_of_an_array_have_the_line_on_which_they_begin(tmp_path: Path) -> None:
    rows: list[Any] = [
        {"text": 'a "quoted" [b], {c}\\'},
        {"text": "line\nbreak", "more": [1, [2, {"x": []}]]},
        {"text": "\u00e9"},
    ]
    text = json.dumps(rows, indent=2)
    found = read(write_array(tmp_path / "rows.json", "\n" + text))
    assert [value for _, value in found] == rows
    starts = [number for number, line in enumerate(("\n" + text).split("\n"), start=1) if line == "  {"]
    assert [line for line, _ in found] == starts


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_the_size_of_the_chunks_changes_nothing(tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"text": '\\" , [ { \\\\'}, {"a": {"b": ["]", "}"]}}, {"text": "x\\"}]
    path = write_array(tmp_path / "rows.json", json.dumps(rows, indent=1))
    monkeypatch.setattr("tether_services.recipes.data.json_array.CHUNK_BYTES", size)
    assert [value for _, value in read(path)] == rows


def test_broken_elements_are_counted_and_the_others_stay(tmp_path: Path) -> None:
    path = write_array(tmp_path / "rows.json", '[{"a": 1},\n{"a" 2},\n3,\n{"a": 4} {"a": 5},\n{"a": 6},\n]')
    assert read(path) == [
        (1, {"a": 1}), (2, "bad_json"), (3, "not_an_object"), (4, "bad_json"), (5, {"a": 6}), (6, "bad_json")
    ]  # fmt: skip


@pytest.mark.parametrize("text", ["[]", " [ ] \n"])
def test_an_empty_array_has_no_rows(tmp_path: Path, text: str) -> None:
    assert read(write_array(tmp_path / "rows.json", text)) == []


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('[{"a": 1},\n{"a": 2}', ":2: the JSON array is not closed"),
        ('[{"a": 1},\n{"a: 2}]\n', ":3: the JSON array is not closed"),
        ("[", ":1: the JSON array is not closed"),
        ('[{"a": 1}]\n{"a": 2}', ":2: text follows the JSON array"),
        ('[{"a": 1}]]', ":1: text follows the JSON array"),
    ],
)
def test_an_array_that_cannot_be_trusted_as_a_whole_is_refused(tmp_path: Path, text: str, problem: str) -> None:
    assert "rows.json" + problem in refusal(write_array(tmp_path / "rows.json", text))


def test_a_json_file_may_also_hold_a_row_on_each_line(tmp_path: Path) -> None:
    assert read(write_array(tmp_path / "rows.json", '{"a": 1}\n{"a": 2}\n')) == [(1, {"a": 1}), (2, {"a": 2})]


# Text


def test_separated_documents_keep_their_lines_and_the_unfinished_one_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "stories.txt"
    path.write_text(
        "\nOne.\nTwo.\n<|endoftext|>\n<|endoftext|>\nThree.\n <|endoftext|> \nunfinished\n", encoding="utf-8"
    )
    found = list(read_rows(str(path), LIMITS))
    assert [(row.place.row, row.value["text"]) for row in found if isinstance(row, Row)] == [
        (2, "One.\nTwo."),
        (6, "Three."),
    ]
    assert [item.reason for item in found if not isinstance(item, Row)] == ["unfinished"]


def test_a_separator_inside_a_line_is_text(tmp_path: Path) -> None:
    path = tmp_path / "stories.txt"
    path.write_text("a <|endoftext|> b\n<|endoftext|>\n", encoding="utf-8")
    assert read(path) == [(1, {"text": "a <|endoftext|> b"})]
    assert read(path, separator="a <|endoftext|> b") == [(0, "unfinished")]


def test_a_file_without_separators_is_one_document_of_unwrapped_paragraphs(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("THE BOOK\n\nIt was\n  a dark night.\n\n\nThe end.\n", encoding="utf-8")
    assert read(path) == [(1, {"text": "THE BOOK\nIt was a dark night.\nThe end."})]


def test_a_long_book_is_divided_at_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    paragraphs = [f"Paragraph {n} " + "word " * 60 for n in range(30)]
    path.write_text("\n\n".join(paragraphs), encoding="utf-8")
    found = read(path)
    assert len(found) > 3
    assert all(len(value["text"]) < 2000 + 400 for _, value in found)
    assert " ".join(value["text"] for _, value in found).split() == " ".join(paragraphs).split()


def test_a_line_of_a_story_that_is_no_utf8_is_counted_and_left_out(tmp_path: Path) -> None:
    path = tmp_path / "stories.txt"
    path.write_bytes(b"One.\ncaf\xe9\nTwo.\n<|endoftext|>\n")
    assert read(path) == [(2, "not_utf8"), (1, {"text": "One.\nTwo."})]


def test_blank_lines_part_paragraphs() -> None:
    assert unwrap_lines(["", "a", "b", "", "", "c", ""]) == "a b\nc"


# Labels


def test_csv_rows_keep_quoted_commas_quotes_and_line_breaks(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('label,sentence\n1,"Funny, warm and ""real"""\n\n0,"Dull\nfilm"\n1,Fine.\n', encoding="utf-8")
    assert [(line, value["label"], value["sentence"]) for line, value in read(path)] == [
        (2, "1", 'Funny, warm and "real"'), (4, "0", "Dull\nfilm"), (6, "1", "Fine.")
    ]  # fmt: skip


@pytest.mark.parametrize("suffix", [".pos", ".neg", ".pos.gz"])
def test_pos_and_neg_files_label_every_line_and_get_ordinary_spacing(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rt{suffix}"
    text = b'a new " conan " film , warm . \n\ndull\n'
    path.write_bytes(gzip.compress(text) if suffix.endswith("gz") else text)
    label = 0 if suffix == ".neg" else 1
    assert read(path) == [
        (1, {"text": 'a new "conan" film, warm.', "label": label}),
        (3, {"text": "dull", "label": label}),
    ]


def test_records_name_the_place_that_they_come_from(tmp_path: Path) -> None:
    from tether_services.recipes.data.reading import read_parts

    rows, labels = tmp_path / "rows.jsonl", tmp_path / "rows.pos"
    write_rows(rows, ["", GOOD_ROWS["text"]])
    labels.write_text("fine\n", encoding="utf-8")
    [texts], [labelled] = (read_parts(data_config(str(path)), kind=None) for path in (rows, labels))
    assert isinstance(texts.records[0], Document) and str(texts.records[0].place) == f"{rows}:2"
    assert labelled.records == [LabelledText("fine", 1, place=texts.records[0].place)]


def test_a_malformed_row_reads_as_one_line() -> None:
    from tether_services.recipes.data.records import Place

    assert str(Malformed(Place("a.jsonl", 7), "bad_json", "at 3")) == "a.jsonl:7: bad_json (at 3)"
