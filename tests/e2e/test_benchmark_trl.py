"""The comparison with TRL: one step of its PPO trainer, skipped where scripts/install_trl.sh has not run."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / ".venv-trl" / "bin" / "python"
NAME = "seed-0-kl-0.4-steps-1"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON.is_file(), reason="no .venv-trl; scripts/install_trl.sh makes it"),
]


def run_benchmark(output: Path) -> subprocess.CompletedProcess[str]:
    command = [str(PYTHON), "benchmarks/trl_ppo.py", "--seeds", "0", "--steps", "1", "--responses", "1"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [*command, "--output", str(output)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the output folder of a benchmark run of one step."""
    output = tmp_path_factory.mktemp("trl")
    finished = run_benchmark(output)
    assert finished.returncode == 0, finished.stderr
    return output / NAME


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def test_policy_starts_at_the_reference_and_has_the_settings_of_the_demo(folder: Path) -> None:
    report = read(folder / "run.json")
    (step,) = report["steps"]
    assert abs(step["objective/kl"]) < 1e-4
    assert (step["lr"], step["episode"]) == (1e-3, 64)
    assert abs(step["val/ratio"] - 1) < 0.05
    assert report["train_seconds"] > 0


def test_the_adapter_has_learned_and_fits_rank_and_targets(folder: Path) -> None:
    config = read(folder / "adapter" / "adapter_config.json")
    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert (config["r"], config["lora_alpha"], len(config["target_modules"])) == (8, 16, 7)
    assert len(tensors) == 56
    assert all(bool(tensor.any()) for name, tensor in tensors.items() if "lora_B" in name)


def test_evaluation_after_differs_from_the_one_before(folder: Path) -> None:
    evaluation = read(folder / "evaluation.json")
    assert evaluation["before"]["kl_per_64_tokens"] == 0.0
    assert evaluation["after"]["kl_per_64_tokens"] != 0.0
    assert len(evaluation["after"]["responses"]) == 64


def test_a_finished_run_is_shown_and_not_run_again(folder: Path) -> None:
    before = (folder / "run.json").stat().st_mtime_ns
    finished = run_benchmark(folder.parent)
    assert (folder / "run.json").stat().st_mtime_ns == before
    assert finished.stdout.splitlines()[-1].split()[:2] == ["0", "0.4"]
    assert "step 1/1" not in finished.stderr
