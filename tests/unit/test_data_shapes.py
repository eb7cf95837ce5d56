"""Rows of every shape as records, in all the spellings that are accepted."""

from __future__ import annotations

import itertools
import json
import re
from typing import Any

import pytest

from tests.unit.data_inputs import GOOD_ROWS
from tether_services.recipes.data.problems import Dropped
from tether_services.recipes.data.records import Demonstration, Document, LabelledText, Place, Ranking, Turn
from tether_services.recipes.data.shapes import SHAPES, detect_shape, shapes_of

PLACE = Place("rows", 1)
HI = (Turn("user", "Hi"),)


def parse(shape: str, **fields: Any) -> list[Any]:
    return list(SHAPES[shape].parse(fields, PLACE))


def ranking(prompt: Any, answers: tuple[str, ...] = ("Hello", "What"), **fields: Any) -> Ranking:
    return Ranking(prompt, answers, fields.pop("levels", (1.0, 0.0)), PLACE, **fields)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_is_told_from_its_keys_and_parsed(shape: str) -> None:
    row = GOOD_ROWS[shape]
    found = detect_shape(row)
    assert found is SHAPES[shape]
    assert all(type(record) is found.record for record in found.parse(row, PLACE))


@pytest.mark.parametrize("shape", SHAPES)
def test_the_example_of_a_shape_is_a_row_of_it(shape: str) -> None:
    example = re.split(r"\n(?=[A-Z]|\w+:|\w+ (?:is|in) )", SHAPES[shape].example)[0]
    row = json.loads(example)
    assert detect_shape(row) is SHAPES[shape]
    assert [type(record) for record in SHAPES[shape].parse(row, PLACE)] == [SHAPES[shape].record]


def test_other_keys_tell_no_shape_and_empty_fields_do_not_count() -> None:
    assert detect_shape({"question": "a", "reply": "b"}) is None
    assert detect_shape({"text": None}) is None
    assert detect_shape({"text": "a", "label": None}) is SHAPES["text"]
    assert detect_shape({"chosen": "a", "rejected": "b", "prompt": None}) is SHAPES["hh"]
    assert shapes_of(Ranking) == ["hh", "pairs", "ranked", "oasst"]


# Transcripts


def test_a_transcript_is_cut_at_its_last_reply_and_divided_into_turns() -> None:
    before = "\n\nHuman: One\nline\n\nand more\n\nAssistant: Yes: sure\n\nHuman: Two"
    [record] = parse("hh", chosen=before + "\n\nAssistant: A ", rejected=before + "\n\nAssistant: B")
    turns = (Turn("user", "One\nline\n\nand more"), Turn("assistant", "Yes: sure"), Turn("user", "Two"))
    assert record == ranking(turns, ("A", "B"))


def test_text_before_the_first_turn_is_the_system() -> None:
    text = "Be kind.\n\nHuman: Hi\n\nAssistant:"
    [record] = parse("hh", chosen=text + " Hello", rejected=text + " What")
    assert record == ranking((Turn("system", "Be kind."), *HI))


def test_a_transcript_may_begin_without_a_blank_line() -> None:
    [record] = parse("hh", chosen="Human: Hi\n\nAssistant: Hello", rejected="Human: Hi\n\nAssistant: What")
    assert record.prompt == HI


# Pairs

SAID = [{"role": "user", "content": "Hi"}]


def reply(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


LATER = reply("a") + SAID


@pytest.mark.parametrize(
    ("fields", "prompt"),
    [
        ({"prompt": "Hi", "chosen": "Hello", "rejected": "What"}, "Hi"),
        ({"prompt": SAID, "chosen": "Hello", "rejected": "What"}, HI),
        ({"prompt": SAID, "chosen": reply("Hello"), "rejected": reply("What")}, HI),
        ({"prompt": "Hi", "chosen": reply("Hello"), "rejected": reply("What")}, "Hi"),
        ({"chosen": SAID + reply("Hello"), "rejected": SAID + reply("What")}, HI),
        ({"prompt": "Hi", "chosen": SAID + reply("Hello"), "rejected": SAID + reply("What")}, HI),
        ({"prompt": SAID, "chosen": SAID + reply("Hello"), "rejected": SAID + reply("What")}, HI),
        (
            {"prompt": SAID, "chosen": LATER + reply("Hello"), "rejected": LATER + reply("What")},
            (*HI, Turn("assistant", "a"), *HI),
        ),
        ({"instruction": "Hi", "input": "", "output": "What", "chosen": "Hello", "rejected": "What"}, HI),
        ({"instruction": "Hi", "input": "x", "chosen": "Hello", "rejected": "What"}, (Turn("user", "Hi\n\nx"),)),
    ],
)
def test_pairs_come_with_prompts_as_text_messages_or_instruction(fields: dict[str, Any], prompt: Any) -> None:
    assert parse("pairs", **fields) == [ranking(prompt)]
    if isinstance(fields["chosen"], list) or "prompt" in fields or "instruction" in fields:
        assert detect_shape(fields) is SHAPES["pairs"]


@pytest.mark.parametrize("margin", [0, 2, 0.5])
def test_a_margin_is_kept(margin: float) -> None:
    assert parse("pairs", **GOOD_ROWS["pairs"], margin=margin) == [ranking("Hi", margin=float(margin))]
    (ranked,) = parse("ranked", **GOOD_ROWS["ranked"], margin=margin)
    assert isinstance(ranked, Ranking) and ranked.margin == margin


# Rankings


def test_ranks_count_down_and_scores_count_up() -> None:
    answers = ("a", "b", "c")
    assert parse("ranked", prompt="Hi", answers=list(answers), ranks=[3, 1, 1]) == [
        ranking("Hi", answers, levels=(-3.0, -1.0, -1.0))
    ]
    assert parse("ranked", prompt="Hi", answers=list(answers), scores=[0.5, 2, -1]) == [
        ranking("Hi", answers, levels=(0.5, 2.0, -1.0), is_scored=True)
    ]


def test_answers_may_carry_their_own_rank_or_score() -> None:
    ranked = parse("ranked", prompt=SAID, answers=[{"text": "Hello", "rank": 0}, {"text": "What", "rank": 4}])
    scored = parse("ranked", prompt=SAID, answers=[{"text": "Hello", "score": 1.5}, {"text": "What", "score": 0}])
    assert ranked == [ranking(HI, levels=(0.0, -4.0))]
    assert scored == [ranking(HI, levels=(1.5, 0.0), is_scored=True)]


def test_equal_answers_on_one_level_are_a_tie() -> None:
    [record] = parse("ranked", prompt="Hi", answers=["a", "a", "b"], ranks=[0, 0, 1])
    assert record.levels == (0.0, 0.0, -1.0)


def message(text: str, *replies: Any, rank: int | None = None, role: str = "assistant", **more: Any) -> dict[str, Any]:
    return {"text": text, "role": role, "rank": rank, "replies": list(replies), **more}


def test_every_group_of_ranked_replies_of_a_tree_is_a_ranking_with_its_path() -> None:
    follow_up = message("and?", message("x", rank=1), message("y", rank=0), role="prompter")
    best = message("best", follow_up, rank=0)
    replies = (best, message("unranked"), message("worst", rank=2), message("middle", rank=1))
    root = message("Hi", *replies, role="prompter")
    found = parse("oasst", message_tree_id="1", prompt=root)
    path = (*HI, Turn("assistant", "best"), Turn("user", "and?"))
    assert found == [
        ranking(HI, ("best", "worst", "middle"), levels=(0.0, -2.0, -1.0)),
        ranking(path, ("x", "y"), levels=(-1.0, 0.0)),
    ]


def test_deleted_replies_and_replies_of_the_user_are_not_ranked() -> None:
    gone = message("gone", rank=1, deleted=True)
    asked = message("asked", rank=2, role="prompter")
    assert parse("oasst", prompt=message("Hi", message("a", rank=0), gone, asked, role="prompter")) == [
        Dropped("no_ranking")
    ]


def test_a_tree_of_any_depth_is_read() -> None:
    tree = message("end", role="prompter")
    for number in range(5000):
        tree = message(str(number), tree, role="prompter")
    assert parse("oasst", prompt=tree) == [Dropped("no_ranking")]


# Demonstrations and texts


def test_an_instruction_takes_its_input_after_a_blank_line() -> None:
    assert parse("instruction", instruction="Add.", input="1 2", output="3") == [
        Demonstration((Turn("user", "Add.\n\n1 2"),), "3", PLACE)
    ]
    for nothing in ({}, {"input": ""}, {"input": None}, {"input": "  "}):
        assert parse("instruction", instruction="Add.", output="3", **nothing)[0].prompt == (Turn("user", "Add."),)


def test_every_instance_of_an_instruction_is_a_demonstration() -> None:
    instances = [{"input": "1", "output": "a"}, {"input": "", "output": "b"}]
    found = parse("instruction", instruction="Do", instances=instances)
    assert [(record.prompt[0].content, record.answer) for record in found] == [("Do\n\n1", "a"), ("Do", "b")]


def test_a_prompt_and_its_completion_are_a_demonstration() -> None:
    assert parse("instruction", prompt="Once", completion=" upon") == [Demonstration("Once", " upon", PLACE)]
    assert detect_shape({"prompt": "Once", "completion": " upon"}) is SHAPES["instruction"]


@pytest.mark.parametrize("names", [("messages", "role", "content"), ("conversations", "from", "value")])
@pytest.mark.parametrize(("user", "assistant"), itertools.product(["user", "human"], ["assistant", "gpt"]))
def test_the_last_turn_of_a_conversation_is_learned(names: tuple[str, str, str], user: str, assistant: str) -> None:
    field, role, content = names
    turns = [("system", "Be kind."), (user, "Hi"), (assistant, "Hello"), (user, "So?"), (assistant, "So.")]
    row = {field: [{role: speaker, content: text} for speaker, text in turns]}
    earlier = (Turn("system", "Be kind."), *HI, Turn("assistant", "Hello"), Turn("user", "So?"))
    assert detect_shape(row) is SHAPES["messages"]
    assert parse("messages", **row) == [Demonstration(earlier, "So.", PLACE)]


@pytest.mark.parametrize(
    ("label", "expected"), [(0, 0), (1, 1), ("0", 0), ("1", 1), (0.0, 0), (1.0, 1), ("0.0", 0), ("1.0", 1)]
)
@pytest.mark.parametrize("name", ["text", "sentence"])
def test_labels_are_read_from_csv_and_json(label: object, expected: int, name: str) -> None:
    row = {name: " fine ", "label": label}
    assert parse("labelled", **row) == [LabelledText("fine", expected, PLACE)]
    assert detect_shape(row) is SHAPES["labelled"]


def test_a_text_is_a_document_as_it_stands() -> None:
    assert parse("text", text=" Once\n") == [Document(" Once\n", PLACE)]
