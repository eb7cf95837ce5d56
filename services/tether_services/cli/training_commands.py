"""`tether train STAGE`: the offline stages on a command line."""

from __future__ import annotations

from collections.abc import Sequence

from tether_services.recipes.config import PretrainConfig, RewardModelConfig
from tether_services.runtime.settings import parse_arguments


def train(stage: str, arguments: Sequence[str]) -> int:
    """Run a stage, print the folder that it wrote, and return 0.

    Args:
        stage: "pretrain" or "reward".
        arguments: --config, --set, --dry-run.
    """
    print((_pretrain if stage == "pretrain" else _reward)(arguments))
    return 0


def _pretrain(arguments: Sequence[str]) -> object:
    config = parse_arguments(
        PretrainConfig, program="tether train pretrain", env_prefix="TETHER_PRETRAIN__", arguments=arguments
    )
    from tether_services.recipes.pretrain import run_pretrain

    return run_pretrain(config)


def _reward(arguments: Sequence[str]) -> object:
    config = parse_arguments(
        RewardModelConfig, program="tether train reward", env_prefix="TETHER_TRAIN_REWARD__", arguments=arguments
    )
    from tether_services.recipes.reward_model import run_reward_model

    return run_reward_model(config)
