"""AdamW with moments in 8 bits (bitsandbytes); parameters below 4,096 elements keep theirs in 32."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.unit.tiny_llama import new_trainer, random_samples, score_samples, weights_of, write_tiny_llama
from tether.errors import FailedPreconditionError, InvalidArgumentError
from tether_services.orchestrator.config import PpoConfig
from tether_services.orchestrator.trainer.optimiser import AdapterOptimiser, OptimizerKind

needs_library = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes, of the extra `quant`, is not installed"
)


def parameters() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {
        "large": nn.Parameter(torch.randn(64, 64, generator=generator)),
        "small": nn.Parameter(torch.randn(8, generator=generator)),
    }


def train(of: dict[str, nn.Parameter], optimiser: AdapterOptimiser, first: int, last: int) -> None:
    for step in range(first, last):
        generator = torch.Generator().manual_seed(100 + step)
        for parameter in of.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimiser.step(0.01)


@needs_library
def test_d27_moments_of_large_tensors_have_8_bits_and_steps_stay_close_to_adamw() -> None:
    results = []
    kinds: tuple[OptimizerKind, ...] = ("adamw", "adamw_8bit")
    for kind in kinds:
        of = parameters()
        optimiser = AdapterOptimiser(of, max_grad_norm=1.0, kind=kind)
        train(of, optimiser, 0, 5)
        results.append(of)
    exact, quantised = results
    state = optimiser.state_tensors()
    assert state["state1.large"].dtype == state["state2.large"].dtype == torch.uint8
    assert state["state1.small"].dtype == torch.float32
    start = parameters()
    for name, parameter in quantised.items():
        moved = (exact[name] - start[name]).abs().mean()
        assert (parameter - exact[name]).abs().mean() < 0.1 * moved
    assert not quantised["large"].equal(exact["large"])


@needs_library
@pytest.mark.parametrize("steps_before", [0, 3])
def test_a_restored_8_bit_optimiser_continues_bit_for_bit(steps_before: int) -> None:
    first = parameters()
    one = AdapterOptimiser(first, max_grad_norm=1.0, kind="adamw_8bit")
    train(first, one, 0, steps_before)
    second = {name: nn.Parameter(p.detach().clone()) for name, p in first.items()}
    two = AdapterOptimiser(second, max_grad_norm=1.0, kind="adamw_8bit")
    two.load_state({name: t.clone() for name, t in one.state_tensors().items()}, num_steps=one.num_steps)
    for of, optimiser in ((first, one), (second, two)):
        train(of, optimiser, steps_before, steps_before + 3)
    assert all(first[name].equal(second[name]) for name in first)
    states = one.state_tensors(), two.state_tensors()
    assert states[0].keys() == states[1].keys()
    assert all(tensor.equal(states[1][name]) for name, tensor in states[0].items())


@needs_library
def test_an_8_bit_state_that_does_not_fit_is_refused() -> None:
    of = parameters()
    one = AdapterOptimiser(of, max_grad_norm=1.0, kind="adamw_8bit")
    train(of, one, 0, 1)
    good = one.state_tensors()
    two = AdapterOptimiser(parameters(), max_grad_norm=1.0, kind="adamw_8bit")
    for bad in (
        {name: t for name, t in good.items() if name != "state2.large"},
        {name: t for name, t in good.items() if name != "step.small"},
        good | {"state1.large": torch.zeros(3, dtype=torch.uint8)},
    ):
        with pytest.raises(InvalidArgumentError):
            two.load_state(bad, num_steps=1)
    assert two.state_tensors() == {}


@needs_library
def test_a_trainer_with_8_bit_moments_resumes_bit_for_bit(tmp_path: Path) -> None:
    base = write_tiny_llama(tmp_path / "base", hidden_size=64, num_hidden_layers=1)
    ppo = PpoConfig(epochs=2)
    wide: dict[str, Any] = {"lora_rank": 64, "optimizer": "adamw_8bit"}
    whole = new_trainer(base, ppo=ppo, **wide)
    whole.update(score_samples(whole, random_samples(6)))
    assert whole._optimisers["policy"].state_tensors()
    assert any(t.dtype == torch.uint8 for t in whole._optimisers["policy"].state_tensors().values())
    whole.save_checkpoint(tmp_path / "1")
    resumed = new_trainer(base, ppo=ppo, seed=9, **wide)
    resumed.load_checkpoint(tmp_path / "1")
    for trainer in (whole, resumed):
        trainer.update(score_samples(trainer, random_samples(6, seed=1)))
    expected = weights_of(whole)
    assert all(tensor.equal(expected[name]) for name, tensor in weights_of(resumed).items())
    with pytest.raises(FailedPreconditionError, match="other optimizer"):
        new_trainer(base, ppo=ppo, lora_rank=64).load_checkpoint(tmp_path / "1")


def test_without_the_library_the_setting_is_refused_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(InvalidArgumentError, match=r"tether\[quant\]") as caught:
        AdapterOptimiser(parameters(), max_grad_norm=1.0, kind="adamw_8bit")
    assert caught.value.violations[0].field == "trainer.optimizer"
