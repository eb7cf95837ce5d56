from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForSequenceClassification

from tests.unit.tiny_llama import new_trainer, random_samples, score_samples, write_tiny_llama
from tether.errors import FailedPreconditionError, InvalidArgumentError, NotFoundError
from tether_services.orchestrator.config import PpoConfig, TrainerConfig
from tether_services.orchestrator.trainer import Sample, Trainer

GAIN, BIAS = 1.7, -0.4
CONFIG = TrainerConfig(learning_rate=1e-2, lora_rank=4, threads=1, device="cpu")


def scorer(base: Path) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32).eval()


def write_reward_model(folder: Path, base: Path, **overrides: Any) -> Path:
    """Write a reward model as its recipe would: another rank, other targets, random adapter and head."""
    config: dict[str, Any] = {"r": 6, "lora_alpha": 9, "target_modules": ["q_proj", "down_proj"]}
    with torch.random.fork_rng():
        torch.manual_seed(7)
        saved = LoraConfig(task_type="SEQ_CLS", modules_to_save=["score"], **(config | overrides))
        model = get_peft_model(scorer(base), saved)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.2)
            if "lora_embedding_A" in name:
                torch.nn.init.normal_(parameter, std=0.5)
        model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink()
    normalisation = {"base": "../base", "gain": GAIN, "bias": BIAS, "max_length": 64}
    (folder / "tether_reward.json").write_text(json.dumps(normalisation))
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `base` and a `reward` model over it."""
    folder = tmp_path_factory.mktemp("models")
    write_reward_model(folder / "reward", write_tiny_llama(folder / "base"))
    return folder


def new_critic(base: Path, reward_model: Path, **config: Any) -> Trainer:
    settings = CONFIG.model_copy(update=config)
    return Trainer(base, settings, PpoConfig(epochs=1), total_steps=5, reward_model=reward_model)


def raw_scores(base: Path, reward_model: Path, rows: list[list[int]]) -> list[float]:
    """The reward model's own raw score at the last token, one unpadded row at a time."""
    model = PeftModel.from_pretrained(scorer(base), reward_model).eval()
    model.config.pad_token_id = 0
    with torch.no_grad():
        return [float(model(input_ids=torch.tensor([row])).logits[0, 0]) for row in rows]


def last_values(trainer: Trainer, rows: list[list[int]]) -> list[float]:
    """The critic's value at the last token of each row: the state before one more token."""
    values = trainer.compute_values([Sample(row, [1]) for row in rows])
    return [float(v[0]) for v in values]


ROWS = [[1, 5, 9, 30], [7], [44, 3, 12, 12, 12, 9, 8, 31, 2]]


def test_d31_the_critic_starts_as_the_normalised_reward_model(models: Path) -> None:
    trainer = new_critic(models / "base", models / "reward")
    expected = [GAIN * (raw - BIAS) for raw in raw_scores(models / "base", models / "reward", ROWS)]
    assert last_values(trainer, ROWS) == pytest.approx(expected, abs=1e-5)
    assert len({round(v, 3) for v in expected}) == len(ROWS)


def test_without_normalisation_the_critic_starts_as_the_raw_score(models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "reward", tmp_path / "reward")
    (tmp_path / "reward" / "tether_reward.json").unlink()
    trainer = new_critic(models / "base", tmp_path / "reward")
    expected = raw_scores(models / "base", tmp_path / "reward", ROWS)
    assert last_values(trainer, ROWS) == pytest.approx(expected, abs=1e-5)


def test_the_policy_is_untouched_by_the_critics_start(models: Path) -> None:
    trainer = new_critic(models / "base", models / "reward")
    samples = random_samples(4)
    policy, reference = (
        torch.cat(trainer.compute_logprobs(samples, adapter=adapter, temperature=1.0))
        for adapter in ("policy", "reference")
    )
    assert policy.equal(reference)


def test_the_critic_keeps_its_own_rank_and_learns(models: Path, tmp_path: Path) -> None:
    trainer = new_critic(models / "base", models / "reward")
    assert trainer._model.shapes["critic"].rank == 6
    assert trainer._model.shapes["policy"].rank == 4
    before = last_values(trainer, ROWS)
    trainer.update(score_samples(trainer, random_samples(8)))
    assert last_values(trainer, ROWS) != before
    trainer.save_checkpoint(tmp_path / "checkpoint")
    resumed = new_critic(models / "base", models / "reward")
    resumed.load_checkpoint(tmp_path / "checkpoint")
    assert last_values(resumed, ROWS) == last_values(trainer, ROWS)


def test_rank_stabilised_scaling_is_honoured(models: Path, tmp_path: Path) -> None:
    write_reward_model(tmp_path / "reward", models / "base", use_rslora=True)
    (tmp_path / "reward" / "tether_reward.json").unlink()
    trainer = new_critic(models / "base", tmp_path / "reward")
    expected = raw_scores(models / "base", tmp_path / "reward", ROWS)
    assert last_values(trainer, ROWS) == pytest.approx(expected, abs=1e-5)


def test_an_adapter_of_the_embeddings_starts_the_critic_and_leaves_policy_and_output_layer(
    models: Path, tmp_path: Path
) -> None:
    write_reward_model(tmp_path / "reward", models / "base", target_modules=["q_proj", "embed_tokens"])
    (tmp_path / "reward" / "tether_reward.json").unlink()
    trainer = new_critic(models / "base", tmp_path / "reward")
    expected = raw_scores(models / "base", tmp_path / "reward", ROWS)
    assert last_values(trainer, ROWS) == pytest.approx(expected, abs=1e-5)
    samples = random_samples(8)
    policy, plain = (
        torch.cat(owner.compute_logprobs(samples, adapter="policy", temperature=1.0))
        for owner in (trainer, new_trainer(models / "base"))
    )
    assert policy.equal(plain)
    trained = trainer._model.trained_parameters("critic")
    assert sum("lora_embedding" in name for name in trained) == 2
    before = {name: parameter.detach().clone() for name, parameter in trained.items()}
    trainer.update(score_samples(trainer, samples))
    assert all(not parameter.equal(before[name]) for name, parameter in trained.items())
    trainer.save_checkpoint(tmp_path / "checkpoint")
    resumed = new_critic(models / "base", tmp_path / "reward")
    resumed.load_checkpoint(tmp_path / "checkpoint")
    assert last_values(resumed, ROWS) == last_values(trainer, ROWS)


def test_the_policy_has_no_adapter_of_the_embeddings(models: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="no linear layers named embed_tokens for the policy adapter"):
        new_trainer(models / "base", lora_target_modules=("q_proj", "embed_tokens"))


def damaged(models: Path, tmp_path: Path, name: str, content: bytes | None) -> Path:
    """A copy of the models whose reward model has one file replaced or removed."""
    shutil.copytree(models, tmp_path / "models")
    path = tmp_path / "models" / "reward" / name
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    return tmp_path / "models"


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_file_of_the_reward_model_is_named(models: Path, tmp_path: Path, name: str) -> None:
    copy = damaged(models, tmp_path, name, None)
    with pytest.raises(NotFoundError, match=name):
        new_critic(copy / "base", copy / "reward")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("adapter_config.json", b"not json"),
        ("adapter_config.json", b"[]"),
        ("adapter_config.json", b'{"peft_type": "IA3"}'),
        ("adapter_config.json", b'{"peft_type": "LORA", "use_dora": true}'),
        ("adapter_config.json", b'{"peft_type": "LORA", "bias": "all"}'),
        ("adapter_config.json", b'{"peft_type": "LORA", "target_modules": "all-linear", "r": 4, "lora_alpha": 4}'),
        ("adapter_config.json", b'{"peft_type": "LORA", "target_modules": ["q_proj"], "lora_alpha": 4}'),
        ("adapter_config.json", b'{"peft_type": "LORA", "target_modules": ["q_proj"], "r": 6, "lora_alpha": 9}'),
        ("adapter_model.safetensors", b"\x80\x04pickle"),
        ("tether_reward.json", b'{"base": "../base", "gain": "much", "bias": 0.0}'),
        ("tether_reward.json", b'{"base": "../base", "gain": NaN, "bias": 0.0}'),
    ],
)
def test_a_reward_model_that_cannot_start_a_critic_is_refused(
    models: Path, tmp_path: Path, name: str, content: bytes
) -> None:
    copy = damaged(models, tmp_path, name, content)
    with pytest.raises(InvalidArgumentError) as caught:
        new_critic(copy / "base", copy / "reward")
    assert caught.value.violations[0].field == "reward_model"


def test_a_reward_model_without_a_score_head_is_refused(models: Path, tmp_path: Path) -> None:
    exported = new_critic(models / "base", models / "reward").export_adapter(tmp_path / "policy", policy_version=1)
    with pytest.raises(InvalidArgumentError, match="no score head"):
        new_critic(models / "base", exported.directory)


def test_a_reward_model_over_another_base_is_refused(models: Path, tmp_path: Path) -> None:
    other = write_tiny_llama(tmp_path / "other", seed=1)
    with pytest.raises(FailedPreconditionError) as caught:
        new_critic(other, models / "reward")
    assert caught.value.reason == "BASE_MISMATCH"
    assert math.isfinite(last_values(new_critic(models / "base", models / "reward"), ROWS)[0])
