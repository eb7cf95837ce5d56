from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import Gemma2Config, Gemma2ForCausalLM

from tests.unit.tiny_llama import new_trainer, random_samples, score_samples, write_tiny_llama
from tether.errors import FailedPreconditionError, InvalidArgumentError, NotFoundError
from tether_services.orchestrator.config import PpoConfig, TrainerConfig
from tether_services.orchestrator.trainer import Trainer
from tether_services.orchestrator.trainer.model import check_no_dropout, load_base


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("models") / "base")


def test_d4_a_module_with_dropout_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Dropout(0.1)))
    with pytest.raises(FailedPreconditionError, match=r"module 1\.0 has dropout"):
        check_no_dropout(model)


def test_d4_a_dropout_of_0_is_accepted() -> None:
    check_no_dropout(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.0)))


def test_d4_the_dropout_of_a_loaded_base_is_switched_off(tmp_path: Path) -> None:
    folder = write_tiny_llama(tmp_path / "dropout", attention_dropout=0.5)
    model = load_base(folder, dtype="float32")
    check_no_dropout(model)
    assert not model.training
    trainer, samples = new_trainer(folder), random_samples(3)
    first, second = (trainer.compute_logprobs(samples, adapter="policy", temperature=1.0)[0] for _ in range(2))
    assert first.equal(second)


def test_the_base_is_frozen_and_only_adapters_and_head_train(base: Path) -> None:
    model = new_trainer(base)._model
    policy, critic = model.trained_parameters("policy"), model.trained_parameters("critic")
    assert len(policy) == 2 * 7 * 2
    assert set(critic) - set(policy) == {"value_head.weight", "value_head.bias"}
    with model.using("policy"):
        assert {id(p) for p in model._peft.parameters() if p.requires_grad} == ids(policy)
    with model.using("critic"):
        assert {id(p) for p in model._peft.parameters() if p.requires_grad} == ids(model.adapter_parameters("critic"))
    assert not ids(policy) & ids(critic)


def ids(parameters: dict[str, nn.Parameter]) -> set[int]:
    return {id(p) for p in parameters.values()}


def test_there_is_one_base_in_memory(base: Path) -> None:
    model = new_trainer(base)._model
    adapters = sum(p.numel() for a in ("policy", "critic") for p in model.adapter_parameters(a).values())
    total = sum(p.numel() for p in model._peft.parameters())
    assert total == adapters + sum(p.numel() for p in load_base(base, dtype="float32").parameters())


@pytest.mark.parametrize("advantage", ["grpo", "dr_grpo", "rloo", "reinforce_baseline"])
def test_without_a_critic_there_is_no_critic_adapter(base: Path, tmp_path: Path, advantage: str) -> None:
    trainer = new_trainer(base, ppo=PpoConfig.model_validate({"advantage": advantage, "epochs": 1}))
    assert set(trainer._model.shapes) == set(trainer._optimisers) == {"policy"}
    assert not [name for name, _ in trainer._model._peft.named_parameters() if ".critic." in name]
    batch = replace(score_samples(trainer, random_samples(4)), groups=[0, 0, 1, 1])
    assert trainer.update(batch).policy_grad_norm > 0.0
    trainer.save_checkpoint(tmp_path / "1")
    with safe_open(tmp_path / "1" / "weights.safetensors", framework="pt") as saved:
        assert {name.partition("/")[0] for name in saved.keys()} == {"policy"}  # noqa: SIM118


def test_the_reference_leaves_the_adapters_on_for_whoever_comes_next(base: Path) -> None:
    model = new_trainer(base)._model
    with torch.no_grad():
        for parameter in model.adapter_parameters("policy").values():
            parameter.fill_(0.1)
    token_ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad(), model.using("policy"):
        before = model.hidden_states(token_ids)
        with model.using("reference"):
            off = model.hidden_states(token_ids)
        after = model.hidden_states(token_ids)
    assert before.equal(after)
    assert not before.equal(off)


def test_d32_the_value_head_starts_small_and_without_bias(tmp_path: Path) -> None:
    folder = write_tiny_llama(tmp_path / "wide", hidden_size=512)
    head = new_trainer(folder)._model.value_head
    assert head.weight.dtype == torch.float32
    assert float(head.weight.detach().std()) == pytest.approx(1 / 513**0.5, rel=0.15)
    assert float(head.bias.detach()) == 0.0


def test_one_seed_gives_one_start_and_the_callers_random_state_is_left_alone(base: Path) -> None:
    state = torch.get_rng_state()
    starts = []
    for seed in (1, 1, 2):
        parameters = new_trainer(base, seed=seed)._model.trained_parameters("critic")
        starts.append(torch.cat([p.detach().flatten() for p in parameters.values()]))
    first, again, other = starts
    assert first.equal(again)
    assert not first.equal(other)
    assert torch.get_rng_state().equal(state)


def test_the_thread_budget_is_applied(base: Path) -> None:
    before = torch.get_num_threads()
    try:
        new_trainer(base, threads=2)
        assert torch.get_num_threads() == 2
        new_trainer(base, threads=1)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["c_attn", "lm_head", "embed_tokens", "self_attn", "norm"])
def test_a_target_module_that_is_no_linear_layer_of_the_blocks_is_named(base: Path, name: str) -> None:
    with pytest.raises(InvalidArgumentError, match=f"no linear layers named {name}") as caught:
        new_trainer(base, lora_target_modules=["q_proj", name])
    assert caught.value.violations[0].field == "trainer.lora_target_modules"


def test_a_folder_that_is_not_there_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        Trainer(tmp_path / "absent", TrainerConfig(learning_rate=1e-3), PpoConfig(), total_steps=1)


def test_a_model_that_changes_its_logits_after_the_output_layer_is_refused(tmp_path: Path) -> None:
    config = Gemma2Config(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=64,
        initializer_range=0.5,
        final_logit_softcapping=1.0,
    )
    Gemma2ForCausalLM(config).save_pretrained(tmp_path / "capped")
    with pytest.raises(FailedPreconditionError, match="soft-capping"):
        new_trainer(tmp_path / "capped")
