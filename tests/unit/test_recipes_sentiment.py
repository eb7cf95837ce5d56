"""Labelled sentences: formats, overlap and the variants shown in training."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tether.errors import InvalidArgumentError
from tether_services.recipes.sentiment import (
    LabelledText,
    join_sentences,
    overlap_key,
    read_labelled,
    remove_overlap,
    tidy_spacing,
    vary_case,
)


def test_csv_rows_keep_quoted_commas_and_quotes(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('label,sentence\n1,"Funny, warm and ""real"""\n0,Dull.\n', encoding="utf-8")
    assert read_labelled([path], field="train_files") == [
        LabelledText('Funny, warm and "real"', 1),
        LabelledText("Dull.", 0),
    ]


def test_pos_and_neg_files_label_every_line(tmp_path: Path) -> None:
    (tmp_path / "rt.pos").write_text("warm and funny . \n\n", encoding="utf-8")
    (tmp_path / "rt.neg").write_text("dull , slow . \n", encoding="utf-8")
    items = read_labelled([tmp_path / "rt.pos", tmp_path / "rt.neg"], field="train_files")
    assert items == [LabelledText("warm and funny.", 1), LabelledText("dull, slow.", 0)]


@pytest.mark.parametrize("row", ["2,text", ",text", "1,", "1,  ", "positive,text"])
def test_a_bad_row_is_named_by_number(tmp_path: Path, row: str) -> None:
    path = tmp_path / "a.csv"
    path.write_text(f"label,sentence\n1,fine\n{row}\n", encoding="utf-8")
    with pytest.raises(InvalidArgumentError, match=r"row 3 of a\.csv") as caught:
        read_labelled([path], field="train_files")
    assert caught.value.violations[0].field == "train_files"


def test_other_column_names_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("class,text\n1,fine\n", encoding="utf-8")
    with pytest.raises(InvalidArgumentError, match="columns of those names"):
        read_labelled([path], field="train_files")


def test_another_file_type_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text("1\tfine\n", encoding="utf-8")
    with pytest.raises(InvalidArgumentError, match=r"\.csv, \.pos or \.neg"):
        read_labelled([path], field="validation_files")


@pytest.mark.parametrize(
    ("spaced", "tidy"),
    [
        ("it's funny , warm ( and real ) . ", "it's funny, warm (and real)."),
        ('a new " conan " film', 'a new "conan" film'),
        ("one of 'time waster' films !", "one of 'time waster' films!"),
        ("plain words", "plain words"),
    ],
)
def test_spaced_punctuation_becomes_ordinary_spacing(spaced: str, tidy: str) -> None:
    assert tidy_spacing(spaced) == tidy


def test_casing_punctuation_and_spaces_do_not_hide_an_overlap() -> None:
    assert overlap_key("It's  GOOD, really!") == overlap_key("it's good , really")
    assert overlap_key("It is good") != overlap_key("It is bad")


def test_reserved_sentences_are_removed_and_counted() -> None:
    items = [LabelledText("Good , film .", 1), LabelledText("Bad film", 0), LabelledText("Fine", 1)]
    kept, count = remove_overlap(items, reserved=[LabelledText("good film", 1)])
    assert (kept, count) == (items[1:], 1)


def test_of_equal_sentences_the_first_label_stays() -> None:
    items = [LabelledText("A film.", 1), LabelledText("a film", 0)]
    assert remove_overlap(items, reserved=[]) == ([items[0]], 0)


def test_case_variants_keep_the_words_and_all_occur() -> None:
    rng = random.Random(0)
    seen = {vary_case("warm and Real", rng=rng) for _ in range(50)}
    assert seen == {"warm and Real", "warm and real", "Warm and Real"}


def test_joined_sentences_are_separated_by_a_mark() -> None:
    assert join_sentences(["One", "Two!", "three"]) == "One. Two! three"
    assert join_sentences(["Alone"]) == "Alone"
