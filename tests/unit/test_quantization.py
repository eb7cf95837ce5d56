"""Models in 8 and 4 bits, on the CPU as on a GPU: what is quantised, what is not, and that training works on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.unit.test_reference_trainer_parity import reference_logprobs
from tests.unit.tiny_llama import new_trainer, random_samples, score_samples, write_tiny_llama
from tether.errors import InvalidArgumentError
from tether_services.generator.config import GeneratorSettings
from tether_services.reference.engine import LogprobTask
from tether_services.runtime.pretrained import load_pretrained

pytest.importorskip("bitsandbytes", reason="needs the quant extra")
QUANTIZATIONS = ["int8", "nf4"]
IDS = torch.tensor([[1, 5, 9, 13, 20, 31, 40]])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose input width, 96, is no multiple of 64."""
    return write_tiny_llama(tmp_path_factory.mktemp("base"), hidden_size=96, intermediate_size=160, head_dim=48)


def load(folder: Path, quantization: Any) -> Any:
    return load_pretrained(
        AutoModelForCausalLM, folder, dtype="float32", field="model", quantization=quantization, device="cpu"
    )


@torch.no_grad()
def logprobs(model: Any) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=IDS).logits[:, :-1].float()
    return logits.log_softmax(-1).gather(-1, IDS[:, 1:, None])[..., 0]


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_the_layers_are_quantised_and_the_output_is_not(base: Path, quantization: str) -> None:
    model = load(base, quantization)
    bits = {"int8": "Linear8bitLt", "nf4": "Linear4bit"}[quantization]
    linear = {
        name: type(module).__name__ for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)
    }
    assert linear.pop("lm_head") == "Linear"
    assert len(linear) == 14 and set(linear.values()) == {bits}
    size = model.get_memory_footprint()
    assert size < 0.6 * load(base, "none").get_memory_footprint()


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_a_quantised_model_is_near_the_whole_one_but_not_equal(base: Path, quantization: str) -> None:
    difference = (logprobs(load(base, quantization)) - logprobs(load(base, "none"))).abs().mean()
    assert 1e-4 < difference < {"int8": 0.1, "nf4": 3.0}[quantization]


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_a_quantised_model_computes_the_same_in_training_and_in_evaluation(base: Path, quantization: str) -> None:
    model = load(base, quantization)
    in_training = logprobs(model.train())
    torch.testing.assert_close(logprobs(model.eval()), in_training, rtol=0, atol=0)
    torch.testing.assert_close(logprobs(model.train()), in_training, rtol=0, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_the_rows_of_a_batch_do_not_change_each_other(base: Path, quantization: str) -> None:
    model = load(base, quantization)
    rows = torch.randint(4, 40, (6, 12), generator=torch.Generator().manual_seed(0))
    together = model(input_ids=rows).logits
    alone = torch.cat([model(input_ids=row[None]).logits for row in rows])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-4)


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_an_update_on_a_quantised_base_moves_the_adapters_alone(base: Path, quantization: str) -> None:
    trainer = new_trainer(base, quantization=quantization)
    frozen = {n: p.detach().clone() for n, p in trainer._model._peft.named_parameters() if "lora" not in n}
    batch = score_samples(trainer, random_samples(8))
    before = trainer.compute_logprobs(batch.samples, adapter="policy", temperature=1.0)
    report = trainer.update(batch)
    assert report.policy_grad_norm > 0.0 and report.critic_grad_norm > 0.0
    after = trainer.compute_logprobs(batch.samples, adapter="policy", temperature=1.0)
    assert any((a - b).abs().max() > 1e-3 for a, b in zip(after, before, strict=True))
    now = dict(trainer._model._peft.named_parameters())
    assert all(now[name].equal(value) for name, value in frozen.items())
    assert {p.dtype for n, p in now.items() if "lora" in n} == {torch.float32}


def test_reference_service_and_trainer_agree_on_a_base_in_four_bits(base: Path) -> None:
    samples = random_samples(6)
    tasks = [LogprobTask(tuple(s.prompt_token_ids), tuple(s.response_token_ids), 1.0, False) for s in samples]
    theirs = new_trainer(base, quantization="nf4").compute_logprobs(samples, adapter="reference", temperature=1.0)
    ours = reference_logprobs(base, tasks, quantization="nf4")
    for one, other in zip(ours, theirs, strict=True):
        assert one.ref_logprobs == pytest.approx(other.tolist(), abs=1e-4)
    whole = reference_logprobs(base, tasks)
    gaps = [
        abs(x - y) for a, b in zip(whole, theirs, strict=True) for x, y in zip(a.ref_logprobs, b.tolist(), strict=True)
    ]
    assert max(gaps) > 1e-2, "a base as stored would not agree"


def test_without_bitsandbytes_the_error_names_the_setting_and_the_extra(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tether_services.runtime.pretrained.find_spec", lambda name: None)
    with pytest.raises(InvalidArgumentError, match=r"tether\[quant\]") as caught:
        load(base, "nf4")
    assert [violation.field for violation in caught.value.violations] == ["quantization"]


def test_vllm_takes_four_bits_and_not_eight() -> None:
    assert GeneratorSettings(engine="vllm", model="m", quantization="nf4").quantization == "nf4"
    with pytest.raises(ValueError, match="nf4"):
        GeneratorSettings(engine="vllm", model="m", quantization="int8")
