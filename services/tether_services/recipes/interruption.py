"""Ctrl-C during a training: what is being computed or written is finished first."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

__all__ = ["Interruption", "interruption"]


class Interruption(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """Raises KeyboardInterrupt between two steps, or between two batches of an evaluation, once it was asked for.

    Raised anywhere, it could meet a library that turns it into another error, or half a file.
    """

    def __init__(self) -> None:
        self.asked = threading.Event()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """End the training after a step whose figures and checkpoint are written."""
        self._end()

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """End the training in an evaluation, unless a checkpoint follows."""
        if not control.should_save:
            self._end()

    def _end(self) -> None:
        if self.asked.is_set():
            raise KeyboardInterrupt


@contextmanager
def interruption() -> Iterator[Interruption]:
    """Yield a callback that a first Ctrl-C asks to end the training; a second one ends it at once."""
    callback = Interruption()
    is_ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN  # as in a job that a shell runs in the background
    if is_ignored or threading.current_thread() is not threading.main_thread():  # only that one may take signals
        yield callback
        return

    def ask(number: int, frame: FrameType | None) -> None:
        callback.asked.set()
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield callback
    finally:
        signal.signal(signal.SIGINT, before)
