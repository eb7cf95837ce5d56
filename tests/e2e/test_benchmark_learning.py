"""The learning benchmark on the real services, as small as it goes: what it measures there is noise."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "learning.py"
SMALL = [
    *("--steps", "1", "--seeds", "0", "--parallel", "1"),
    *("--set", "prompts_per_step=2", "--set", "responses_per_prompt=2", "--set", "max_response_tokens=8"),
    *("--set", "evaluation_count=4", "--set", "ppo.minibatches=1"),
]


def run_benchmark(study: str, output: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), study, "--output", str(output), *SMALL, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=output)


@pytest.mark.slow
def test_the_studies_run_and_a_finished_run_is_not_made_again(tmp_path: Path) -> None:
    first = run_benchmark("frontier", tmp_path, "--kl-coefs", "0.4", "--figures", str(tmp_path / "figures"))
    assert first.returncode == 0, first.stdout + first.stderr
    assert "1/1 ppo-kl-0.4 seed 0: started" in first.stdout
    rows = json.loads((tmp_path / "frontier.json").read_text(encoding="utf-8"))["rows"]
    assert [row["policy"] for row in rows[:5]] == [f"best of {n}" for n in (1, 2, 4, 8, 16)]
    scores = [row["score"] for row in rows[:5]]
    assert scores == sorted(scores) and rows[5]["kl_per_64_tokens"] != 0
    assert (tmp_path / "figures" / "learning-frontier.svg").stat().st_size > 1000

    again = run_benchmark("frontier", tmp_path, "--kl-coefs", "0.4")
    assert again.returncode == 0 and "started" not in again.stdout
    table = (tmp_path / "frontier.md").read_text(encoding="utf-8")
    assert table.split("\n\n", 2)[2] in first.stdout and table in again.stdout, "only the command line differs"


@pytest.mark.slow
def test_a_run_that_cannot_start_is_named_with_every_bad_setting(tmp_path: Path) -> None:
    done = run_benchmark("frontier", tmp_path, "--kl-coefs", "0.4", "--set", "ppo.clip_range=7.0")
    assert done.returncode == 1
    assert "ppo.clip_range" in done.stderr and "Traceback" not in done.stderr
