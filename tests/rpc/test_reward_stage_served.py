"""A folder of the reward stage in the real service: it loads as it is, and demonstrations have mean 0, deviation 1."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from tests.rpc.serving import LOCAL, run, serving
from tests.unit.recipe_inputs import write_stories
from tests.unit.reward_inputs import labelled_config, reward_config
from tether.reward import RewardClient, ScoreItem
from tether_services.recipes.config import RewardModelConfig
from tether_services.recipes.data.rendering import Renderer
from tether_services.recipes.reward_model import read_material, run_reward_model
from tether_services.reward.config import RewardSettings
from tether_services.reward.service import RewardService

MAX_ITEMS = 64


def served_scores(folder: Path, rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """Return the scores that a service of its own gives to token ids, the first two of each as the prompt."""
    settings = RewardSettings.model_validate(
        LOCAL | {"admin_address": "127.0.0.1:0"} | {"model": str(folder), "max_items": MAX_ITEMS, "device": "cpu"}
    )

    async def main() -> list[float]:
        async with (
            serving(settings, lambda registry: RewardService(settings, registry)) as served,
            RewardClient(served.target, timeout_seconds=30) as client,
        ):
            scores = []
            for start in range(0, len(rows), MAX_ITEMS):
                part = rows[start : start + MAX_ITEMS]
                items = [ScoreItem(prompt_token_ids=tuple(r[:2]), response_token_ids=tuple(r[2:])) for r in part]
                result = await client.score(items)
                assert not [score.error for score in result.scores if score.error]
                scores += [float(score.score or 0.0) for score in result.scores]
            return scores

    return torch.tensor(run(main())).double()


def adapter_config(tmp_path: Path) -> RewardModelConfig:
    stories = {"sources": [str(write_stories(tmp_path / "stories.txt", count=100))]}
    return reward_config(tmp_path, tmp_path / "reward", demonstrations=stories, demonstration_tokens=20)


def whole_config(tmp_path: Path) -> RewardModelConfig:
    return labelled_config(tmp_path, tmp_path / "reward", lora={"rank": 0})


@pytest.mark.parametrize("make", [adapter_config, whole_config])
def test_served_demonstrations_have_mean_0_and_deviation_1(
    make: Callable[[Path], RewardModelConfig], tmp_path: Path
) -> None:
    config = make(tmp_path)
    rows = read_material(config, Renderer(AutoTokenizer.from_pretrained(config.base))).demonstrations.token_ids
    scores = served_scores(run_reward_model(config), rows)
    assert len(scores) == len(rows) >= 72
    assert float(scores.mean()) == pytest.approx(0.0, abs=1e-3)
    assert float(scores.std(correction=0)) == pytest.approx(1.0, abs=1e-3)
