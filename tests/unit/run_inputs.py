"""Inputs of runs for tests: configurations, prompt files, samples and step records."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tether.errors import InvalidArgumentError
from tether.generator import Completion
from tether_services.orchestrator.checkpoint_files import FORMAT, STATE_FILE, TENSOR_FILES
from tether_services.orchestrator.config import RunConfig
from tether_services.orchestrator.prompts import Prompt
from tether_services.orchestrator.records import CheckpointRow, SampleCounts, SampleRow, StepOutcome, StepRecord
from tether_services.orchestrator.rollouts import ScoredSample
from tether_services.orchestrator.run_config import parse_run_config
from tether_services.orchestrator.run_files import RunFiles
from tether_services.orchestrator.step_metrics import OPTIONAL_METRICS, STEP_METRICS


def fields_of(act: Callable[[], object]) -> dict[str, str]:
    """Return field and description of each violation of an InvalidArgumentError."""
    with pytest.raises(InvalidArgumentError) as caught:
        act()
    return {violation.field: violation.description for violation in caught.value.violations}


def write_model_folder(folder: Path) -> Path:
    """Write what the orchestrator's own checks look at; no library could load it."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "model.safetensors").write_bytes(b"\0" * 16)
    return folder


def write_checkpoint(run_directory: Path, version: int, epoch: int) -> CheckpointRow:
    """Write a checkpoint that can be verified, though no trainer could load it, and return what the ledger keeps."""
    files = RunFiles(run_directory)
    folder = files.new_checkpoint(version, epoch)
    folder.mkdir(parents=True)
    hashes = {}
    for name in TENSOR_FILES:
        content = f"{name} of {version}".encode()
        (folder / name).write_bytes(content)
        hashes[name] = hashlib.sha256(content).hexdigest()
    (folder / STATE_FILE).write_text(json.dumps({"format": FORMAT, "sha256": hashes}))
    return files.describe_checkpoint(folder, version)


def write_prompts(path: Path, count: int = 12) -> Path:
    path.write_text("".join(f"story number {i}\n" for i in range(count)))
    return path


def run_toml(folder: Path, extra: str = "", *, trainer: str = "", ppo: str = "") -> str:
    """Return a valid configuration whose files are in `folder`, made where they are missing."""
    model, prompts = folder / "model", folder / "prompts.txt"
    if not model.exists():
        write_model_folder(model)
    if not prompts.exists():
        write_prompts(prompts)
    return (
        f'model = "{model}"\nprompts = "{prompts}"\nevaluation_count = 2\ntotal_steps = 3\n{extra}\n'
        f"[ppo]\n{ppo}\n[trainer]\nlearning_rate = 1e-3\n{trainer}\n"
    )


def run_config(folder: Path, extra: str = "", *, trainer: str = "", ppo: str = "") -> RunConfig:
    return parse_run_config(run_toml(folder, extra, trainer=trainer, ppo=ppo))


def step_record(step: int, **metrics: float) -> StepRecord:
    """Return a record with every required figure: 4 samples of 8 tokens, nothing dropped, all else `step + 0.5`."""
    figures = dict.fromkeys((n for n in STEP_METRICS if n not in OPTIONAL_METRICS), step + 0.5)
    figures |= {name: 0.0 for name in figures if name.startswith("dropped_") or name == "samples_dropped"}
    figures |= {"samples_asked": 4.0, "samples_not_generated": 0.0, "samples_abandoned": 0.0}
    figures |= {"samples_generated": 4.0, "samples_trained": 4.0, "generated_tokens": 32.0, "effective_tokens": 32.0}
    distributions = {"score": [0.5, 1.5, -3.0, 2.0], "response_length": [8.0] * 4}
    return StepRecord(step, step, figures | metrics, distributions, new_version=step + 1)


def sample_rows(count: int, *, dropped: int = 0, version: int = 0) -> list[SampleRow]:
    """Return the samples of a rollout; the last ones could not be scored."""
    reasons = [""] * (count - dropped) + ["not_scored"] * dropped
    return [
        SampleRow(number, f"{number:064x}", version, "", 8, dropped=reason) for number, reason in enumerate(reasons)
    ]


def step_outcome(step: int, *, trained: int = 4, dropped: int = 0) -> StepOutcome:
    """Return what a step with those samples leaves behind, without a checkpoint."""
    reasons = {"not_scored": dropped} if dropped else {}
    counts = SampleCounts(trained + dropped, trained + dropped, trained, reasons)
    return StepOutcome(f"{step + 1:064x}", None, counts)


def scored_sample(
    *,
    prompt: str = "once",
    token_ids: Sequence[int] = (5, 6),
    logprobs: Sequence[float] = (-1.0, -2.0),
    ref_logprobs: Sequence[float] = (-1.5, -1.0),
    score: float = 1.0,
    stopped: bool = False,
) -> ScoredSample:
    reason = "stop" if stopped else "length"
    completion = Completion(tuple(token_ids), tuple(logprobs), "upon a time", reason)  # type: ignore[arg-type]
    return ScoredSample(Prompt(prompt, (1, 2)), completion, tuple(ref_logprobs), score)
