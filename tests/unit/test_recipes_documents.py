"""Plain text files as documents."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from tether.errors import InvalidArgumentError
from tether_services.recipes.documents import is_held_out, read_documents, split_text, unwrap_lines

SEPARATOR = "<|endoftext|>"


def write_stories(path: Path, stories: list[str], *, unfinished: str = "") -> Path:
    path.write_text("".join(f"{story}\n{SEPARATOR}\n" for story in stories) + unfinished, encoding="utf-8")
    return path


def test_separator_lines_end_documents() -> None:
    assert split_text(f"one\ntwo\n{SEPARATOR}\nthree\n{SEPARATOR}\n", separator=SEPARATOR) == (["one\ntwo", "three"], 0)


def test_text_after_the_last_separator_is_dropped_and_counted() -> None:
    assert split_text(f"one\n{SEPARATOR}\nbroken of", separator=SEPARATOR) == (["one"], 1)


def test_the_separator_inside_a_line_is_text() -> None:
    assert split_text(f"a {SEPARATOR} b\n{SEPARATOR}\n", separator=SEPARATOR) == ([f"a {SEPARATOR} b"], 0)


def test_empty_documents_are_left_out() -> None:
    assert split_text(f"{SEPARATOR}\n\n{SEPARATOR}\nx\n{SEPARATOR}\n", separator=SEPARATOR) == (["x"], 0)


def test_hard_wrapped_lines_become_paragraphs() -> None:
    assert unwrap_lines("TITLE\n\nOne two\nthree.\n\n\n   Four\n five.\n") == "TITLE\nOne two three.\nFour five."


def test_the_split_depends_on_the_text_alone() -> None:
    text = "A story."
    share = int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) / 2**32
    assert is_held_out(text, fraction=share + 1e-6)
    assert not is_held_out(text, fraction=share)


def test_about_the_asked_share_is_held_out(tmp_path: Path) -> None:
    stories = [f"Story number {index}." for index in range(2000)]
    split = read_documents([write_stories(tmp_path / "s.txt", stories)], separator=SEPARATOR, held_out_fraction=0.1)
    assert 150 < len(split.held_out) < 250
    assert sorted([*split.train, *split.held_out]) == sorted(stories)


def test_no_document_is_on_both_sides_even_when_repeated(tmp_path: Path) -> None:
    stories = [f"Story {index % 50}." for index in range(200)]
    split = read_documents([write_stories(tmp_path / "s.txt", stories)], separator=SEPARATOR, held_out_fraction=0.2)
    assert not set(split.train) & set(split.held_out)
    assert len(split.train) + len(split.held_out) == 50


def test_a_file_without_separator_is_one_training_document(tmp_path: Path) -> None:
    stories = write_stories(tmp_path / "s.txt", [f"Story {index}." for index in range(40)], unfinished="brok")
    book = tmp_path / "book.txt"
    book.write_text("The book\nhas wrapped\nlines.\n\nAnd a paragraph.\n", encoding="utf-8")
    split = read_documents([stories, book], separator=SEPARATOR, held_out_fraction=0.2)
    assert split.train[-1] == "The book has wrapped lines.\nAnd a paragraph."
    assert split.dropped_count == 1


def test_files_without_anything_to_hold_out_name_the_field(tmp_path: Path) -> None:
    book = tmp_path / "book.txt"
    book.write_text("Only a book.\n", encoding="utf-8")
    with pytest.raises(InvalidArgumentError, match="0 held out") as caught:
        read_documents([book], separator=SEPARATOR, held_out_fraction=0.1)
    assert caught.value.violations[0].field == "text_files"


def test_a_missing_file_names_the_path_and_the_field(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match=r"absent\.txt") as caught:
        read_documents([tmp_path / "absent.txt"], separator=SEPARATOR, held_out_fraction=0.1, field="some_files")
    assert caught.value.violations[0].field == "some_files"


def test_bytes_that_are_not_utf8_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes(b"caf\xe9")
    with pytest.raises(InvalidArgumentError, match="UTF-8"):
        read_documents([path], separator=SEPARATOR, held_out_fraction=0.1)
