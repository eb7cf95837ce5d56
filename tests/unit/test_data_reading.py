"""What a stage gets: records of one kind, checked, counted, and divided by prompt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.unit.data_inputs import GOOD_ROWS, data_config, pair, shared_file, write_rows
from tether.errors import InvalidArgumentError
from tether_services.recipes.config import DataConfig
from tether_services.recipes.data.reading import (
    read_all_demonstrations,
    read_demonstrations,
    read_documents,
    read_labelled,
    read_parts,
    read_rankings,
)
from tether_services.recipes.data.records import Demonstration, LabelledText, Place, Ranking
from tether_services.recipes.data.shapes import Record
from tether_services.recipes.data.splitting import identity, split_key
from tether_services.recipes.data.wording import overlap_key, tidy_spacing

PLACE = Place("rows", 1)


def refusal(read: Any, config: DataConfig) -> InvalidArgumentError:
    with pytest.raises(InvalidArgumentError) as caught:
        read(config)
    return caught.value


# Repeats


def test_repeated_records_are_dropped_and_counted_within_and_across_files(tmp_path: Path) -> None:
    first = write_rows(tmp_path / "a.jsonl", [pair(0), pair(1), pair(0), {**pair(0), "margin": 1.0}])
    second = write_rows(tmp_path / "b.jsonl.gz", [pair(1), pair(2)])
    data = read_rankings(data_config(first, second, validation_sources=(write_rows(tmp_path / "c.jsonl", [pair(9)]),)))
    assert [str(record.place) for record in data.train] == [f"{first}:1", f"{first}:2", f"{first}:4", f"{second}:2"]
    assert data.report.dropped == {"duplicate": 2}


def test_the_order_of_ranked_answers_makes_no_other_record_and_their_levels_do() -> None:
    one = Ranking("Hi", ("a", "b"), (1.0, 0.0), PLACE)
    assert identity(one) == identity(Ranking("Hi", ("b", "a"), (0.0, 1.0), Place("x", 2)))
    assert identity(one) == identity(Ranking("Hi", ("a", "b"), (-3.0, -7.0), PLACE))
    others: list[Record] = [
        Ranking("Hi", ("a", "b"), (0.0, 1.0), PLACE),
        Ranking("Ho", ("a", "b"), (1.0, 0.0), PLACE),
        Ranking("Hi", ("a", "b"), (1.0, 0.0), PLACE, margin=1.0),
        Ranking("Hi", ("a", "b"), (3.0, 0.0), PLACE, is_scored=True),
        Demonstration("Hi", "a", PLACE),
    ]
    assert len({identity(record) for record in (one, *others)}) == 6


def test_two_spellings_of_a_sentence_are_one_and_a_contradiction_is_named(tmp_path: Path) -> None:
    rows = [("A good, warm film.", 1), ("a good , warm film .", 1), ("A GOOD WARM FILM", 0), ("Bad.", 0)]
    train = write_rows(tmp_path / "a.jsonl", [{"text": text, "label": label} for text, label in rows])
    dev = write_rows(tmp_path / "b.jsonl", [{"text": "bad !", "label": 1}])
    data = read_labelled(data_config(train, validation_sources=(dev,)))
    assert data.train == [LabelledText("A good, warm film.", 1, PLACE)]
    assert data.report.dropped == {"conflicting_label": 1, "duplicate": 1, "in_validation": 1}


def test_the_key_of_a_text_ignores_case_marks_and_spaces_but_not_words() -> None:
    assert overlap_key("It's  GOOD, really!") == overlap_key("it's good , really") == "itsgoodreally"
    assert overlap_key("\u6620\u753b\u3067\u3059\u3002") == "\u6620\u753b\u3067\u3059"
    assert overlap_key("?!") != overlap_key("!?")


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


# What is refused


def test_too_many_malformed_rows_refuse_the_data_with_share_and_places(tmp_path: Path) -> None:
    rows = [pair(n) for n in range(94)] + ["{"] * 6
    source = write_rows(tmp_path / "rows.jsonl", rows)
    error = refusal(read_rankings, data_config(source, max_malformed_share=0.05))
    assert error.violations[0].field == "sources"
    assert "6 of 100 rows (6.0%) are malformed, more than max_malformed_share = 0.05" in error.message
    assert all(f"{source}:{line}: bad_json" in error.message for line in range(95, 100))
    assert f"{source}:100" not in error.message
    assert read_rankings(data_config(source, max_malformed_share=0.06)).report.malformed == {"bad_json": 6}


def test_malformed_validation_data_names_its_own_setting(tmp_path: Path) -> None:
    good = write_rows(tmp_path / "a.jsonl", [pair(1)])
    bad = write_rows(tmp_path / "b.jsonl", [pair(2), "{"])
    error = refusal(read_rankings, data_config(good, validation_sources=(bad,)))
    assert error.violations[0].field == "validation_sources"


@pytest.mark.parametrize(
    ("read", "shape", "needed"),
    [
        (read_rankings, "instruction", "hh, pairs, ranked, oasst"),
        (read_demonstrations, "text", "instruction, messages, hh, pairs, ranked, oasst"),
        (read_documents, "pairs", "text, labelled"),
        (read_labelled, "text", "labelled"),
    ],
)
def test_rows_of_another_kind_are_refused_and_the_fitting_shapes_named(
    tmp_path: Path, read: Any, shape: str, needed: str
) -> None:
    source = write_rows(tmp_path / "rows.jsonl", [GOOD_ROWS[shape]])
    error = refusal(read, data_config(source))
    assert f"holds rows of the shape {shape}; here one of {needed} is needed" in error.message
    assert error.violations[0].field == "sources"


def test_unknown_rows_are_refused_with_their_keys(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "rows.jsonl", [{"question": "a", "x" * 500: "b"}])
    error = refusal(read_rankings, data_config(source))
    assert "cannot tell the shape of" in error.message and "'question'" in error.message
    assert len(error.message) < 600


def test_a_file_in_which_nothing_can_be_read_says_why(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "rows.jsonl", ["{", "["])
    assert f"no row that can be read; {source}:1: bad_json" in refusal(read_rankings, data_config(source)).message


def test_the_first_telling_row_decides_and_those_before_it_are_malformed(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "rows.jsonl", [{"chosen": "a"}, "{", *(pair(n) for n in range(8))])
    data = read_rankings(data_config(source, max_malformed_share=0.5))
    assert data.report.malformed == {"bad_json": 1, "missing_field": 1}
    assert (data.report.num_rows, data.report.shapes) == (10, {source: "pairs"})


def test_an_empty_part_is_refused_with_the_way_out(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "rows.jsonl", [pair(1)])
    fraction = refusal(read_rankings, data_config(source, validation_fraction=0.001))
    assert fraction.violations[0].field == "validation_fraction" and "validation_sources" in fraction.message
    assert refusal(read_rankings, data_config(source, validation_sources=(source,))).violations[0].field == "sources"


# Kinds


def test_an_error_names_its_setting_where_the_data_is_a_part_of_a_larger_configuration(tmp_path: Path) -> None:
    config = data_config(str(tmp_path / "absent.jsonl"))
    for prefix, field in (("", "sources"), ("data", "data.sources"), ("demonstrations", "demonstrations.sources")):
        with pytest.raises(InvalidArgumentError, match="absent") as caught:
            read_rankings(config, field=prefix)
        assert [violation.field for violation in caught.value.violations] == [field]


def test_the_report_is_json_and_adds_up(tmp_path: Path) -> None:
    rows = [*(pair(n) for n in range(20)), pair(3), {**pair(4), "chosen": "No 4"}, "{"]
    source = write_rows(tmp_path / "rows.jsonl", rows)
    report = read_rankings(data_config(source, max_malformed_share=0.9)).report.as_dict()
    assert json.loads(json.dumps(report)) == report
    assert (report["num_rows"], report["dropped"]) == (23, {"duplicate": 1, "identical_answers": 1})
    assert report["num_train"] + report["num_validation"] == 20
    assert report["first_malformed"][0].startswith("rows.jsonl:23: bad_json")


def test_files_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    paths = [tmp_path / end for end in ("x/one/rows.jsonl", "x/two/rows.jsonl", "y/two/rows.jsonl", "x/other.jsonl")]
    for number, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_rows(path, [*(pair(10 * number + n) for n in range(8)), "{"])
    report = read_rankings(data_config(*map(str, paths), max_malformed_share=0.5)).report.as_dict()
    names = ["one/rows.jsonl", "x/two/rows.jsonl", "y/two/rows.jsonl", "other.jsonl"]
    assert report["shapes"] == dict.fromkeys(names, "pairs")
    assert [place.split(":")[0] for place in report["first_malformed"]] == names


def test_a_home_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_rows(tmp_path / "rows.jsonl", [pair(1)])
    write_rows(tmp_path / "dev.jsonl", [pair(2)])
    config = data_config("~/rows.jsonl", validation_sources=("~/dev.jsonl",))
    assert config.sources == (str(tmp_path / "rows.jsonl"),)
    assert len(read_rankings(config).train) == len(read_rankings(config).validation) == 1
    assert data_config("org/name:train", "./~/x").sources == ("org/name:train", "./~/x")


def test_the_best_answer_of_a_ranking_is_a_demonstration(tmp_path: Path) -> None:
    rows = [{"prompt": f"Q {n}", "answers": ["a", "b", "c"], "scores": [1, 5, 5]} for n in range(12)]
    data = read_demonstrations(data_config(write_rows(tmp_path / "rows.jsonl", rows)))
    assert {record.answer for record in data.train + data.validation} == {"b"}
    assert len(data.train + data.validation) == 12


def test_all_demonstrations_are_read_undivided_and_one_is_enough(tmp_path: Path) -> None:
    rows = [{"prompt": f"Q {n}", "completion": " a"} for n in range(3)]
    first, second = write_rows(tmp_path / "a.jsonl", rows[:1]), write_rows(tmp_path / "b.jsonl", rows)
    assert [d.prompt for d in read_all_demonstrations(data_config(first))] == ["Q 0"]
    both = read_all_demonstrations(data_config(first, validation_sources=(second,)))
    assert [d.prompt for d in both] == ["Q 0", "Q 1", "Q 2"], "those that are in both parts too, once"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["{", {"prompt": "a", "completion": "b"}], r"1 of 2 rows \(50.0%\)"),
        ([{**pair(1), "rejected": "Yes 1"}], "no demonstration is left"),
    ],
)
def test_all_demonstrations_are_checked_like_the_data_of_a_stage(tmp_path: Path, rows: list[Any], message: str) -> None:
    config = data_config(write_rows(tmp_path / "rows.jsonl", rows))
    with pytest.raises(InvalidArgumentError, match=message) as caught:
        read_all_demonstrations(config, field="demonstrations")
    assert caught.value.violations[0].field == "demonstrations.sources"


def test_scores_that_are_all_equal_are_kept_and_equal_ranks_are_not(tmp_path: Path) -> None:
    ranked = {"prompt": "Hi", "answers": ["a", "b"]}
    rows = [{**ranked, "scores": [0.5, 0.5]}, {**ranked, "scores": [0.9, 0.9]}, {**ranked, "ranks": [1, 1]}]
    [part] = read_parts(data_config(write_rows(tmp_path / "rows.jsonl", rows)), kind=Ranking)
    assert [record.levels for record in part.records if isinstance(record, Ranking)] == [(0.5, 0.5), (0.9, 0.9)]
    assert part.tally.dropped == {"only_ties": 1}


def test_the_words_of_labelled_texts_are_documents(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "rows.jsonl", [{"text": f"Film {n}.", "label": n % 2} for n in range(12)])
    data = read_documents(data_config(source))
    assert sorted(document.text for document in data.train + data.validation) == sorted(f"Film {n}." for n in range(12))
    assert {document.place.source for document in data.train} == {source}


def test_the_only_document_of_a_file_is_trained_on(tmp_path: Path) -> None:
    books = [tmp_path / f"book{n}.txt" for n in range(8)]
    for number, book in enumerate(books):
        book.write_text(f"Book {number}.\n\nThe end.", encoding="utf-8")
    stories = tmp_path / "stories.txt"
    stories.write_text("".join(f"Story {n}.\n<|endoftext|>\n" for n in range(20)), encoding="utf-8")
    data = read_documents(data_config(*map(str, books), str(stories)))
    assert [d.text for d in data.train[:8]] == [f"Book {n}.\nThe end." for n in range(8)]
    assert data.validation and all(document.text.startswith("Story") for document in data.validation)


def test_several_shapes_of_one_kind_are_read_together(tmp_path: Path) -> None:
    sources = [
        write_rows(tmp_path / f"{shape}.jsonl", [GOOD_ROWS[shape]]) for shape in ("hh", "pairs", "ranked", "oasst")
    ]
    [part] = read_parts(data_config(*sources), kind=None)
    assert list(part.shapes.values()) == ["hh", "pairs", "ranked", "oasst"]
    assert len(part.records) == 3  # the transcripts and the tree say the same
    assert part.tally.dropped == {"duplicate": 1}


# The shared data


@pytest.mark.parametrize(
    ("name", "num_rows", "usable", "different", "identical"),
    [
        ("hh-helpful-base", 2354, 2343, 9, 2),
        ("hh-helpful-rejection-sampled", 2749, 2714, 3, 32),
        ("hh-harmless-base", 2312, 2307, 5, 0),
    ],
)
def test_shared_transcripts_are_counted_as_their_readme_does(
    name: str, num_rows: int, usable: int, different: int, identical: int
) -> None:
    data = read_rankings(DataConfig(sources=(shared_file(f"preference/{name}.jsonl.gz"),)))
    report, empty = data.report, data.report.malformed.get("empty_answer", 0)
    assert (report.num_rows, report.num_train + report.num_validation + empty) == (num_rows, usable)
    assert report.malformed.get("different_prompts", 0) == different
    assert report.dropped.get("identical_answers", 0) == identical
    assert empty == (0 if "rejection" in name else 4)


def test_shared_sentences_are_read_without_those_of_the_validation_file() -> None:
    train, dev = shared_file("sentiment/sst-train.csv"), shared_file("sentiment/sst-dev.csv")
    data = read_labelled(DataConfig(sources=(train,), validation_sources=(dev,)))
    assert (data.report.num_rows, data.report.malformed) == (6920 + 872, {})
    assert sum(record.label for record in data.validation) == 444
    assert not {split_key(record) for record in data.train} & {split_key(record) for record in data.validation}


def test_shared_books_and_stories_are_read() -> None:
    names = ("tinystories-sample", "grimm", "bryant-stories", "burgess-busterbrown")
    data = read_documents(DataConfig(sources=tuple(shared_file(f"text/{name}.txt") for name in names)))
    assert data.report.num_train + data.report.num_validation == 2316 + 3
    assert data.report.dropped == {"unfinished": 1}
