"""The moving average of the policy adapter (D30)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.unit.tiny_llama import new_trainer, random_samples, score_samples, weights_of, write_tiny_llama
from tether.errors import FailedPreconditionError
from tether_services.orchestrator.config import PpoConfig
from tether_services.orchestrator.trainer import Trainer
from tether_services.orchestrator.trainer.average import AdapterAverage

DECAY = 0.9


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("models") / "base", num_hidden_layers=1)


def learn(trainer: Trainer, updates: int) -> None:
    for seed in range(updates):
        trainer.update(score_samples(trainer, random_samples(8, seed=seed)))


def policy_of(trainer: Trainer) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in trainer._model.adapter_parameters("policy").items()}


def test_d30_the_average_is_the_recurrence_in_float64() -> None:
    weight = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    average = AdapterAverage({"w": weight}, decay=DECAY)
    expected = [1.0, -2.0]
    assert average.tensors["w"].tolist() == expected
    for new in ([3.0, 0.5], [-1.0, 0.25], [7.0, -4.0]):
        with torch.no_grad():
            weight.copy_(torch.tensor(new, dtype=torch.float64))
        average.update()
        expected = [DECAY * e + (1.0 - DECAY) * n for e, n in zip(expected, new, strict=True)]
        assert average.tensors["w"].tolist() == pytest.approx(expected, abs=1e-12)


def test_d30_the_adapter_is_averaged_after_every_optimiser_step(base: Path) -> None:
    trainer = new_trainer(base, ppo=PpoConfig(epochs=2, minibatches=2), ema_decay=DECAY)
    expected = {name: tensor.double() for name, tensor in policy_of(trainer).items()}
    steps = []

    def follow(*_: object) -> None:
        steps.append(1)
        for name, tensor in policy_of(trainer).items():
            expected[name] = DECAY * expected[name] + (1.0 - DECAY) * tensor.double()

    trainer._optimisers["policy"]._adamw.register_step_post_hook(follow)
    learn(trainer, 2)
    assert len(steps) == 8
    assert trainer._average is not None
    for name, tensor in trainer._average.tensors.items():
        torch.testing.assert_close(tensor.double(), expected[name], atol=1e-7, rtol=1e-5)
        assert not tensor.equal(policy_of(trainer)[name])


def test_d30_the_average_is_exported_and_the_adapter_itself_is_not_averaged(base: Path, tmp_path: Path) -> None:
    averaged, plain = new_trainer(base, ema_decay=DECAY), new_trainer(base)
    learn(averaged, 1)
    learn(plain, 1)
    exported = averaged.export_average(tmp_path / "average", policy_version=1)
    assert (
        averaged.export_adapter(tmp_path / "1", policy_version=1).files
        == plain.export_adapter(tmp_path / "2", policy_version=1).files
    )
    written = load_file(exported.directory / "adapter_model.safetensors")
    assert averaged._average is not None
    assert written.keys() == averaged._average.tensors.keys()
    assert all(written[name].equal(tensor) for name, tensor in averaged._average.tensors.items())
    assert not exported.is_identity
    assert all(tensor.equal(weights_of(plain)[name]) for name, tensor in weights_of(averaged).items())


def test_d30_the_average_waits_while_only_the_critic_learns(base: Path) -> None:
    trainer = new_trainer(base, ppo=PpoConfig(epochs=2, critic_warmup_steps=1), ema_decay=DECAY)
    start = policy_of(trainer)
    learn(trainer, 1)
    assert trainer._average is not None
    assert all(tensor.equal(start[name]) for name, tensor in trainer._average.tensors.items())


def test_d30_without_an_average_there_is_none_to_export(base: Path, tmp_path: Path) -> None:
    with pytest.raises(FailedPreconditionError) as caught:
        new_trainer(base).export_average(tmp_path / "average", policy_version=1)
    assert caught.value.violations[0].field == "trainer.ema_decay"
    assert list(tmp_path.iterdir()) == []
