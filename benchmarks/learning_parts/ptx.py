"""What does PPO forget of the text it was pretrained on, and what does PPO-ptx keep at which cost?"""

from __future__ import annotations

import json
import statistics
import tomllib
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Final

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from benchmarks.learning_parts.evaluation import Evaluation
from benchmarks.learning_parts.measures import equal_distinct_2, repetition_rate
from benchmarks.learning_parts.runs import RUN_RESPONSES, Job, Options, RunResult, run_jobs, say
from benchmarks.learning_parts.tables import Column, Study
from tether_services.local.deployment import DEMO_MODELS
from tether_services.recipes.config import DataConfig
from tether_services.recipes.data.reading import DataSet, read_documents
from tether_services.recipes.data.records import Document
from tether_services.recipes.pretrain import held_out_loss
from tether_services.recipes.tokenizer import load_tokenizer
from tether_services.runtime.durable import write_text
from tether_services.runtime.pretrained import load_pretrained

__all__ = ["read_stories", "run_ptx"]

PRETRAINING: Final = Path(__file__).parents[2] / "deploy" / "config" / "pretrain.toml"
"""Says how the text of the demo policy was split; the same stories are held out here."""

COLUMNS: Final = (
    Column("policy", "policy"),
    Column("seed", "seed"),
    Column("held-out LM loss", "loss", "{:.4f}"),
    Column("over the start", "loss_change", "{:+.4f}"),
    Column("score", "score", "{:+.2f}"),
    Column("standard error", "score_error", "{:.2f}"),
    Column("KL per 64 tokens", "kl_per_64_tokens", "{:.2f}"),
    Column("distinct-2 before", "distinct_before", "{:.3f}"),
    Column("after", "distinct_after", "{:.3f}"),
    Column("repetition after", "repetition_after", "{:.3f}"),
    Column("seconds", "seconds", "{:.0f}"),
)


async def run_ptx(options: Options, *, kl_coef: float, ptx_coefs: Sequence[float], text: Path) -> Study:
    """Return the study of PPO and PPO-ptx at equal steps.

    Args:
        options: Seeds, steps and place.
        kl_coef: Of all policies; a weak leash, so that there is something to forget.
        ptx_coefs: Weights of the language-model loss, above 0.
        text: Story file of the pretraining; its training stories are learned from, the others measured on.

    Raises:
        InvalidArgumentError: The file cannot be read or has no stories.
    """
    stories = read_stories(text)
    held_out = tuple(document.text for document in stories.validation)
    ptx_text = write_stories(options.output.resolve() / "ptx_text.jsonl", [story.text for story in stories.train])
    leash = f"ppo.kl_coef={kl_coef}"
    jobs = [Job("ppo", seed, (leash,)) for seed in options.seeds]
    for coef in ptx_coefs:
        settings = (leash, f"ppo.ptx_coef={coef}", f"ppo.ptx_text={json.dumps(str(ptx_text))}")
        jobs += [Job(f"ptx-{coef:g}", seed, settings) for seed in options.seeds]
    base, results = await run_jobs(jobs, options)
    torch.set_num_threads(options.threads)
    start = {"policy": "start", "loss": story_loss(None, held_out), **judge(base.first(RUN_RESPONSES), base)}
    rows = [start, *(ptx_row(result, base, start["loss"], held_out) for result in results)]
    return Study(
        name="ptx",
        title=f"PPO and PPO-ptx after {options.steps} steps, kl_coef {kl_coef:g}",
        columns=COLUMNS,
        rows=[{**dict.fromkeys(column.key for column in COLUMNS), **row} for row in rows],
        conclusions=[conclude(rows, coef) for coef in ptx_coefs],
        notes=[f"Loss: nats per token, temperature 1, {len(held_out)} stories held out of all training."],
    )


def read_stories(text: Path) -> DataSet[Document]:
    """Return the stories of a file, split as for the pretraining of the demo policy."""
    told = tomllib.loads(PRETRAINING.read_text(encoding="utf-8"))["data"]
    return read_documents(DataConfig(sources=(str(text),), **told))


def write_stories(path: Path, stories: Sequence[str]) -> Path:
    """Write stories as a run reads them, and return where."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(json.dumps({"prompt": story}) + "\n" for story in stories))
    return path


def ptx_row(result: RunResult, base: Evaluation, start_loss: float, stories: tuple[str, ...]) -> dict[str, Any]:
    """Return the figures of a run."""
    loss = story_loss(result.adapter, stories)
    say(f"{result.label} seed {result.seed}: held-out loss {loss:.4f}")
    return {
        "policy": policy_name(result.config["ppo"]["ptx_coef"]),
        "seed": result.seed,
        "loss": loss,
        "loss_change": loss - start_loss,
        "seconds": result.wall_seconds,
        **judge(result.evaluation, base),
    }


def policy_name(ptx_coef: float) -> str:
    """Return how a policy is called in the table."""
    return f"PPO-ptx, ptx_coef {ptx_coef:g}" if ptx_coef else "PPO"


def judge(after: Evaluation, base: Evaluation) -> dict[str, Any]:
    """Return score, KL and variety of a policy."""
    distinct_before, distinct_after = equal_distinct_2(base.first(RUN_RESPONSES).token_ids, after.token_ids)
    return {
        "score": after.score_mean,
        "score_error": after.score_error,
        "kl_per_64_tokens": after.kl_per_64_tokens,
        "distinct_before": distinct_before,
        "distinct_after": distinct_after,
        "repetition_after": repetition_rate(after.token_ids),
    }


@cache
def story_loss(adapter: Path | None, stories: tuple[str, ...]) -> float:
    """Return the language-model loss of the demo policy with an adapter, nats per token of whole stories."""
    folder = DEMO_MODELS / "policy"
    model = load_pretrained(AutoModelForCausalLM, folder, dtype="float32", field="model")
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter), torch_device="cpu")
    tokenizer = load_tokenizer(folder, field="model")
    return held_out_loss(model, stories, tokenizer=tokenizer, max_tokens=512).nats_per_token


def conclude(rows: Sequence[Mapping[str, Any]], coef: float) -> str:
    """Return what PPO-ptx keeps of the text and gives up of the score, as paired differences to PPO."""
    plain = {row["seed"]: row for row in rows if row["policy"] == policy_name(0)}
    mixed = [row for row in rows if row["policy"] == policy_name(coef)]
    losses = [row["loss"] - plain[row["seed"]]["loss"] for row in mixed]
    scores = [row["score"] - plain[row["seed"]]["score"] for row in mixed]
    lower = sum(loss < 0 for loss in losses)
    return (
        f"{policy_name(coef)} against PPO: loss {statistics.fmean(losses):+.4f} nats per token on average, lower on"
        f" {lower} of {len(mixed)} seeds; score {statistics.fmean(scores):+.2f} on average"
        f" ({min(scores):+.2f} to {max(scores):+.2f})"
    )
