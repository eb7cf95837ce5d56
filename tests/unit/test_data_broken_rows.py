"""Broken rows of every kind: each is counted under its name, with file and line, and the good ones stay."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.unit.data_inputs import GOOD_ROWS, data_config
from tether.errors import InvalidArgumentError
from tether_services.recipes.data.reading import read_parts

HALF_A_PAIR = "\\ud800"
LONG = "x" * 5000


def changed(shape: str, **fields: Any) -> str:
    """Return a good row with some fields changed, as a line."""
    return json.dumps({**GOOD_ROWS[shape], **fields})


def without(shape: str, name: str) -> str:
    return json.dumps({key: value for key, value in GOOD_ROWS[shape].items() if key != name})


def tree(**root: Any) -> str:
    return json.dumps({"message_tree_id": "1", "prompt": {**GOOD_ROWS["oasst"]["prompt"], **root}})


def transcripts(chosen: str, rejected: str) -> str:
    return json.dumps({"chosen": chosen, "rejected": rejected})


REPLY = {"text": "Hello", "role": "assistant", "rank": 0}
USER = {"role": "user", "content": "Hi"}
HH = "\n\nHuman: Hi\n\nAssistant:"

BROKEN: list[tuple[str, str, bytes | str, str]] = [
    # what it is, shape, the line, the reason
    ("cut off JSON", "pairs", '{"prompt": "Hi", "chosen": "He', "bad_json"),
    ("two objects on a line", "pairs", '{"prompt": "Hi"} {"prompt": "Hi"}', "bad_json"),
    ("single quotes", "pairs", "{'prompt': 'Hi'}", "bad_json"),
    ("a number of 5,000 digits", "text", '{"text": ' + "1" * 5000 + "}", "bad_json"),
    ("a raw line break in a text", "text", '{"text": "a\rb"}', "bad_json"),
    ("a list", "pairs", '["Hi", "Hello", "What"]', "not_an_object"),
    ("a text", "pairs", '"Hi"', "not_an_object"),
    ("null", "pairs", "null", "not_an_object"),
    ("deep nesting", "pairs", '{"prompt": ' + "[" * 100_000 + "]" * 100_000 + "}", "too_deep"),
    ("a key twice", "pairs", '{"prompt": "Hi", "prompt": "Ho", "chosen": "a", "rejected": "b"}', "duplicate_key"),
    ("a line of 10 MB", "text", '{"text": "' + "x" * 10_000_000 + '"}', "row_too_long"),
    ("Latin-1", "text", b'{"text": "caf\xe9"}', "not_utf8"),
    ("a NUL", "text", '{"text": "a\\u0000b"}', "nul_character"),
    ("half a surrogate pair", "text", '{"text": "a' + HALF_A_PAIR + '"}', "lone_surrogate"),
    ("no answer field", "pairs", without("pairs", "rejected"), "missing_field"),
    ("an answer of null", "pairs", changed("pairs", chosen=None), "missing_field"),
    ("an answer that is a number", "pairs", changed("pairs", chosen=3), "wrong_type"),
    ("an empty answer", "pairs", changed("pairs", rejected=""), "empty_answer"),
    ("a blank answer", "pairs", changed("pairs", rejected=" \n "), "empty_answer"),
    ("an empty prompt", "pairs", changed("pairs", prompt=" "), "empty_prompt"),
    ("a prompt that is an object", "pairs", changed("pairs", prompt={"a": 1}), "wrong_type"),
    ("a negative margin", "pairs", changed("pairs", margin=-1), "bad_margin"),
    ("a margin that is a text", "pairs", changed("pairs", margin="1"), "bad_margin"),
    ("messages of other prompts", "pairs", changed("pairs", prompt=None, chosen=[USER, {**USER, "role": "assistant"}],
     rejected=[{"role": "user", "content": "Ho"}, {"role": "assistant", "content": "b"}]), "different_prompts"),
    ("a pair that ends with the user", "pairs", changed("pairs", chosen=[USER]), "no_reply"),
    ("transcripts of other prompts", "hh", transcripts(HH + " a", HH.replace("Hi", "Ho") + " b"), "different_prompts"),
    ("a transcript without a reply", "hh", transcripts(HH + " a", "\n\nHuman: Hi"), "no_reply"),
    ("an empty reply", "hh", transcripts(HH + " a", HH + " "), "empty_answer"),
    ("a transcript without a question", "hh", transcripts("\n\nAssistant: a", "\n\nAssistant: b"), "empty_prompt"),
    ("one answer", "ranked", changed("ranked", answers=["a"], ranks=[0]), "too_few_answers"),
    ("fewer ranks than answers", "ranked", changed("ranked", ranks=[0, 1]), "lengths_differ"),
    ("no ranks", "ranked", without("ranked", "ranks"), "missing_field"),
    ("a rank that is no number", "ranked", changed("ranked", ranks=["0", "1", "2"]), "bad_level"),
    ("a rank that is a truth value", "ranked", changed("ranked", ranks=[True, False, True]), "bad_level"),
    ("a score of NaN", "ranked", changed("ranked", scores=[0.0, float("nan"), 1.0]), "bad_level"),
    ("a score of infinity", "ranked", changed("ranked", scores=[0.0, float("inf"), 1.0]), "bad_level"),
    ("a score too large for a float", "ranked", changed("ranked", scores=[0, 10**400, 1]), "bad_level"),
    ("an empty answer among ranked ones", "ranked", changed("ranked", answers=["a", "", "b"]), "empty_answer"),
    ("an answer that is a list", "ranked", changed("ranked", answers=["a", ["b"], "c"]), "wrong_type"),
    ("answers that are one text", "ranked", changed("ranked", answers="abc"), "wrong_type"),
    ("answers with and without a rank", "ranked", changed("ranked", answers=[{"text": "a", "rank": 0}, {"text": "b"}]),
     "missing_field"),
    ("an instruction without an answer", "instruction", changed("instruction", output=""), "empty_answer"),
    ("a blank instruction", "instruction", changed("instruction", instruction=" "), "empty_prompt"),
    ("an input that is a number", "instruction", changed("instruction", input=3), "wrong_type"),
    ("a conversation that the user ends", "messages", changed("messages", messages=[USER]), "no_reply"),
    ("a conversation without turns", "messages", changed("messages", messages=[]), "no_reply"),
    ("a conversation nobody began", "messages", changed("messages", messages=[{**USER, "role": "assistant"}]),
     "empty_prompt"),
    ("an unknown role", "messages", changed("messages", messages=[{**USER, "role": "tool"}]), "bad_role"),
    ("an empty turn", "messages", changed("messages", messages=[{**USER, "content": ""}]), "empty_turn"),
    ("a turn that is a text", "messages", changed("messages", messages=["Hi"]), "wrong_type"),
    ("messages that are a text", "messages", changed("messages", messages="Hi"), "wrong_type"),
    ("a blank text", "text", changed("text", text=" \n"), "empty_text"),
    ("a label of 2", "labelled", changed("labelled", label=2), "bad_label"),
    ("a label in words", "labelled", changed("labelled", label="positive"), "bad_label"),
    ("a label that is a truth value", "labelled", changed("labelled", label=True), "bad_label"),
    ("no label", "labelled", without("labelled", "label"), "missing_field"),
    ("a blank sentence", "labelled", changed("labelled", sentence=" "), "empty_text"),
    ("a tree whose root says nothing", "oasst", tree(text=""), "empty_turn"),
    ("a tree with an unknown role", "oasst", tree(role="robot"), "bad_role"),
    ("a tree with a rank that is a text", "oasst", tree(replies=[REPLY, {**REPLY, "rank": "first"}]), "bad_level"),
    ("a tree with an empty reply", "oasst", tree(replies=[REPLY, {**REPLY, "text": " "}]), "empty_answer"),
    ("a tree whose replies are a text", "oasst", tree(replies="none"), "wrong_type"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("line", "shape", "reason"), [row[2:0:-1] + row[3:] for row in BROKEN], ids=[r[0] for r in BROKEN]
)
def test_a_broken_row_is_counted_by_name_with_its_line_and_the_others_stay(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, line: bytes | str, shape: str, reason: str
) -> None:
    path, good = tmp_path / "rows.jsonl", json.dumps(GOOD_ROWS[shape]).encode()
    path.write_bytes(b"\n".join([good, line if isinstance(line, bytes) else line.encode(), good]) + b"\n")
    [part] = read_parts(data_config(str(path), shape=shape), kind=None)
    assert part.tally.malformed == {reason: 1}
    assert part.tally.first_malformed[0].startswith(f"{path}:2: {reason}")
    assert f"{path}:2: {reason}" in caplog.text
    assert (part.tally.num_rows, part.tally.dropped, len(part.records)) == (3, {"duplicate": 1}, 1)


DROPPED: list[tuple[str, str, str, str]] = [
    ("equal ranks only", "ranked", changed("ranked", ranks=[1, 1, 1]), "only_ties"),
    ("one answer on two scores", "ranked", changed("ranked", answers=["a", "a"], scores=[1, 2]), "identical_answers"),
    ("one answer on two ranks", "ranked", changed("ranked", answers=["a", "a", "b"]), "identical_answers"),
    ("two equal answers", "pairs", changed("pairs", rejected="Hello"), "identical_answers"),
    ("two equal transcripts", "hh", transcripts(HH + " a", HH + " a"), "identical_answers"),
    ("a tree with one reply", "oasst", tree(replies=[REPLY]), "no_ranking"),
    ("a tree of equal ranks", "oasst", tree(replies=[REPLY, {**REPLY, "text": "b"}]), "only_ties"),
]


@pytest.mark.parametrize(("shape", "line", "reason"), [row[1:] for row in DROPPED], ids=[row[0] for row in DROPPED])
def test_a_row_that_says_nothing_about_preference_is_dropped_by_name(
    tmp_path: Path, shape: str, line: str, reason: str
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{line}\n{json.dumps(GOOD_ROWS[shape])}\n", encoding="utf-8")
    [part] = read_parts(data_config(str(path), shape=shape), kind=None)
    assert (part.tally.dropped, part.tally.malformed, len(part.records)) == ({reason: 1}, {}, 1)


def test_messages_about_broken_rows_never_repeat_their_words(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "rows.jsonl"
    lines = ['{"text": "SECRET', '{"text": ["SECRET"]}', '{"text": "SECRET\\u0000"}', '"SECRET"']
    path.write_text("\n".join([json.dumps(GOOD_ROWS["text"]), *lines]), encoding="utf-8")
    [part] = read_parts(data_config(str(path)), kind=None)
    assert part.tally.malformed.total() == 4
    assert "SECRET" not in caplog.text + "".join(part.tally.first_malformed)


def test_only_the_first_broken_rows_are_named_and_all_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(GOOD_ROWS["text"]) + "\n" + "{\n" * 50, encoding="utf-8")
    [part] = read_parts(data_config(str(path)), kind=None)
    assert (part.tally.malformed["bad_json"], len(part.tally.first_malformed), len(caplog.records)) == (50, 5, 5)


CSV: list[tuple[str, str, str, int]] = [
    ("a field too few", "1\n", "bad_csv", 1),
    ("a field too many", "1,fine,really\n", "bad_csv", 1),
    ("a missing quotation mark", '1,"fine\n0,"dull"\n', "bad_csv", 2),
    ("a quotation mark inside", '1,"fine"ly"\n', "bad_csv", 1),
    ("a label of 2", "2,fine\n", "bad_label", 1),
    ("a label of a half", "0.5,fine\n", "bad_label", 1),
    ("no label", ",fine\n", "bad_label", 1),
    ("no sentence", "1,\n", "empty_text", 1),
    ("a NUL", "1,fi\0ne\n", "nul_character", 1),
    ("a field of 200 KB", "1," + "x" * 200_000 + "\n", "bad_csv", 1),
    ("a line of 2 MB", "1," + "x" * 2_000_000 + "\n", "row_too_long", 1),
    ("Latin-1", "1,caf\udce9\n", "not_utf8", 1),
]


@pytest.mark.parametrize(("row", "reason", "lost"), [r[1:] for r in CSV], ids=[r[0] for r in CSV])
def test_a_broken_csv_row_is_counted_with_the_lines_that_it_swallowed(
    tmp_path: Path, row: str, reason: str, lost: int
) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(f"label,sentence\n1,good\n{row}0,bad\n".encode(errors="surrogateescape"))
    [part] = read_parts(data_config(str(path)), kind=None)
    assert part.tally.malformed == {reason: lost}
    assert part.tally.first_malformed[0].startswith(f"{path}:3: {reason}")
    assert [record.place.row for record in part.records] == [2, 3 + row.count("\n")]


def test_a_csv_record_with_an_unreadable_line_inside_is_lost_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(b'label,sentence\n1,"good\ncaf\xe9\nfilm"\n0,bad\n')
    [part] = read_parts(data_config(str(path)), kind=None)
    assert part.tally.first_malformed[0].startswith(f"{path}:3: not_utf8")
    assert part.tally.first_malformed[1].startswith(f"{path}:2: bad_csv (a line of it cannot be read)")
    assert [record.place.row for record in part.records] == [5]


@pytest.mark.parametrize("header", ["label,label", "label,", ""])
def test_a_csv_header_that_does_not_name_every_column_once_is_refused(tmp_path: Path, header: str) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(f"{header}\n1,fine\n", encoding="utf-8")
    with pytest.raises(InvalidArgumentError, match=r"rows\.csv:1: the first line") as caught:
        read_parts(data_config(str(path)), kind=None)
    assert caught.value.violations[0].field == "sources"


def test_csv_columns_of_no_shape_are_named_in_the_error(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("class,words\n1,fine\n", encoding="utf-8")
    with pytest.raises(InvalidArgumentError, match=r"'class', 'words'.*hh, pairs, ranked"):
        read_parts(data_config(str(path)), kind=None)
