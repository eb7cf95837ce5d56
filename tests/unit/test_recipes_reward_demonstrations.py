"""The texts that fix the scale of a reward model: which ones, how long, and that none is lost unseen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from tests.unit.recipe_inputs import write_stories
from tests.unit.reward_inputs import labelled_config, reward_config, write_ranked_pairs
from tests.unit.stage_inputs import write_demonstrations
from tether.errors import InvalidArgumentError
from tether_services.recipes.config import RewardModelConfig
from tether_services.recipes.data.rendering import Renderer
from tether_services.recipes.reward_model import MAX_BEST_ANSWERS, Material, read_material, run_reward_model
from tether_services.recipes.scoring import build_reward_model, normalise


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("inputs")


def material_of(config: RewardModelConfig) -> Material:
    return read_material(config, Renderer(AutoTokenizer.from_pretrained(config.base)))


def fresh(inputs: Path, tmp_path: Path) -> Any:
    torch.manual_seed(0)
    config = reward_config(inputs, tmp_path / "out")
    return build_reward_model(config, Path(config.base), pad_token_id=0)


def refusal(config: RewardModelConfig) -> InvalidArgumentError:
    with pytest.raises(InvalidArgumentError) as caught:
        run_reward_model(config)
    return caught.value


def test_named_demonstrations_fix_the_scale(inputs: Path, tmp_path: Path) -> None:
    stories = {"sources": [str(write_stories(tmp_path / "stories.txt", count=40))], "validation_fraction": 0.5}
    config = reward_config(inputs, tmp_path / "out", demonstrations=stories, demonstration_tokens=9)
    material = material_of(config)
    # the last story of the file is unfinished
    assert 35 < len(material.demonstrations.token_ids) <= 40
    assert {len(ids) for ids in material.demonstrations.token_ids} == {9}


def test_demonstrations_may_be_prompts_with_answers(inputs: Path, tmp_path: Path) -> None:
    shown = {"sources": [str(write_demonstrations(tmp_path / "shown.jsonl", count=30))]}
    config = reward_config(inputs, tmp_path / "out", demonstrations=shown)
    rows = material_of(config).demonstrations.token_ids
    tokenizer = AutoTokenizer.from_pretrained(config.base)
    assert len(rows) == 30
    assert all("Tell of" in tokenizer.decode(ids) for ids in rows)
    assert all(ids[-1] == tokenizer.eos_token_id for ids in rows)


def test_three_demonstrations_are_enough(inputs: Path, tmp_path: Path) -> None:
    shown = {"sources": [str(write_demonstrations(tmp_path / "shown.jsonl", count=3))]}
    found = material_of(reward_config(inputs, tmp_path / "out", demonstrations=shown)).demonstrations
    assert (len(found.token_ids), found.num_overlong) == (3, 0)


def test_one_document_is_a_demonstration(inputs: Path, tmp_path: Path) -> None:
    (tmp_path / "shown.jsonl").write_text(json.dumps({"text": "The fox sang well."}) + "\n")
    shown = {"sources": [str(tmp_path / "shown.jsonl")]}
    found = material_of(reward_config(inputs, tmp_path / "out", demonstrations=shown)).demonstrations
    assert len(found.token_ids) == 1


@pytest.mark.parametrize(("overlong", "num_kept"), [("drop", 2), ("truncate", 3)])
def test_overlong_demonstrations_are_counted_and_dropped_or_cut_in_their_prompt(
    inputs: Path, tmp_path: Path, overlong: str, num_kept: int
) -> None:
    rows = [{"prompt": f"Tell {n}. " + "of the fox " * n, "completion": f" Good answer {n}."} for n in (1, 2, 90)]
    path = tmp_path / "shown.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = reward_config(inputs, tmp_path / "out", demonstrations={"sources": [str(path)]}, overlong=overlong)
    found = material_of(config).demonstrations
    tokenizer = AutoTokenizer.from_pretrained(config.base)
    assert (len(found.token_ids), found.num_overlong) == (num_kept, 1)
    assert all(len(ids) <= 64 and ids[-1] == tokenizer.eos_token_id for ids in found.token_ids)
    answers = [tokenizer.decode(ids, skip_special_tokens=True).endswith("Good answer 90.") for ids in found.token_ids]
    assert sum(answers) == num_kept - 2


def test_demonstrations_that_are_all_too_long_are_refused(inputs: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"Tell {n}. " + "of the fox " * 90, "completion": " Good."} for n in range(5)]
    path = tmp_path / "shown.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    error = refusal(reward_config(inputs, tmp_path / "out", demonstrations={"sources": [str(path)]}))
    assert error.violations[0].field == "demonstrations"


def test_without_demonstrations_the_best_answers_fix_the_scale(inputs: Path, tmp_path: Path) -> None:
    material = material_of(reward_config(inputs, tmp_path / "out"))
    best = [
        row["answer_ids"][max(range(len(row["levels"])), key=row["levels"].__getitem__)] for row in material.train.rows
    ]
    assert material.demonstrations.token_ids == best
    many = {"sources": [str(write_ranked_pairs(tmp_path / "many.jsonl", count=MAX_BEST_ANSWERS + 300))]}
    part = material_of(reward_config(inputs, tmp_path / "out", data=many))
    assert MAX_BEST_ANSWERS / 2 < len(part.demonstrations.token_ids) <= MAX_BEST_ANSWERS


def test_equal_scores_of_all_demonstrations_are_refused(inputs: Path, tmp_path: Path) -> None:
    model = fresh(inputs, tmp_path)
    with pytest.raises(InvalidArgumentError, match="different") as caught:
        normalise(model, [[1, 40, 41]] * 5)
    assert caught.value.violations[0].field == "demonstrations"


@pytest.mark.parametrize(("overlong", "num_kept"), [("drop", 3), ("truncate", 4)])
def test_positive_texts_that_are_too_long_are_counted_and_dropped_or_cut_before_their_end(
    inputs: Path, tmp_path: Path, overlong: str, num_kept: int
) -> None:
    config = labelled_config(inputs, tmp_path / "out", overlong=overlong, demonstration_tokens=8)
    long = tmp_path / "long.csv"
    rows = [f"{word} film {n},{n % 2}" for n, word in enumerate(["Bad", "Good", "Poor", "Fine", "Weak", "Great"])]
    long.write_text("\n".join(["sentence,label", *rows, "so " * 90 + "good,1"]) + "\n")
    data = config.data.model_copy(update={"sources": (str(long),)})
    found = material_of(config.model_copy(update={"data": data, "group_size": 2})).demonstrations
    tokenizer = AutoTokenizer.from_pretrained(config.base)
    assert (len(found.token_ids), found.num_overlong) == (num_kept, 1)
    assert all(len(ids) <= 64 and ids[-1] == tokenizer.eos_token_id for ids in found.token_ids)
