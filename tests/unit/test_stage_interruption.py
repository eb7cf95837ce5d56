"""Ctrl-C during a training."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import Trainer, TrainerCallback

from tests.unit.stage_inputs import sft_config
from tether_services.recipes.interruption import interruption
from tether_services.recipes.sft import run_sft
from tether_services.recipes.stage import Mode


@pytest.fixture(autouse=True)
def taken_interrupts() -> Iterator[None]:
    """Ctrl-C as in the foreground, however the tests themselves are run."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class PressedAt(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """Presses Ctrl-C in the middle of a step that ends with a checkpoint."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self._step:
            os.kill(os.getpid(), signal.SIGINT)


def test_the_step_and_its_checkpoint_are_finished_and_a_resume_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = {"max_steps": 6, "eval_every": 3, "checkpoint_every": 3}
    config = sft_config(tmp_path, tmp_path / "out", training=steps)
    begin = Trainer.train

    def train(trainer: Any, **arguments: Any) -> Any:
        trainer.add_callback(PressedAt(2))
        return begin(trainer, **arguments)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Trainer, "train", train)
        run_sft(config)
    assert (config.output / "checkpoints" / "checkpoint-3" / "complete").is_file()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert run_sft(config, Mode(resume=True)) == config.output


def test_a_second_ctrl_c_ends_at_once() -> None:
    with pytest.raises(KeyboardInterrupt), interruption() as asked:
        os.kill(os.getpid(), signal.SIGINT)
        assert asked.asked.is_set()
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("the second one is not held back")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_job_in_the_background_goes_on_ignoring_it() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with interruption() as asked:
        os.kill(os.getpid(), signal.SIGINT)
        assert not asked.asked.is_set()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_outside_the_main_thread_signals_are_left_alone() -> None:
    found: list[bool] = []

    def work() -> None:
        with interruption() as asked:
            found.append(asked.asked.is_set())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [False]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
