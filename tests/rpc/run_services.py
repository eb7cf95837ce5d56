"""The services of a small run, in the process of the test: a tiny policy on the transformers engine, a fake reward."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tests.rpc.serving import LOCAL, Served, serving
from tests.unit.tiny_llama import VOCAB_SIZE, write_tiny_llama
from tether_services.generator.config import GeneratorSettings
from tether_services.generator.service import GeneratorService
from tether_services.orchestrator.config import OrchestratorSettings
from tether_services.reference.config import ReferenceSettings
from tether_services.reference.service import ReferenceService
from tether_services.reward.config import RewardSettings
from tether_services.reward.service import RewardService

WORDS = ("<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(4, VOCAB_SIZE)))


def write_tiny_policy(folder: Path, *, seed: int = 0) -> Path:
    """Write a random Llama with a tokenizer of one token per word w4, w5, ..."""
    write_tiny_llama(folder, seed=seed)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    ).save_pretrained(folder)
    return folder


def write_word_prompts(path: Path, count: int = 12) -> Path:
    path.write_text("".join(f"w{4 + i} w{5 + i} w{6 + i}\n" for i in range(count)))
    return path


@dataclass(frozen=True, slots=True)
class RunServices:
    """What a run calls, and the orchestrator settings that point to it."""

    generator: Served
    reward: Served
    reference: Served
    settings: OrchestratorSettings


def generator_settings(model: Path, **changes: object) -> GeneratorSettings:
    values = {**LOCAL, "admin_address": "127.0.0.1:0", "model": str(model), "dtype": "float32"}
    return GeneratorSettings.model_validate(values | changes)


@asynccontextmanager
async def run_services(
    model: Path, state_dir: Path, *, reference: Path | None = None, one_by_one: bool = False, quantization: str = "none"
) -> AsyncIterator[RunServices]:
    """Serve generator, reward and reference until the block ends.

    Args:
        model: The policy.
        state_dir: Of the orchestrator.
        reference: Another model for the reference service.
        one_by_one: No call shares a batch with another, so that no number depends on what arrives at the same time.
        quantization: Of generator and reference.
    """
    alone: dict[str, Any] = {"batch": {"mix_calls": False}} if one_by_one else {}
    alone |= {"quantization": quantization}
    generating = generator_settings(model, **alone)
    rewarding = RewardSettings.model_validate({**LOCAL, "admin_address": "127.0.0.1:0", "engine": "fake"})
    referring = ReferenceSettings.model_validate({**LOCAL, "model": str(reference or model), **alone})
    async with AsyncExitStack() as stack:
        generator = await stack.enter_async_context(serving(generating, lambda r: GeneratorService(generating, r)))
        reward = await stack.enter_async_context(serving(rewarding, lambda r: RewardService(rewarding, r)))
        compared = await stack.enter_async_context(serving(referring, lambda r: ReferenceService(referring, r)))
        settings = {
            **LOCAL,
            "state_dir": str(state_dir),
            "generator_address": generator.target,
            "adapter_address": f"127.0.0.1:{generator.runner.bound_ports[1]}",
            "reward_address": reward.target,
            "reference_address": compared.target,
            "max_retries": 1,
            "retry_backoff_seconds": 0.05,
            "storage_wait_seconds": 0.0,
        }
        yield RunServices(generator, reward, compared, OrchestratorSettings.model_validate(settings))


def small_run_toml(model: Path, prompts: Path, extra: str = "", *, ppo: str = "", trainer: str = "") -> str:
    """Return a run of three steps of 4 x 2 samples."""
    return (
        f'model = "{model}"\nprompts = "{prompts}"\nevaluation_count = 4\ntotal_steps = 3\nprompts_per_step = 4\n'
        f"responses_per_prompt = 2\nmax_prompt_tokens = 8\nmax_response_tokens = 8\nseed = 5\n{extra}\n"
        f"[ppo]\nepochs = 2\nminibatches = 2\n{ppo}\n[trainer]\nlearning_rate = 0.01\nlora_rank = 4\n{trainer}\n"
    )
