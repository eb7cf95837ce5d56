"""What a user sees of a stage: its own line and its own warnings, and nothing of the libraries below."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from tests.unit.stage_inputs import sft_config, write_demonstrations

LINE = re.compile(r"^sft(: token ids)? (\d+)/\2  (loss .*)?\d:\d\d:\d\d elapsed, 0:00:00 left$")
"""The line of a piece of work that came to its end, on a stream that is no terminal."""


def run_command(tmp_path: Path, *arguments: str, **changes: Any) -> tuple[list[str], list[str]]:
    """Return the lines that `tether train sft` writes to stdout and to stderr."""
    config = sft_config(tmp_path, tmp_path / "out", **changes)
    path = tmp_path / "sft.toml"
    path.write_text(tomli_w.dumps(config.model_dump(mode="json", exclude_none=True)))
    command = [sys.executable, "-m", "tether_services", "train", "sft", "--config", str(path), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines(), [line for line in done.stderr.splitlines() if line.strip()]


@pytest.mark.parametrize(
    "changes",
    [{}, {"packing": True, "quantization": "nf4"}, {"quantization": "int8"}],
    ids=lambda changes: "-".join(changes) or "plain",
)
def test_a_stage_shows_one_line_and_prints_the_folder(changes: dict[str, Any], tmp_path: Path) -> None:
    training = {"max_steps": 4, "eval_every": 2, "checkpoint_every": 2}
    out, err = run_command(tmp_path, training=training, **changes)
    assert out == [str(tmp_path / "out")]
    assert len(err) == 1
    assert LINE.match(err[0])
    assert "4/4" in err[0] and "loss" in err[0] and "validation" in err[0]


def test_many_rows_have_a_line_of_their_own_while_they_are_read(tmp_path: Path) -> None:
    path = write_demonstrations(tmp_path / "many.jsonl", count=4500, seed=5)
    training = {"max_steps": 1, "eval_every": 1, "checkpoint_every": 1}
    data = {"sources": [str(path)], "validation_fraction": 0.01}
    _, err = run_command(tmp_path, training=training, data=data)
    assert [bool(LINE.match(line)) for line in err] == [True, True]
    assert err[0].startswith("sft: token ids")
