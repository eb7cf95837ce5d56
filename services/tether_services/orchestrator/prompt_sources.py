"""Where prompts come from: a file, a folder of data files, or a data set on a hub."""

from __future__ import annotations

import os
from pathlib import Path

from tether.errors import InvalidArgumentError
from tether_services.orchestrator.config import RunConfig
from tether_services.orchestrator.prompts import read_prompts
from tether_services.runtime.model_folder import is_hub_name

__all__ = ["is_dataset", "load_prompt_lists", "load_prompts"]

COLUMNS = ("prompt", "text")
"""Columns that may hold the prompts; the first one that is there does."""
FILE_SUFFIXES = (".txt", ".jsonl")


def is_dataset(source: str) -> bool:
    """Return whether a source is a folder or a hub name (owner/name), which only the `datasets` library can read."""
    return os.path.isdir(source) or (is_hub_name(source) and not source.endswith(FILE_SUFFIXES))


def load_prompts(source: str, *, field: str) -> list[str]:
    """Return the prompts of a source.

    Args:
        source: A .txt or .jsonl file; or a folder of data files (CSV, JSON lines, Parquet, ...) or the hub name of a
            data set, of which the `train` split is read: column `prompt`, else `text`.
        field: Name of the setting, for errors.

    Raises:
        InvalidArgumentError: The source cannot be read or holds no prompts.
    """
    return _read_dataset(source, field=field) if is_dataset(source) else read_prompts(Path(source), field=field)


def load_prompt_lists(config: RunConfig) -> tuple[list[str], list[str] | None]:
    """Return the prompts of a run, and the held-out ones if they have a source of their own.

    Raises:
        InvalidArgumentError: A source cannot be read or holds no prompts.
    """
    prompts, own = load_prompts(config.prompts, field="prompts"), config.evaluation_prompts
    return prompts, load_prompts(own, field="evaluation_prompts") if own else None


def _read_dataset(source: str, *, field: str) -> list[str]:
    from datasets import load_dataset

    try:
        rows = load_dataset(source, split="train")
    except Exception as error:  # the library raises errors of many others: network, parsers, file systems
        message = f"Cannot read the data set {source}: {type(error).__name__}: {str(error)[:300]}"
        raise InvalidArgumentError(message, field=field) from error
    column = next((name for name in COLUMNS if name in rows.column_names), None)
    if column is None:
        found = ", ".join(rows.column_names)
        raise InvalidArgumentError(f"{source} needs a column named prompt or text; it has {found}.", field=field)
    prompts = []
    for number, prompt in enumerate(rows[column]):
        if not isinstance(prompt, str) or not prompt.strip():
            raise InvalidArgumentError(f"{source} row {number} has no text in column {column}.", field=field)
        prompts.append(prompt)
    if not prompts:
        raise InvalidArgumentError(f"{source} holds no prompt.", field=field)
    return prompts
