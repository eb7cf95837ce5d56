"""`tether train STAGE`: the offline stages on a command line."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from tether.errors import InvalidArgumentError
from tether_services.recipes.config import DpoConfig, PretrainConfig, RewardModelConfig, SftConfig, StageConfig
from tether_services.runtime.settings import (
    add_settings_arguments,
    describe_settings,
    exit_with_config_error,
    load_settings,
)

__all__ = ["COMMANDS", "StageCommand", "train"]

DRY_RUN = "load everything, count the tokens, estimate memory and time, and write nothing"
RESUME = "go on from the newest checkpoint in the output folder; begin where there is none"


@dataclass(frozen=True, slots=True)
class StageCommand:
    """How a stage is called."""

    config: type[StageConfig]
    module: str
    """In `tether_services.recipes`; imported after the settings were found to be good."""
    function: str
    """Takes the settings and a `Mode`, and returns the folder that it wrote."""
    env_prefix: str
    """Of settings in environment variables."""


COMMANDS: Final[Mapping[str, StageCommand]] = {
    "pretrain": StageCommand(PretrainConfig, "pretrain", "run_pretrain", "TETHER_PRETRAIN__"),
    "sft": StageCommand(SftConfig, "sft", "run_sft", "TETHER_SFT__"),
    # TETHER_REWARD__ are the settings of the reward service.
    "reward": StageCommand(RewardModelConfig, "reward_model", "run_reward_model", "TETHER_TRAIN_REWARD__"),
    "dpo": StageCommand(DpoConfig, "dpo", "run_dpo", "TETHER_DPO__"),
}


def train(stage: str, arguments: Sequence[str]) -> int:
    """Run a stage, print the folder that it wrote, and return 0; a dry run prints its estimate instead.

    Args:
        stage: A key of `COMMANDS`.
        arguments: --config, --set, --resume, --dry-run.

    Raises:
        KeyboardInterrupt: Ctrl-C, with what to do next; a dry run has nothing to go on with.
        TetherError: As the stage says.
    """
    command = COMMANDS[stage]
    known = _parse(stage, command, arguments)
    try:
        config = load_settings(
            command.config, env_prefix=command.env_prefix, config=known.config, overrides=known.overrides
        )
    except InvalidArgumentError as error:
        exit_with_config_error(error)
    try:
        folder = _run(command, config, known)
    except KeyboardInterrupt:
        if known.dry_run:
            raise
        raise KeyboardInterrupt("go on with --resume") from None
    if not known.dry_run:
        print(folder)
    return 0


def _parse(stage: str, command: StageCommand, arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=f"tether train {stage}",
        description=(command.config.__doc__ or "").strip().splitlines()[0],
        epilog=describe_settings(command.config, env_prefix=command.env_prefix),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_settings_arguments(parser, dry_run=DRY_RUN)
    parser.add_argument("--resume", action="store_true", help=RESUME)
    known = parser.parse_args(arguments)
    if known.resume and known.dry_run:
        parser.error("a dry run begins nothing and has nothing to go on with: give --resume or --dry-run")
    return known


def _run(command: StageCommand, config: StageConfig, known: argparse.Namespace) -> object:
    from tether_services.recipes.stage import Mode

    run = getattr(importlib.import_module(f"tether_services.recipes.{command.module}"), command.function)
    return run(config, Mode(resume=known.resume, dry_run=known.dry_run))
