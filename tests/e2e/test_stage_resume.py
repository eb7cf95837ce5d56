"""A stage that is killed at any moment, again and again, ends as one that nothing happened to, to the bit.

A stage joins with a `Case`: its name, its function and its settings for a folder of inputs and an output folder.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest

from tests.unit.preference_inputs import dpo_config
from tests.unit.recipe_inputs import pretrain_config
from tests.unit.reward_inputs import labelled_config, reward_config
from tests.unit.stage_inputs import sft_config
from tether_services.recipes.config import StageConfig
from tether_services.recipes.stage import Mode

POLL_SECONDS = 0.0005
START_SECONDS = 120.0
NUM_KILLS = 3
SIGKILL_EXIT = -9
PROCESSES = multiprocessing.get_context("forkserver")
"""Every run is a process of its own; the libraries are imported once."""


@dataclass(frozen=True)
class Case:
    """A stage that can be interrupted."""

    name: str
    function: str
    """module:function, called with settings and mode."""
    make_config: Callable[[Path, Path], StageConfig]
    """From a folder for inputs and the output folder to settings with at least nine checkpoints of a short run."""


PRETRAINING = {"max_steps": 20, "rows_per_step": 64, "micro_batch_rows": 32, "eval_every": 2, "checkpoint_every": 2}
"""Of a pretraining over three epochs."""

CASES = (
    Case(
        "sft-lora-dropout",
        "tether_services.recipes.sft:run_sft",
        lambda inputs, output: sft_config(inputs, output, lora={"rank": 4, "alpha": 8, "dropout": 0.2}),
    ),
    Case(
        "sft-whole-packed-best",
        "tether_services.recipes.sft:run_sft",
        lambda inputs, output: sft_config(
            inputs,
            output,
            lora={"rank": 0},
            packing=True,
            training={"eval_every": 1, "checkpoint_every": 1, "keep_best": True, "learning_rate": 0.01},
        ),
    ),
    Case(
        "sft-int8-adamw-8bit",
        "tether_services.recipes.sft:run_sft",
        lambda inputs, output: sft_config(
            inputs,
            output,
            quantization="int8",
            lora={"rank": 64, "alpha": 64},  # smaller matrices would keep their state in 32 bits
            training={"optimizer": "adamw_8bit", "gradient_checkpointing": True},
        ),
    ),
    Case(
        "sft-nf4",
        "tether_services.recipes.sft:run_sft",
        lambda inputs, output: sft_config(inputs, output, quantization="nf4"),
    ),
    Case(
        "dpo-lora-dropout",
        "tether_services.recipes.dpo:run_dpo",
        lambda inputs, output: dpo_config(
            inputs,
            output=output,
            lora={"rank": 4, "alpha": 8, "dropout": 0.2},
            training={"num_epochs": 5, "checkpoint_every": 2, "eval_every": 3, "log_every": 5},
        ),
    ),
    Case(
        "dpo-whole-ipo-best",
        "tether_services.recipes.dpo:run_dpo",
        lambda inputs, output: dpo_config(
            inputs,
            output=output,
            lora={"rank": 0},
            kind="ipo",
            training={"num_epochs": 5, "checkpoint_every": 1, "eval_every": 1, "keep_best": True},
        ),
    ),
    Case(
        "pretrain",
        "tether_services.recipes.pretrain:run_pretrain",
        lambda inputs, output: pretrain_config(inputs, output=output, training=PRETRAINING),
    ),
    Case(
        "pretrain-last-of-adamw",
        "tether_services.recipes.pretrain:run_pretrain",
        lambda inputs, output: pretrain_config(
            inputs,
            output=output,
            matrix_optimizer="adamw",
            dtype="bfloat16",
            training=PRETRAINING | {"keep_best": False, "eval_every": 3},
        ),
    ),
    Case(
        "reward-rankings-lora",
        "tether_services.recipes.reward_model:run_reward_model",
        lambda inputs, output: reward_config(
            inputs,
            output,
            lora={"rank": 4, "alpha": 8, "dropout": 0.2, "target_modules": ["o_proj", "embed_tokens"]},
            training={"eval_every": 3, "checkpoint_every": 2},
        ),
    ),
    Case(
        "reward-labelled-whole-best",
        "tether_services.recipes.reward_model:run_reward_model",
        lambda inputs, output: labelled_config(
            inputs,
            output,
            lora={"rank": 0},
            dropout=0.2,
            token_dropout=0.2,
            training={"eval_every": 2, "checkpoint_every": 2, "keep_best": True, "max_steps": 20},
        ),
    ),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_stage_killed_again_and_again_ends_like_one_that_was_not(case: Case, tmp_path: Path) -> None:
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    whole, killed = (case.make_config(inputs, tmp_path / name / "stage") for name in ("whole", "killed"))
    _wait(_start(case, whole, resume=False))
    was_writing = [_kill_at(case, killed, path, delay) for path, delay in _moments(case, whole, killed)]
    assert any(was_writing), "no checkpoint was interrupted while it was written"
    assert not (killed.output / "manifest.json").exists()
    _wait(_start(case, killed, resume=True))
    assert _content(killed.output) == _content(whole.output)


def _moments(case: Case, finished: StageConfig, config: StageConfig) -> list[tuple[Path, float]]:
    """Return what to wait for, and how many seconds after it to strike.

    Twice while a checkpoint is written, once after one, and once while the artifact itself is.
    """
    rows = [json.loads(line) for line in (finished.output / "history.jsonl").read_text().splitlines()]
    every = config.training.checkpoint_every
    num_checkpoints = max(row["step"] for row in rows) // every
    assert num_checkpoints >= 3 * NUM_KILLS, f"{case.name} has only {num_checkpoints} checkpoints"
    rng = random.Random(case.name)
    share = num_checkpoints // NUM_KILLS
    targets = [rng.randint(index * share + 1, (index + 1) * share) for index in range(NUM_KILLS)]
    moments = [(config.output / "checkpoints" / f"checkpoint-{target * every}", 0.0) for target in targets]
    after = rng.randrange(NUM_KILLS)
    moments[after] = moments[after][0] / "complete", rng.uniform(0.0, 0.1)
    return [*moments, (config.output / "history.jsonl", 0.0)]


def _kill_at(case: Case, config: StageConfig, awaited: Path, delay: float) -> bool:
    """Start or go on, kill the process at the moment, and return whether that left an unfinished checkpoint."""
    process = _start(case, config, resume=config.output.exists())
    deadline = time.monotonic() + START_SECONDS
    while not awaited.exists():
        assert process.is_alive(), f"{case.name} ended with {process.exitcode} before {awaited.name}"
        assert time.monotonic() < deadline, f"{case.name} did not come to {awaited}"
        time.sleep(POLL_SECONDS)
    time.sleep(delay)
    process.kill()
    process.join()
    assert process.exitcode == SIGKILL_EXIT
    checkpoints = (config.output / "checkpoints").glob("checkpoint-*")
    return any(not (path / "complete").exists() for path in checkpoints)


def _start(case: Case, config: StageConfig, *, resume: bool) -> ForkServerProcess:
    PROCESSES.set_forkserver_preload(["tether_services.recipes.sft"])
    process = PROCESSES.Process(target=_run, args=(case.function, config, Mode(resume=resume)))
    process.start()
    return process


def _run(function: str, config: StageConfig, mode: Mode) -> None:
    module, _, name = function.partition(":")
    getattr(importlib.import_module(module), name)(config, mode)


def _wait(process: ForkServerProcess) -> None:
    process.join()
    assert process.exitcode == 0


def _content(folder: Path) -> dict[str, Any]:
    """Return every file by its path; times are left out, and TensorBoard's files, which are full of them."""
    files = [path for path in folder.rglob("*") if path.is_file() and "tensorboard" not in path.parts]
    content: dict[str, Any] = {str(path.relative_to(folder)): path.read_bytes() for path in files}
    manifest = json.loads(content["manifest.json"])
    manifest.pop("wall_seconds")
    return content | {"manifest.json": manifest}
