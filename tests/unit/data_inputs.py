"""Small data sets, made by the tests themselves, and where the shared ones are."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from tether_services.recipes.config import DataConfig

SHARED_DATA = Path(__file__).parents[3] / "shared" / "data"

GOOD_ROWS: dict[str, dict[str, Any]] = {
    "hh": {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello", "rejected": "\n\nHuman: Hi\n\nAssistant: What"},
    "pairs": {"prompt": "Hi", "chosen": "Hello", "rejected": "What"},
    "ranked": {"prompt": "Hi", "answers": ["Hello", "Hey", "What"], "ranks": [0, 1, 1]},
    "instruction": {"instruction": "Add.", "input": "1 and 2", "output": "3"},
    "messages": {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
    "text": {"text": "Once upon a time."},
    "labelled": {"sentence": "A warm film.", "label": 1},
    "oasst": {
        "message_tree_id": "1",
        "prompt": {
            "text": "Hi",
            "role": "prompter",
            "replies": [
                {"text": "Hello", "role": "assistant", "rank": 0, "replies": []},
                {"text": "What", "role": "assistant", "rank": 1, "replies": []},
            ],
        },
    },
}
"""One row of each shape."""


def shared_file(name: str) -> str:
    """Return the path of a shared data file, or skip the test where that folder is absent."""
    if not SHARED_DATA.is_dir():
        pytest.skip("../shared/data is absent; the same code runs on data made in the other tests")
    return str(SHARED_DATA / name)


def write_rows(path: Path, rows: list[Any]) -> str:
    """Write rows as JSON lines, packed where the name ends in .gz, and return the path."""
    text = "".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


def pair(number: int, *, prompt: str | None = None) -> dict[str, str]:
    """Return a row of the shape pairs; another number is another prompt."""
    return {"prompt": prompt or f"Question {number}?", "chosen": f"Yes {number}", "rejected": f"No {number}"}


def data_config(*sources: str, **changes: Any) -> DataConfig:
    """Return settings that keep half of the prompts for validation."""
    values: dict[str, Any] = {"sources": sources, "validation_fraction": 0.5, **changes}
    return DataConfig(**values)
