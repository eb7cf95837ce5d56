from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.unit.tiny_llama import new_trainer, random_samples, score_samples, weights_of, write_tiny_llama
from tether.errors import FailedPreconditionError, NotFoundError, TetherError
from tether_services.orchestrator.config import PpoConfig
from tether_services.orchestrator.trainer import Trainer

PPO = PpoConfig(epochs=2, minibatches=2)
TEXT = [[(5 * i + 2 * k) % 48 for k in range(4)] for i in range(8)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("models") / "base", num_hidden_layers=1)


@pytest.fixture(scope="module")
def saved(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint after two updates."""
    trainer, folder = new_trainer(base, ppo=PPO), tmp_path_factory.mktemp("checkpoints") / "2"
    learn(trainer, 0, 2)
    trainer.save_checkpoint(folder)
    return folder


def learn(trainer: Trainer, first: int, last: int) -> None:
    for step in range(first, last):
        batch = score_samples(trainer, random_samples(9, seed=step))
        trainer.update(replace(batch, groups=[0, 1, 2] * 3), TEXT)


def everything(trainer: Trainer) -> dict[str, Tensor]:
    """All that decides the rest of a run, by name."""
    found: dict[str, Tensor] = {"rng": trainer._generator.get_state()} | weights_of(trainer)
    for name, optimiser in trainer._optimisers.items():
        found |= {f"{name}.{n}": t.clone() for n, t in optimiser.state_tensors().items()}
    found["kl_coef"] = torch.tensor(trainer._kl.kl_coef, dtype=torch.float64)
    if trainer._average is not None:
        found |= {f"average.{n}": t.clone() for n, t in trainer._average.tensors.items()}
    if trainer._normaliser is not None:
        moments = trainer._normaliser.count, trainer._normaliser.mean, trainer._normaliser.var
        found["moments"] = torch.tensor(moments, dtype=torch.float64)
    return found


def assert_identical(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    assert one.keys() == two.keys()
    assert [name for name in one if not one[name].equal(two[name])] == []


@pytest.mark.parametrize("steps_before", [0, 1, 2])
def test_a_resumed_run_is_bit_identical_to_an_uninterrupted_one(base: Path, tmp_path: Path, steps_before: int) -> None:
    whole = new_trainer(base, ppo=PPO)
    learn(whole, 0, steps_before)
    whole.save_checkpoint(tmp_path / "checkpoint")
    learn(whole, steps_before, steps_before + 2)
    # Another seed: nothing of the new trainer's own start may survive the load.
    resumed = new_trainer(base, ppo=PPO, seed=99)
    resumed.load_checkpoint(tmp_path / "checkpoint")
    assert resumed.num_updates == steps_before
    learn(resumed, steps_before, steps_before + 2)
    assert_identical(everything(resumed), everything(whole))
    assert resumed.num_updates == whole.num_updates


OPTIONS: dict[str, Any] = {
    "normalise_scores": True,
    "kl_target": 0.5,
    "kl_horizon": 50.0,
    "ptx_coef": 0.2,
    "target_kl": 0.05,
    "critic_warmup_steps": 1,
    "entropy_coef": 0.01,
    "missing_eos": "subtract",
    "score_placement": "n_plus",
}
WITHOUT_CRITIC = OPTIONS | {"critic_warmup_steps": 0, "score_placement": "last", "advantage": "grpo"}
ALL_PARTS: dict[str, Any] = {"ema_decay": 0.9, "schedule": "cosine", "warmup_steps": 1}


@pytest.mark.parametrize("options", [OPTIONS, WITHOUT_CRITIC], ids=["critic", "no critic"])
@pytest.mark.parametrize("steps_before", [1, 2])
def test_a_run_with_every_optional_part_resumes_bit_for_bit(
    base: Path, tmp_path: Path, options: dict[str, Any], steps_before: int
) -> None:
    optimizer = "adamw" if importlib.util.find_spec("bitsandbytes") is None else "adamw_8bit"
    ppo, parts = PpoConfig.model_validate(PPO.model_dump() | options), ALL_PARTS | {"optimizer": optimizer}
    whole = new_trainer(base, ppo=ppo, **parts)
    learn(whole, 0, steps_before)
    whole.save_checkpoint(tmp_path / "checkpoint")
    learn(whole, steps_before, steps_before + 2)
    resumed = new_trainer(base, ppo=ppo, seed=99, **parts)
    resumed.load_checkpoint(tmp_path / "checkpoint")
    learn(resumed, steps_before, steps_before + 2)
    state = everything(whole)
    assert_identical(everything(resumed), state)
    assert float(state["kl_coef"]) != ppo.kl_coef
    assert int(state["moments"][0]) == 9 * (steps_before + 2)
    assert ("critic/value_head.weight" in state) == ppo.has_critic


@pytest.mark.parametrize(
    ("ppo", "config"), [({"normalise_scores": True}, {}), ({}, {"ema_decay": 0.9}), ({"advantage": "rloo"}, {})]
)
def test_a_checkpoint_without_a_part_that_this_trainer_has_is_refused(
    base: Path, saved: Path, ppo: dict[str, Any], config: dict[str, Any]
) -> None:
    trainer = new_trainer(base, ppo=PpoConfig.model_validate(PPO.model_dump() | ppo), **config)
    before = everything(trainer)
    with pytest.raises(FailedPreconditionError) as caught:
        trainer.load_checkpoint(saved)
    assert caught.value.reason == "CHECKPOINT_MISMATCH"
    assert_identical(everything(trainer), before)


def test_saving_changes_nothing(base: Path, tmp_path: Path) -> None:
    with_save, without = new_trainer(base, ppo=PPO), new_trainer(base, ppo=PPO)
    learn(with_save, 0, 1)
    with_save.save_checkpoint(tmp_path / "checkpoint")
    learn(with_save, 1, 2)
    learn(without, 0, 2)
    assert_identical(everything(with_save), everything(without))


def test_a_checkpoint_holds_safetensors_and_json_only(saved: Path) -> None:
    assert sorted(p.name for p in saved.iterdir()) == ["optimiser.safetensors", "state.json", "weights.safetensors"]
    state = json.loads((saved / "state.json").read_text())
    assert state["num_updates"] == 2
    assert state["optimiser_steps"] == {"policy": 8, "critic": 8}
    assert not [p for p in saved.parent.iterdir() if p != saved]


@pytest.mark.parametrize("name", ["weights.safetensors", "optimiser.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped"])
def test_a_damaged_checkpoint_is_refused_and_changes_nothing(
    base: Path, saved: Path, tmp_path: Path, name: str, damage: str
) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in saved.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    content = bytearray((copy / name).read_bytes())
    if damage == "missing":
        (copy / name).unlink()
    elif damage == "truncated":
        (copy / name).write_bytes(content[: len(content) // 2])
    else:
        content[0] ^= 0xFF
        (copy / name).write_bytes(content)
    trainer = new_trainer(base, ppo=PPO)
    before = everything(trainer)
    with pytest.raises(NotFoundError if damage == "missing" else FailedPreconditionError):
        trainer.load_checkpoint(copy)
    assert_identical(everything(trainer), before)


@pytest.mark.parametrize(("field", "value"), [("lora_rank", 2), ("lora_alpha", 2), ("lora_target_modules", ["q_proj"])])
def test_a_checkpoint_of_other_adapters_is_refused(base: Path, saved: Path, field: str, value: Any) -> None:
    with pytest.raises(FailedPreconditionError, match="other adapters"):
        new_trainer(base, ppo=PPO, **{field: value}).load_checkpoint(saved)


def test_a_checkpoint_of_another_base_is_refused(saved: Path, tmp_path: Path) -> None:
    other = new_trainer(write_tiny_llama(tmp_path / "other", seed=1), ppo=PPO)
    with pytest.raises(FailedPreconditionError) as caught:
        other.load_checkpoint(saved)
    assert caught.value.reason == "CHECKPOINT_MISMATCH"


def test_a_checkpoint_of_another_format_is_refused(base: Path, saved: Path, tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text(json.dumps(json.loads((saved / "state.json").read_text()) | {"format": 0}))
    with pytest.raises(FailedPreconditionError) as caught:
        new_trainer(base, ppo=PPO).load_checkpoint(tmp_path)
    assert caught.value.reason == "CHECKPOINT_FORMAT"


def test_no_checkpoint_is_not_found(base: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        new_trainer(base, ppo=PPO).load_checkpoint(tmp_path / "absent")


def test_an_existing_checkpoint_of_other_content_is_never_overwritten(base: Path, saved: Path) -> None:
    before = (saved / "weights.safetensors").read_bytes()
    with pytest.raises(TetherError, match="exists with other content"):
        new_trainer(base, ppo=PPO).save_checkpoint(saved)
    assert (saved / "weights.safetensors").read_bytes() == before


def test_the_global_random_state_plays_no_part(base: Path) -> None:
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        trainer = new_trainer(base, ppo=PPO)
        learn(trainer, 0, 1)
        results.append(everything(trainer))
    assert_identical(*results)
