"""Rankings as token ids, and labelled texts made into rankings."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from tests.unit.reward_inputs import labelled_config, reward_config
from tests.unit.stage_inputs import PACKAGED_POLICY
from tether.errors import InvalidArgumentError
from tether_services.recipes.config import RewardModelConfig
from tether_services.recipes.data.reading import read_labelled, read_rankings
from tether_services.recipes.data.records import LabelledText, Place, Ranking, Turn
from tether_services.recipes.data.rendering import Renderer
from tether_services.recipes.rankings import (
    POOL_TEXTS,
    RankingRows,
    distinct_answers,
    drop_tokens,
    encode_rankings,
    group_texts,
    join_sentences,
    labelled_pools,
    labelled_rankings,
    vary_case,
)

PLACE = Place("made", 1)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(PACKAGED_POLICY)


@pytest.fixture
def renderer(tokenizer: Any) -> Renderer:
    return Renderer(tokenizer)


def labelled(count: int) -> list[LabelledText]:
    return [LabelledText(f"s{index}e", index % 2, PLACE) for index in range(count)]


def config_of(tmp_path: Path, **changes: Any) -> RewardModelConfig:
    return labelled_config(tmp_path, tmp_path / "out", **changes)


def with_training(config: RewardModelConfig, **changes: Any) -> RewardModelConfig:
    return config.model_copy(update={"training": config.training.model_copy(update=changes)})


def texts_of(rows: RankingRows, tokenizer: Any) -> list[str]:
    return [tokenizer.decode(ids, skip_special_tokens=True) for row in rows.rows for ids in row["answer_ids"]]


def test_every_answer_follows_the_prompt_and_ends(renderer: Renderer, tokenizer: Any, tmp_path: Path) -> None:
    item = Ranking("Say. ", ("Yes indeed.", "No.", "Maybe."), (2.0, 0.0, 2.0), PLACE, margin=0.5)
    rows = encode_rankings([item], renderer, reward_config(tmp_path, tmp_path / "out"))
    row = rows.rows[0]
    assert [tokenizer.decode(ids) for ids in row["answer_ids"]] == [f"<s>Say. {answer}</s>" for answer in item.answers]
    assert (row["levels"], row["margin"], rows.lengths) == ([2.0, 0.0, 2.0], 0.5, [[11, 3, 6]])
    assert rows.num_tokens == sum(map(len, row["answer_ids"]))
    assert (rows.num_answers, rows.num_overlong) == (3, 0)


def test_a_ranking_with_one_long_answer_is_left_out_or_cut_and_counted(renderer: Renderer, tmp_path: Path) -> None:
    config = reward_config(tmp_path, tmp_path / "out", max_tokens=24)
    items = [
        Ranking("Say. ", ("very " * 60, "No."), (1.0, 0.0), PLACE),
        Ranking("Say it. ", ("Yes.", "No."), (1.0, 0.0), PLACE),
    ]
    dropped = encode_rankings(items, renderer, config)
    cut = encode_rankings(items, renderer, config.model_copy(update={"overlong": "truncate"}))
    assert (len(dropped.rows), dropped.num_overlong) == (1, 1)
    assert (len(cut.rows), cut.num_overlong) == (2, 1)
    assert [len(ids) <= 24 for row in cut.rows for ids in row["answer_ids"]] == [True] * 4
    assert cut.rows[0]["answer_ids"][0][-1] == cut.rows[1]["answer_ids"][0][-1], "a cut answer keeps its end token"


def test_answers_alike_once_cut_are_left_out_and_counted(renderer: Renderer, tmp_path: Path) -> None:
    config = reward_config(tmp_path, tmp_path / "out", max_tokens=24, overlong="truncate")
    long = "very " * 60
    items = [
        Ranking("Say. ", (f"{long}good", "No.", f"{long}bad", "Yes."), (3.0, 2.0, 1.0, 0.0), PLACE),
        Ranking("Say it. ", (f"{long}good", "No.", f"{long}bad"), (1.0, 0.0, 1.0), PLACE),
        Ranking("Say so. ", (f"{long}good", f"{long}bad"), (1.0, 0.0), PLACE),
    ]
    found = encode_rankings(items, renderer, config)
    assert [row["levels"] for row in found.rows] == [[2.0, 0.0], [1.0, 0.0]]
    assert found.lengths == [[3, 4], [len(long) + 4, 3]]
    assert all(len({tuple(ids) for ids in row["answer_ids"]}) == 2 for row in found.rows)
    assert (found.num_alike, found.num_only_ties, found.num_overlong) == (2 + 1 + 2, 1, 3)


def test_the_first_of_alike_answers_stays_unless_people_ranked_them_differently() -> None:
    assert distinct_answers([[1], [2], [1], [3], [3]], [2.0, 1.0, 2.0, 0.0, 3.0]) == [0, 1]


@pytest.mark.parametrize(("objective", "num_kept"), [("ranking", 1), ("regression", 2)])
def test_only_ties_teach_a_regression_and_no_ranking(
    objective: str, num_kept: int, renderer: Renderer, tmp_path: Path
) -> None:
    config = reward_config(tmp_path, tmp_path / "out", objective=objective)
    items = [
        Ranking("Say. ", ("Yes.", "No."), (4.0, 4.0), PLACE, is_scored=True),
        Ranking("Say it. ", ("Yes.", "No."), (4.0, 1.0), PLACE, is_scored=True),
    ]
    found = encode_rankings(items, renderer, config)
    assert (len(found.rows), found.num_only_ties) == (num_kept, 2 - num_kept)


def test_a_conversation_is_rendered_by_the_template_of_the_settings(tokenizer: Any, tmp_path: Path) -> None:
    item = Ranking((Turn("user", "Hi"),), ("Hello!", "What?"), (1.0, 0.0), PLACE)
    rows = encode_rankings([item], Renderer(tokenizer, "dialogue"), reward_config(tmp_path, tmp_path / "out"))
    assert tokenizer.decode(rows.rows[0]["answer_ids"][0]) == "<s>\n\nHuman: Hi\n\nAssistant: Hello!</s>"


def test_groups_are_half_positive_and_use_no_sentence_twice() -> None:
    groups = list(group_texts(labelled(200), group_size=6, max_sentences=3, rng=random.Random(0)))
    assert {tuple(sorted(Counter(item.label for item in group).items())) for group in groups} == {((0, 3), (1, 3))}
    used = [part.lower().rstrip(".") for group in groups for item in group for part in item.text.split(". ")]
    assert len(used) == len(set(used))
    assert len(used) > 150
    assert {item.text.count(". ") for group in groups for item in group} == {0, 1, 2}


def test_sentences_of_a_joined_text_have_its_label() -> None:
    label_of = {item.text: item.label for item in labelled(60)}
    for group in group_texts(labelled(60), group_size=4, max_sentences=3, rng=random.Random(1)):
        for item in group:
            assert {label_of[part.lower().rstrip(".")] for part in item.text.split(". ")} == {item.label}


def test_an_odd_group_has_one_negative_more() -> None:
    group = next(group_texts(labelled(20), group_size=5, max_sentences=1, rng=random.Random(0)))
    assert sorted(item.label for item in group) == [0, 0, 0, 1, 1]


def test_the_rarer_label_ends_a_pass() -> None:
    items = [*labelled(40), *(LabelledText(f"more {index}", 0, PLACE) for index in range(100))]
    groups = list(group_texts(items, group_size=4, max_sentences=1, rng=random.Random(0)))
    assert len(groups) == 10


def test_every_pass_groups_anew_and_the_same_seed_repeats_it(
    renderer: Renderer, tokenizer: Any, tmp_path: Path
) -> None:
    config = config_of(tmp_path, group_size=4)
    items = read_labelled(config.data).train[:80]
    twice = labelled_rankings(items, renderer, config)
    assert len(twice.rows) == 40
    texts = [text.lower() for text in texts_of(twice, tokenizer)]
    assert sorted(texts[:80]) == sorted(texts[80:])
    assert texts[:80] != texts[80:]
    assert labelled_rankings(items, renderer, config).rows == twice.rows
    assert labelled_rankings(items, renderer, config.model_copy(update={"seed": 1})).rows != twice.rows


@pytest.mark.parametrize(("epochs", "expected"), [(0.5, 10), (1.0, 20), (2.5, 50)])
def test_a_part_of_a_pass_takes_that_share_of_its_rankings(
    renderer: Renderer, tmp_path: Path, epochs: float, expected: int
) -> None:
    config = with_training(config_of(tmp_path, group_size=4), num_epochs=epochs)
    assert len(labelled_rankings(labelled(80), renderer, config).rows) == expected


def test_max_steps_decides_how_many_passes_there_are(renderer: Renderer, tmp_path: Path) -> None:
    config = with_training(config_of(tmp_path, group_size=4), max_steps=7, num_epochs=1.0)
    rows = labelled_rankings(labelled(80), renderer, config).rows
    assert len(rows) == 7 * config.training.rows_per_step


def test_half_of_the_texts_end_and_half_were_cut(renderer: Renderer, tokenizer: Any, tmp_path: Path) -> None:
    rows = labelled_rankings(labelled(400), renderer, config_of(tmp_path)).rows
    ends = [ids[-1] == tokenizer.eos_token_id for row in rows for ids in row["answer_ids"]]
    assert 0.4 < sum(ends) / len(ends) < 0.6


def test_dropped_tokens_leave_the_first_one_and_never_nothing() -> None:
    rng = random.Random(0)
    kept = [drop_tokens(list(range(1, 102)), share=0.5, rng=rng) for _ in range(50)]
    assert {ids[0] for ids in kept} == {1}
    assert all(ids == sorted(ids) for ids in kept)
    assert 45 < sum(map(len, kept)) / 50 < 57
    assert drop_tokens([1, 2, 3], share=0.0, rng=rng) == [1, 2, 3]
    assert {tuple(drop_tokens([1, 2], share=0.99, rng=rng)) for _ in range(20)} == {(1, 2)}


def test_token_dropout_shortens_training_texts_only(renderer: Renderer, tmp_path: Path) -> None:
    plain, dropped = (config_of(tmp_path, token_dropout=share) for share in (0.0, 0.5))
    items = read_labelled(plain.data)
    lengths = [labelled_rankings(items.train, renderer, config).num_tokens for config in (plain, dropped)]
    assert 0.45 < lengths[1] / lengths[0] < 0.65
    pools = [labelled_pools(items.validation, renderer, config) for config in (plain, dropped)]
    assert pools[0].rows == pools[1].rows


def test_validation_texts_are_one_ranking_of_all_positive_over_all_negative(
    renderer: Renderer, tokenizer: Any, tmp_path: Path
) -> None:
    items = sorted(labelled(61), key=lambda item: -item.label)
    pool = labelled_pools(items, renderer, config_of(tmp_path))
    assert texts_of(pool, tokenizer) == [item.text for item in items]
    assert pool.rows[0]["levels"] == [float(item.label) for item in items]
    assert pool.lengths == [[len(item.text) for item in items]]
    assert not [ids for ids in pool.rows[0]["answer_ids"] if ids[-1] == tokenizer.eos_token_id]


def test_a_large_validation_set_is_measured_on_an_evenly_spaced_part(renderer: Renderer, tmp_path: Path) -> None:
    pool = labelled_pools(labelled(2 * POOL_TEXTS), renderer, config_of(tmp_path))
    assert Counter(pool.rows[0]["levels"]) == {1.0: POOL_TEXTS // 2, 0.0: POOL_TEXTS // 2}


def test_long_texts_are_left_out_or_cut_and_counted(renderer: Renderer, tmp_path: Path) -> None:
    items = [LabelledText(f"{'very ' * 80}{index}", index % 2, PLACE) for index in range(8)] + labelled(8)
    config = config_of(tmp_path, max_tokens=16)
    dropped = labelled_rankings(items, renderer, config)
    cut = labelled_rankings(items, renderer, config.model_copy(update={"overlong": "truncate"}))
    assert (dropped.num_overlong, cut.num_overlong) == (8, 8)
    assert (len(dropped.rows), len(cut.rows)) == (4, 8)
    assert max(len(ids) for row in cut.rows for ids in row["answer_ids"]) == 16


def test_too_few_texts_of_a_label_name_the_setting(renderer: Renderer, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="too few") as caught:
        labelled_rankings(labelled(20), renderer, config_of(tmp_path, group_size=64))
    assert caught.value.violations[0].field == "group_size"
    one_label = [LabelledText(f"fine {index}", 1, PLACE) for index in range(30)]
    with pytest.raises(InvalidArgumentError, match="both labels"):
        labelled_pools(one_label, renderer, config_of(tmp_path))


def test_case_variants_keep_the_words_and_all_occur() -> None:
    rng = random.Random(0)
    seen = {vary_case("warm and Real", rng=rng) for _ in range(50)}
    assert seen == {"warm and Real", "warm and real", "Warm and Real"}


def test_joined_sentences_are_separated_by_a_mark() -> None:
    assert join_sentences(["One", "Two!", "three"]) == "One. Two! three"
    assert join_sentences(["Alone"]) == "Alone"


def test_rankings_of_every_size_come_through(renderer: Renderer, tmp_path: Path) -> None:
    config = reward_config(tmp_path, tmp_path / "out")
    data = read_rankings(config.data)
    rows = encode_rankings(data.train, renderer, config)
    assert {len(row["levels"]) for row in rows.rows} == {2, 3, 4, 5}
    assert all(item.is_scored for item in data.train)
