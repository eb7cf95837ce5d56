"""Which records go to training and which to validation: by prompt, whatever form it comes in."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.data_inputs import data_config, pair, write_rows
from tether_services.recipes.data.reading import read_demonstrations, read_documents, read_rankings
from tether_services.recipes.data.records import Demonstration, Document, LabelledText, Place, Ranking, Turn
from tether_services.recipes.data.splitting import canonical_prompt, is_validation, opening, split_key
from tether_services.recipes.data.transcripts import is_transcript, read_transcript

PLACE = Place("rows", 1)
SHARES = {
    number: [is_validation(f"question {number}?", fraction=share) for share in (0.1, 0.5)] for number in range(99)
}
SURE = [next(number for number in range(31, 99) if SHARES[number] == [is_kept] * 2) for is_kept in (True, False)]
"""A prompt that is kept for validation at every fraction from 0.1 to 0.5, and one that never is."""


@settings(max_examples=60, deadline=None)
@given(
    numbers=st.lists(st.integers(0, 30), min_size=5, max_size=60),
    fraction=st.floats(0.1, 0.5),
    seed=st.integers(0, 9),
)
def test_no_prompt_is_in_both_parts_and_the_order_of_the_rows_changes_nothing(
    tmp_path_factory: pytest.TempPathFactory, numbers: list[int], fraction: float, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("rows")
    rows = [{**pair(number), "chosen": f"Yes {index}"} for index, number in enumerate(numbers)]
    rows += [pair(number) for number in SURE] * 2
    parts = []
    for name in ("a.jsonl", "b.jsonl"):
        data = read_rankings(data_config(write_rows(folder / name, rows), validation_fraction=fraction))
        prompts = [{record.prompt for record in part} for part in (data.train, data.validation)]
        assert not prompts[0] & prompts[1]
        assert len(data.train) + len(data.validation) + sum(data.report.dropped.values()) == len(rows)
        parts.append([{record.answers for record in part} for part in (data.train, data.validation)])
        random.Random(seed).shuffle(rows)
    assert parts[0] == parts[1]


def test_the_split_is_the_same_on_every_machine() -> None:
    kept = [number for number in range(200) if is_validation(f"Question {number}?", fraction=0.05)]
    assert kept == [int(number) for number in KEPT.split()]


KEPT = "15 45 51 75 94 104 126 180 194"


def test_what_is_kept_is_decided_by_the_first_four_bytes_of_the_hash() -> None:
    share = int(hashlib.sha256(b"A story.").hexdigest()[:8], 16) / 2**32
    assert is_validation("A story.", fraction=share + 1e-9)
    assert not is_validation("A story.", fraction=share)


def test_the_split_keeps_its_share() -> None:
    count = sum(is_validation(str(number), fraction=0.1) for number in range(20_000))
    assert 1850 < count < 2150  # three standard deviations of 42 are 127


def test_dialogues_from_one_opening_stay_together() -> None:
    hi, more = (Turn("user", "Hi"),), (Turn("user", "Hi"), Turn("assistant", "Yes?"), Turn("user", "So"))
    assert opening(hi) == opening(more) == opening("Hi") == opening((Turn("system", "Be kind."), *more)) == "Hi"
    assert opening((Turn("user", " "), Turn("user", "b"))) == "b"
    assert len({canonical_prompt(prompt) for prompt in ("Hi", hi, more)}) == 3


def test_the_groups_of_a_tree_are_in_one_part(tmp_path: Path) -> None:
    def tree(number: int) -> dict[str, Any]:
        def reply(text: str, rank: int, *replies: Any) -> dict[str, Any]:
            return {"text": text, "role": "assistant", "rank": rank, "replies": list(replies)}

        asked = {"text": "more?", "role": "prompter", "replies": [reply("c", 0), reply("d", 1)]}
        root = {"text": f"Q {number}", "role": "prompter", "replies": [reply("a", 0, asked), reply("b", 1)]}
        return {"message_tree_id": str(number), "prompt": root}

    data = read_rankings(data_config(write_rows(tmp_path / "trees.jsonl", [tree(n) for n in range(20)])))
    parts = [{opening(record.prompt) for record in part} for part in (data.train, data.validation)]
    assert len(data.train) + len(data.validation) == 40
    assert parts[0] and parts[1] and not parts[0] & parts[1]


def test_a_file_is_divided_the_same_way_whatever_it_is_read_as(tmp_path: Path) -> None:
    rows = [{"instruction": f"Do {n}", "input": "", "output": "a", "chosen": "a", "rejected": "b"} for n in range(40)]
    source = write_rows(tmp_path / "rows.jsonl", rows)
    rankings = read_rankings(data_config(source))
    shown = read_demonstrations(data_config(source, shape="instruction"))
    assert [r.prompt for r in rankings.validation] == [r.prompt for r in shown.validation]


def test_training_rows_with_a_validation_prompt_are_dropped_and_counted(tmp_path: Path) -> None:
    train = write_rows(tmp_path / "train.jsonl", [pair(n) for n in range(6)])
    dev = write_rows(tmp_path / "dev.jsonl", [{**pair(n), "chosen": "Other"} for n in (1, 4, 9)])
    data = read_rankings(data_config(train, validation_sources=(dev,)))
    assert [record.prompt for record in data.train] == [f"Question {n}?" for n in (0, 2, 3, 5)]
    assert [record.prompt for record in data.validation] == [f"Question {n}?" for n in (1, 4, 9)]
    assert data.report.dropped == {"in_validation": 2}


def test_white_space_and_upper_case_make_no_other_prompt_in_the_split(tmp_path: Path) -> None:
    spellings = ("Question {}?", "Question {}? ", "Question {}?\n", "  QUESTION \t {}?", "question\u00a0{}?")
    rows = [pair(n, prompt=text.format(n)) for n in range(12) for text in spellings]
    data = read_rankings(data_config(write_rows(tmp_path / "rows.jsonl", rows)))
    numbers = [{"".join(filter(str.isdigit, str(r.prompt))) for r in part} for part in (data.train, data.validation)]
    assert numbers[0] and numbers[1] and not numbers[0] & numbers[1]
    assert len(data.train) + len(data.validation) == len(rows), "they stay records of their own"


def test_a_validation_prompt_in_another_spelling_is_taken_out_of_the_training_data(tmp_path: Path) -> None:
    train = write_rows(tmp_path / "train.jsonl", [pair(1, prompt="question 1? \n"), pair(2)])
    dev = write_rows(tmp_path / "dev.jsonl", [pair(1)])
    data = read_rankings(data_config(train, validation_sources=(dev,)))
    assert [record.prompt for record in data.train] == ["Question 2?"]
    assert data.report.dropped == {"in_validation": 1}


def test_a_transcript_that_is_one_text_shares_the_key_of_its_first_human_turn() -> None:
    hi: tuple[Turn, ...] = (Turn("user", "Hi there"),)
    texts = (
        "hi  there\n",
        "\n\nHuman: Hi there\n\nAssistant:",
        "Human: Hi there\n\nAssistant: ",
        "Be kind.\n\nHuman: Hi there\n\nAssistant: Yes?\n\nHuman: So\n\nAssistant:",
        "\n\nHuman: Hi there",
    )
    keys = {split_key(Ranking(prompt, ("a", "b"), (1.0, 0.0), PLACE)) for prompt in (hi, *texts)}
    assert keys == {split_key(Demonstration(hi, "a", PLACE))} == {"hi there"}


@pytest.mark.parametrize("text", ["Human: an essay", "Hi", "Say:\n\nAssistant:", "What is\n\nHuman: ?", "xHuman: Hi"])
def test_other_texts_are_no_transcripts(text: str) -> None:
    assert not is_transcript(text) and opening(text) == text


def test_a_transcript_in_which_no_one_says_anything_is_its_own_key() -> None:
    empty = "\n\nHuman: \n\nAssistant:"
    assert is_transcript(empty) and opening(empty) == empty
    assert read_transcript(empty) == (Turn("user", ""), Turn("assistant", ""))


def test_a_document_is_its_own_key_to_the_letter(tmp_path: Path) -> None:
    """So that the split of texts that models were pretrained on stays what it was."""
    assert split_key(Document("A  story.\n", PLACE)) == "A  story.\n"
    rows = [{"text": f"Story {n}."} for n in range(24)]
    data = read_documents(data_config(write_rows(tmp_path / "rows.jsonl", rows)))
    keys = [{split_key(document) for document in part} for part in (data.train, data.validation)]
    assert len(data.train) + len(data.validation) == 24 and not keys[0] & keys[1]


def test_the_words_of_a_labelled_text_are_its_key() -> None:
    assert split_key(LabelledText("A good, warm film.", 1, PLACE)) == "agoodwarmfilm"
