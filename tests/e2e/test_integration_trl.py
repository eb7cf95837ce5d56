"""TRL's own trainers, with the reward service as their reward function."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet  # type: ignore[import-untyped]
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import tether_services
from tests.rpc.reward_serving import reward_in_thread
from tests.rpc.serving import Served
from tether import DeadlineExceededError, InvalidArgumentError, UnavailableError
from tether.integrations.trl import AsyncRewardFunction, RewardFunction
from tether_services.reward.engines.fake import fake_score, fake_text_score
from tether_services.reward.items import encode_conversation
from tether_services.runtime.text import ByteCodec, Message

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "TRL currently supports vLLM", UserWarning)  # the trainers here use no vLLM
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

pytestmark = pytest.mark.slow

POLICY = Path(tether_services.__file__).parent / "demo" / "models" / "policy"
CHAT_TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
NUM_STEPS = 3
NUM_GENERATIONS = 4
SETTINGS: dict[str, Any] = {
    "per_device_train_batch_size": 8,
    "num_generations": NUM_GENERATIONS,
    "max_completion_length": 8,
    "generation_kwargs": {"min_new_tokens": 4},  # an empty completion has no score
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "log_completions": True,
    "num_completions_to_print": 0,
    "report_to": "none",
    "save_strategy": "no",
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "disable_tqdm": True,
    "seed": 5,
}
PROMPTS = ["Once upon a time", "The dog", "A little girl", "One day", "Tom saw", "The sun"]


@pytest.fixture(scope="module")
def service() -> Iterator[Served]:
    with reward_in_thread() as served:
        yield served


def policy() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    return AutoModelForCausalLM.from_pretrained(POLICY), AutoTokenizer.from_pretrained(POLICY, padding_side="left")


def texts() -> Dataset:
    return Dataset.from_dict({"prompt": PROMPTS})


def conversations() -> Dataset:
    return Dataset.from_dict({"prompt": [[{"role": "user", "content": prompt}] for prompt in PROMPTS]})


def chat_oracle(prompt: list[dict[str, str]], completion: list[dict[str, str]]) -> float:
    messages = [Message(message["role"], message["content"]) for message in [*prompt, *completion]]
    return fake_score(*encode_conversation(ByteCodec(), messages))


def completions_of(folder: Path, step: int) -> dict[str, list[Any]]:
    """Return what TRL recorded of one step: prompts, completions and a column of rewards per function."""
    path = folder / "completions" / f"completions_{step:05d}.parquet"
    columns: dict[str, list[Any]] = pyarrow.parquet.read_table(path).to_pydict()
    return columns


def test_grpo_runs_three_steps_on_the_scores_of_the_service(service: Served, tmp_path: Path) -> None:
    reward = pickle.loads(pickle.dumps(RewardFunction(service.target)))
    model, tokenizer = policy()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    args = GRPOConfig(output_dir=str(tmp_path), max_steps=NUM_STEPS, **SETTINGS)
    trainer = GRPOTrainer(model, reward_funcs=reward, args=args, train_dataset=texts(), processing_class=tokenizer)
    trainer.train()
    reward.close()
    logged = [entry for entry in trainer.state.log_history if "rewards/tether/mean" in entry]
    assert len(logged) == NUM_STEPS
    for step, entry in enumerate(logged, start=1):
        table = completions_of(tmp_path, step)
        expected = [fake_text_score(p, c) for p, c in zip(table["prompt"], table["completion"], strict=True)]
        assert len(set(expected)) > 1
        assert table["tether"] == pytest.approx(expected, abs=1e-6)
        assert entry["rewards/tether/mean"] == pytest.approx(sum(expected) / len(expected), abs=1e-6)
        assert (entry["tether/unscored"], entry["tether/truncated"]) == (0.0, 0.0)
    moved = [name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])]
    assert len(moved) == len(before)


def test_sync_and_async_functions_score_conversations(service: Served, tmp_path: Path) -> None:
    model, tokenizer = policy()
    tokenizer.chat_template = CHAT_TEMPLATE
    waiting = RewardFunction(service.target, name="sync")
    functions = [waiting, AsyncRewardFunction(service.target, name="async")]
    args = GRPOConfig(output_dir=str(tmp_path), max_steps=1, **SETTINGS)
    trainer = GRPOTrainer(
        model, reward_funcs=functions, args=args, train_dataset=conversations(), processing_class=tokenizer
    )
    trainer.train()
    waiting.close()
    table = completions_of(tmp_path, 1)
    expected = [chat_oracle(p, c) for p, c in zip(table["prompt"], table["completion"], strict=True)]
    assert table["sync"] == pytest.approx(expected, abs=1e-6)
    assert table["async"] == pytest.approx(expected, abs=1e-6)


def test_rloo_takes_the_same_function(service: Served, tmp_path: Path) -> None:
    model, tokenizer = policy()
    reward = RewardFunction(service.target)
    args = RLOOConfig(output_dir=str(tmp_path), max_steps=1, **SETTINGS)
    trainer = RLOOTrainer(model, reward_funcs=reward, args=args, train_dataset=texts(), processing_class=tokenizer)
    trainer.train()
    reward.close()
    logs = trainer._logs  # RLOO writes no file of them
    expected = [fake_text_score(p, c) for p, c in zip(logs["prompt"], logs["completion"], strict=True)]
    assert len(expected) == SETTINGS["per_device_train_batch_size"]
    assert list(logs["rewards"]["tether"]) == pytest.approx(expected, abs=1e-6)


def test_a_service_that_cannot_be_reached_ends_training_and_is_no_reward(tmp_path: Path) -> None:
    model, tokenizer = policy()
    args = GRPOConfig(output_dir=str(tmp_path), max_steps=1, **SETTINGS)
    reward = RewardFunction("127.0.0.1:1", timeout_seconds=0.5, unscored=None)
    trainer = GRPOTrainer(model, reward_funcs=reward, args=args, train_dataset=texts(), processing_class=tokenizer)
    with pytest.raises((UnavailableError, DeadlineExceededError)):  # which one depends on what gRPC was doing
        trainer.train()
    reward.close()
    assert not (tmp_path / "completions").exists() or not list((tmp_path / "completions").iterdir())


def test_a_completion_that_cannot_be_scored_ends_training_unless_one_says_otherwise(tmp_path: Path) -> None:
    """The service takes four characters at most, so that all prompts are refused."""
    with reward_in_thread(max_text_chars=4) as served:
        model, tokenizer = policy()
        args = GRPOConfig(output_dir=str(tmp_path), max_steps=1, **SETTINGS)
        reward = RewardFunction(served.target)
        trainer = GRPOTrainer(model, reward_funcs=reward, args=args, train_dataset=texts(), processing_class=tokenizer)
        with pytest.raises(InvalidArgumentError, match=r"8 of 8 items have no score.*completions\[0\]"):
            trainer.train()
        reward.close()
