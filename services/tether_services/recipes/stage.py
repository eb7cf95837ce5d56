"""What all stages do alike: take the output folder, go on after an interruption, train, write the artifact."""

from __future__ import annotations

import fcntl
import json
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, set_seed

from tether.errors import FailedPreconditionError, InvalidArgumentError, TetherError
from tether_services.recipes.artifact import MANIFEST_NAME, describe_beginning, portable, write_manifest
from tether_services.recipes.checkpoints import latest_checkpoint
from tether_services.recipes.config import FineTuneConfig, StageConfig
from tether_services.recipes.data.hub import UNKNOWN_REVISION
from tether_services.recipes.plots import draw_history
from tether_services.recipes.quiet import quiet_libraries
from tether_services.recipes.training import check_trackers, train, train_in_float32, trainer_arguments
from tether_services.runtime.durable import write_text
from tether_services.runtime.model_folder import find_model_folder

__all__ = ["Mode", "Stage", "open_stage"]

HISTORY_NAME = "history.jsonl"
STATE_NAME = "stage.json"
"""Beside the checkpoints: what the stage started from; see `describe_beginning`."""
TIMES = ("runtime", "per_second", "total_flos", "train_loss")
"""Figures of the trainer that a resumed run cannot repeat are left out of the history."""


TEMPORARY = re.compile(r"\..+\.[a-z0-9_]{8}")
"""Names that files have while they are written; see `write_text`."""


@dataclass(frozen=True, slots=True)
class Mode:
    """How a stage is run."""

    resume: bool = False
    """Go on from the newest checkpoint in the output folder; begin where there is none."""
    dry_run: bool = False
    """Load, count and measure one micro-batch, and write nothing."""


@dataclass
class Stage:
    """A stage between taking its folder and writing its manifest."""

    name: str
    config: StageConfig
    mode: Mode
    work: Path
    """Checkpoints and the state of the run; removed at the end."""
    started: float = field(default_factory=time.monotonic)

    @property
    def is_finished(self) -> bool:
        """Whether the output folder holds the finished artifact of these settings, so that nothing is to be done."""
        return not self.mode.dry_run and (self.config.output / MANIFEST_NAME).is_file()

    def arguments(self, *, num_rows: int) -> dict[str, Any]:
        """Return the arguments of the trainer; see `trainer_arguments`."""
        return trainer_arguments(self.config, num_rows=num_rows, folder=self.work)

    def train(self, trainer: Trainer) -> dict[str, float]:
        """Train to the end, write history and plot, and return the validation figures of the weights that it ends with.

        Raises:
            FailedPreconditionError: A loss is no longer a finite number.
        """
        train_in_float32(trainer.model)
        checkpoint = latest_checkpoint(self.work)
        train(trainer, config=self.config, title=self.name, folder=self.config.output, checkpoint=checkpoint)
        trainer.model.eval()
        trainer.model.config.use_cache = True  # off during training; the trainer leaves it off, and so in the files
        history = [_without_times(row) for row in trainer.state.log_history]
        rows = [row for row in history if len(row) > 2]
        write_text(self.config.output / HISTORY_NAME, "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))
        draw_history(rows, title=self.name, path=self.config.output / "plots" / "training.svg")
        measured = [row for row in rows if "eval_loss" in row]
        kept_step = trainer.state.best_global_step if self.config.training.keep_best else measured[-1]["step"]
        kept = next(row for row in measured if row["step"] == kept_step)
        return {name.removeprefix("eval_"): value for name, value in kept.items() if name.startswith("eval_")}

    def finish(self, *, metrics: Mapping[str, Any], data: Mapping[str, Any]) -> Path:
        """Write the manifest, which makes the artifact complete, remove the checkpoints, and return the folder.

        The manifest states data and base as they were when the stage began.

        Args:
            metrics: Figures, JSON.
            data: Report of what was read, JSON.
        """
        beginning = json.loads((self.work / STATE_NAME).read_text(encoding="utf-8"))
        seconds = round(time.monotonic() - self.started, 1)
        report = portable(data)
        write_manifest(self.config.output, beginning, metrics=metrics, data_report=report, wall_seconds=seconds)
        shutil.rmtree(self.work)
        return self.config.output


@contextmanager
def open_stage(name: str, config: StageConfig, mode: Mode) -> Iterator[Stage]:
    """Take the output folder for one process, with threads and seeds set.

    Raises:
        InvalidArgumentError: The folder cannot be written, another process has it, or it holds something else; a
            tracker is not installed.
        FailedPreconditionError: What is there belongs to other settings or other data.
    """
    check_trackers(config.training.trackers)
    quiet_libraries()
    torch.set_num_threads(config.threads)
    set_seed(config.seed)
    if mode.dry_run:
        with tempfile.TemporaryDirectory(prefix="tether-stage-") as scratch:
            yield Stage(name, config, mode, Path(scratch))
        return
    work = config.output / "checkpoints"
    with _locked(config.output):
        _check_same_stage(name, config, mode, work)
        _remove_leftovers(config.output, work)
        try:
            yield Stage(name, config, mode, work)
        except TetherError:
            _forget_beginning(config.output, work)
            raise


def _forget_beginning(folder: Path, work: Path) -> None:
    """Empty the folder of a stage that failed before its first checkpoint: other settings may use it again."""
    if work.is_dir() and not any(work.glob("checkpoint-*")):
        shutil.rmtree(work)
        shutil.rmtree(folder / "tensorboard", ignore_errors=True)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep a second process out of the folder; the operating system ends the lock with this process."""
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("wb")
    except OSError as error:
        raise InvalidArgumentError(f"cannot write {folder}: {error.strerror}", field="output") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InvalidArgumentError(f"another process is writing {folder}", field="output") from error
        try:
            yield
        finally:
            (folder / ".lock").unlink(missing_ok=True)
            if is_new and not any(folder.iterdir()):
                folder.rmdir()


def _check_same_stage(name: str, config: StageConfig, mode: Mode, work: Path) -> None:
    """Refuse a folder with anything in it but the same stage, begun or finished, and `--resume`."""
    wanted = _describe_beginning(name, config)
    state, finished = work / STATE_NAME, config.output / MANIFEST_NAME
    there = sorted(path.name for path in config.output.iterdir() if path.name != ".lock")
    if not there or (there == [work.name] and not state.is_file()):
        work.mkdir(exist_ok=True)
        write_text(state, json.dumps(wanted))
        return
    if _has_no_checkpoint(there, work):
        if json.loads(state.read_text(encoding="utf-8")) != _plain(wanted):
            shutil.rmtree(work)  # nothing was learned: other settings may begin here
            work.mkdir()
            write_text(state, json.dumps(wanted))
        return
    begun = next((path for path in (finished, state) if path.is_file()), None)
    found = json.loads(begun.read_text(encoding="utf-8")) if begun else {}
    if not mode.resume or not found:
        what = "a finished stage" if finished.is_file() else "an unfinished stage" if found else ", ".join(there[:3])
        way = "go on with --resume, or " if found else ""
        raise InvalidArgumentError(f"{config.output} holds {what}; {way}name another folder", field="output")
    changed = _differences({key: found.get(key) for key in wanted}, _plain(wanted))
    if changed:
        message = (
            f"{config.output} was begun with other settings or data ({', '.join(changed[:5])}); name another folder"
        )
        raise FailedPreconditionError(message, field="output", reason="SETTINGS_CHANGED")


def _has_no_checkpoint(there: Sequence[str], work: Path) -> bool:
    """Return whether a stage was begun in the folder and ended, however it did, before its first checkpoint."""
    return (
        set(there) <= {work.name, "tensorboard"}
        and (work / STATE_NAME).is_file()
        and not any(work.glob("checkpoint-*"))
    )


def _plain(content: Mapping[str, Any]) -> Any:
    """Return content as it comes back from a JSON file."""
    return json.loads(json.dumps(content))


def _describe_beginning(name: str, config: StageConfig) -> dict[str, Any]:
    """Return what the manifest will say of settings, data and base, which must not change before a resume."""
    parent = find_model_folder(config.base, field="base") if isinstance(config, FineTuneConfig) else None
    try:
        return describe_beginning(name, config, parent=parent)
    except InvalidArgumentError as error:
        raise InvalidArgumentError(error.message, field="base") from error


def _remove_leftovers(folder: Path, work: Path) -> None:
    """Remove what a process that was killed while it wrote a file, or while it cleaned up, has left."""
    if (folder / MANIFEST_NAME).is_file():
        shutil.rmtree(work, ignore_errors=True)
    for path in folder.rglob(".*"):
        if path.is_file() and TEMPORARY.fullmatch(path.name):
            path.unlink()


def _differences(left: Any, right: Any, path: str = "") -> Sequence[str]:
    """Return the paths at which two JSON values differ; a revision that cannot be known now is that of before."""
    if isinstance(left, dict) and isinstance(right, dict):
        keys = [*left, *(key for key in right if key not in left)]
        return [
            found
            for key in keys
            for found in _differences(left.get(key), right.get(key), f"{path}.{key}" if path else key)
        ]
    if isinstance(left, list) and isinstance(right, list) and len(left) == len(right):
        return [path] if any(_differences(*items) for items in zip(left, right, strict=True)) else []
    return [] if left == right or right == UNKNOWN_REVISION else [path]


def _without_times(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the figures in one order: checkpoints sort those that they hold."""
    figures = {name: row[name] for name in sorted(row) if not any(time in name for time in TIMES)}
    return {"step": figures.pop("step"), **figures}
