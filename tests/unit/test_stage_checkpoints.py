"""Checkpoints after a process that was killed between any two of their steps."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from tether_services.recipes.checkpoints import COMPLETE, CheckpointGuard, latest_checkpoint, step_of


def write_checkpoint(folder: Path, step: int, *, is_complete: bool, best: str | None = None) -> Path:
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "weights").write_bytes(b"w" * step)
    TrainerState(global_step=step, best_model_checkpoint=best).save_to_json(str(checkpoint / "trainer_state.json"))
    if is_complete:
        (checkpoint / COMPLETE).write_text("")
    return checkpoint


def save(folder: Path, step: int, *, keep: int, best: str | None = None) -> None:
    """Let the guard see what the trainer has just written."""
    write_checkpoint(folder, step, is_complete=False)
    state = TrainerState(global_step=step, best_model_checkpoint=best)
    arguments = TrainingArguments(output_dir=str(folder), use_cpu=True, report_to=[])
    CheckpointGuard(keep).on_save(arguments, state, TrainerControl())


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_run_that_has_not_come_to_a_checkpoint_begins(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "missing") is None
    assert latest_checkpoint(tmp_path) is None


def test_an_interrupted_checkpoint_is_removed_and_the_one_before_it_taken(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 4, is_complete=True)
    write_checkpoint(tmp_path, 6, is_complete=False)
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-4"
    assert names(tmp_path) == ["checkpoint-4"]


def test_the_newest_is_the_one_with_the_most_steps_and_not_the_last_by_name(tmp_path: Path) -> None:
    for step in (8, 10, 9):
        write_checkpoint(tmp_path, step, is_complete=True)
    newest = latest_checkpoint(tmp_path)
    assert newest is not None and step_of(newest) == 10


def test_a_kill_between_marking_and_removing_leaves_two_and_the_next_save_removes_both(tmp_path: Path) -> None:
    for step in (2, 4):
        write_checkpoint(tmp_path, step, is_complete=True)
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-4"
    save(tmp_path, 6, keep=1)
    assert names(tmp_path) == ["checkpoint-6"]
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-6"


def test_a_kill_before_marking_keeps_the_old_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 2, keep=1)
    write_checkpoint(tmp_path, 4, is_complete=False)
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    assert (tmp_path / "checkpoint-2" / "weights").read_bytes() == b"ww"


@pytest.mark.parametrize(("keep", "kept"), [(1, [8]), (2, [6, 8]), (9, [2, 4, 6, 8])])
def test_as_many_checkpoints_stay_as_are_asked_for(keep: int, kept: list[int], tmp_path: Path) -> None:
    for step in (2, 4, 6, 8):
        save(tmp_path, step, keep=keep)
    assert sorted(step_of(path) for path in tmp_path.iterdir()) == kept


def test_the_best_checkpoint_stays_besides(tmp_path: Path) -> None:
    for step in (2, 4, 6):
        save(tmp_path, step, keep=1, best=str(tmp_path / "checkpoint-2"))
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-6"]


def test_the_best_checkpoint_is_named_where_the_folder_is_now(tmp_path: Path) -> None:
    for step in (2, 4):
        write_checkpoint(tmp_path, step, is_complete=True, best="/somewhere/else/checkpoint-2")
    newest = latest_checkpoint(tmp_path)
    assert newest is not None
    state = TrainerState.load_from_json(str(newest / "trainer_state.json"))
    assert (state.best_model_checkpoint, state.global_step) == (str(tmp_path / "checkpoint-2"), 4)


@pytest.mark.parametrize("saves", [True, False])
def test_figures_are_logged_where_a_checkpoint_follows(saves: bool, tmp_path: Path) -> None:
    control = TrainerControl(should_save=saves)
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    CheckpointGuard(1).on_step_end(arguments, TrainerState(), control)
    assert control.should_log is saves
