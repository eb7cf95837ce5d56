"""What `tether data inspect` measures, by hand on small data and on the shared files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.unit.data_inputs import GOOD_ROWS, data_config, pair, shared_file, write_rows
from tether.errors import InvalidArgumentError
from tether_services.recipes.config import DataConfig
from tether_services.recipes.data.inspection import (
    Inspection,
    LengthPreference,
    count_conflicts,
    inspect_data,
    length_preference,
)
from tether_services.recipes.data.records import Place, Ranking
from tether_services.recipes.data.rendering import Renderer
from tether_services.recipes.tokenizer import train_tokenizer

PLACE = Place("rows", 1)


def ranking(answers: tuple[str, ...], levels: tuple[float, ...], prompt: str = "Hi") -> Ranking:
    return Ranking(prompt, answers, levels, PLACE)


def lengths_of(inspection: Inspection) -> dict[str, tuple[int, int, int]]:
    return {row.name: (row.count, row.percentiles["p0"], row.percentiles["p100"]) for row in inspection.lengths}


def test_longer_wins_over_all_pairs_on_different_levels_and_equal_lengths_count_half() -> None:
    found = length_preference(
        [
            ranking(("aaa", "bb", "c"), (2.0, 1.0, 1.0)),  # both pairs won by the longer, the tie is no pair
            ranking(("a", "bb"), (1.0, 0.0)),  # lost
            ranking(("aa", "bb"), (0.0, 1.0)),  # half, and both are the longest
            ranking(("aa", "b"), (0.5, 0.5)),  # scores without an order say nothing about length
        ]
    )
    assert found == LengthPreference(num_pairs=4, longer_wins=2.5 / 4, longest_is_best=1.5 / 3)
    assert length_preference([]) is None


def test_pairs_in_both_directions_are_conflicts_only_for_one_prompt() -> None:
    rankings = [
        ranking(("a", "b", "c"), (2.0, 1.0, 0.0)),
        ranking(("a", "b"), (0.0, 1.0)),
        ranking(("c", "b"), (0.0, 0.5)),
        ranking(("a", "b"), (0.0, 1.0), prompt="Ho"),
    ]
    assert count_conflicts(rankings) == 1


def test_counts_lengths_and_overlaps_of_rankings(tmp_path: Path) -> None:
    rows: list[Any] = [pair(1), {**pair(1), "margin": 2}, pair(1), "{"]
    ranked = {"prompt": "Question 1?", "answers": ["a", "bb", "ccc"], "ranks": [0, 1, 2]}
    first, second = write_rows(tmp_path / "a.jsonl", rows), write_rows(tmp_path / "b.jsonl", [ranked])
    other, third = write_rows(tmp_path / "c.jsonl", [pair(2)]), write_rows(tmp_path / "d.jsonl", [pair(2)])
    found = inspect_data(data_config(first, other, validation_sources=(second, third)))
    assert found.report["malformed"] == {"bad_json": 1} and found.malformed_share == pytest.approx(1 / 7)
    assert found.report["dropped"] == {"duplicate": 1, "in_validation": 3}
    assert (found.num_prompts, found.num_repeated_prompts, found.num_answers) == (2, 3, {2: 4, 3: 1})
    overlaps = {(o.first, o.second): (o.num_prompts, o.num_openings) for o in found.overlaps}
    assert overlaps == {("training", "validation"): (2, 2), (first, second): (1, 1), (other, third): (1, 1)}
    assert lengths_of(found) == {"prompt characters": (5, 11, 11), "answer characters": (11, 1, 5)}


def test_the_middle_of_the_lengths_is_their_nearest_rank(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "a.jsonl", [{"text": "x" * n} for n in range(1, 102)])
    [row] = inspect_data(data_config(source)).lengths
    assert row.mean == 51
    assert row.percentiles == {"p0": 1, "p25": 26, "p50": 51, "p75": 76, "p90": 91, "p99": 100, "p100": 101}


def test_every_kind_of_data_is_measured_and_tokens_are_counted_where_asked(tmp_path: Path) -> None:
    renderer = Renderer(train_tokenizer(["Hi Hello What"], vocab_size=262, max_length=64))
    found = {
        shape: inspect_data(data_config(write_rows(tmp_path / f"{shape}.jsonl", [row])), renderer=renderer)
        for shape, row in GOOD_ROWS.items()
    }
    assert lengths_of(found["text"])["text characters"] == (1, 17, 17)
    assert lengths_of(found["text"])["text tokens"] == (1, 19, 19)
    assert lengths_of(found["messages"])["answer characters"] == (1, 5, 5)
    assert lengths_of(found["messages"])["answer tokens"][0] == 1
    assert found["labelled"].labels == {1: 1} and found["labelled"].length_preference is None
    assert found["oasst"].num_answers == {2: 1}


def test_data_of_two_kinds_is_refused(tmp_path: Path) -> None:
    sources = [write_rows(tmp_path / f"{shape}.jsonl", [GOOD_ROWS[shape]]) for shape in ("pairs", "text")]
    with pytest.raises(InvalidArgumentError, match="holds rows of the shape text"):
        inspect_data(data_config(*sources))
    with pytest.raises(InvalidArgumentError, match="holds rows of the shape text"):
        inspect_data(data_config(sources[0], validation_sources=(sources[1],)))


def test_every_row_is_reported_to_the_progress_bar(tmp_path: Path) -> None:
    calls: list[int] = []
    source = write_rows(tmp_path / "a.jsonl", [*(pair(n) for n in range(5)), "{"])
    inspect_data(data_config(source), on_row=lambda: calls.append(1))
    assert len(calls) == 6


@pytest.mark.parametrize(
    ("name", "longer_wins", "num_repeated"),
    [
        ("preference/hh-helpful-base.jsonl.gz", 0.598, 0),
        ("preference/hh-helpful-rejection-sampled.jsonl.gz", 0.568, 1),
        ("preference/hh-harmless-base.jsonl.gz", 0.445, 2),
        ("preference/rasbt-preference.json", 0.521, 25),
        ("ranking/oasst-trees.jsonl", 0.698, 0),
    ],
)
def test_the_length_baseline_of_the_shared_data_is_that_of_its_readme(
    name: str, longer_wins: float, num_repeated: int
) -> None:
    found = inspect_data(DataConfig(sources=(shared_file(name),)))
    assert found.length_preference is not None
    # The README counts four pairs with an empty reply as usable, which moves the share by up to 0.0008.
    assert found.length_preference.longer_wins == pytest.approx(longer_wins, abs=0.0013)
    assert (found.num_repeated_prompts, found.num_conflicts) == (num_repeated, 0)


def test_the_shared_trees_have_the_group_sizes_of_their_readme() -> None:
    found = inspect_data(DataConfig(sources=(shared_file("ranking/oasst-trees.jsonl"),)))
    assert found.num_answers == {2: 57, 3: 117, 4: 27, 5: 3, 6: 6, 8: 1, 9: 1}
    assert found.length_preference is not None
    assert found.length_preference.num_pairs == 754
    assert found.length_preference.longest_is_best == pytest.approx(0.594, abs=0.0005)


def test_a_prompt_in_two_shared_files_is_found() -> None:
    sources = tuple(shared_file(f"preference/hh-{name}-base.jsonl.gz") for name in ("helpful", "harmless"))
    between = [o for o in inspect_data(DataConfig(sources=sources)).overlaps if o.first == sources[0]]
    assert [overlap.num_openings for overlap in between] == [1]
