from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.unit.tiny_llama import new_trainer, random_samples, score_samples, write_tiny_llama
from tether.errors import InvalidArgumentError
from tether_services.orchestrator.config import PpoConfig
from tether_services.orchestrator.trainer import Sample, Trainer
from tether_services.orchestrator.trainer.batch import build_micro_batches
from tether_services.orchestrator.trainer.forward import (
    gather_flat,
    response_logprobs,
    response_logprobs_and_entropies,
    response_values,
)
from tether_services.ppo import logprobs as token_module

STORIES = Path(__file__).resolve().parents[3] / "shared" / "models" / "stories260k"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def trained(base: Path) -> Trainer:
    """A trainer whose policy and critic have moved away from the base."""
    trainer = new_trainer(base, ppo=PpoConfig(epochs=2))
    trainer.update(score_samples(trainer, random_samples(12)))
    return trainer


def plain_logprobs(folder: Path, sample: Sample, temperature: float) -> Tensor:
    """One unpadded forward pass of transformers, and a loop over the response."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    text = [*sample.prompt_token_ids, *sample.response_token_ids]
    with torch.no_grad():
        logits = model(torch.tensor([text])).logits[0]
    first = len(sample.prompt_token_ids)
    rows = [torch.log_softmax(logits[t - 1] / temperature, -1)[text[t]] for t in range(first, len(text))]
    return torch.stack(rows)


def assert_reference_matches_plain_forward(folder: Path, trainer: Trainer, samples: list[Sample]) -> None:
    for temperature in (1.0, 0.7):
        got = trainer.compute_logprobs(samples, adapter="reference", temperature=temperature)
        for sample, row in zip(samples, got, strict=True):
            torch.testing.assert_close(row, plain_logprobs(folder, sample, temperature), atol=1e-5, rtol=0.0)


def test_d1_reference_logprobs_equal_a_plain_forward_at_every_temperature(base: Path, trained: Trainer) -> None:
    assert_reference_matches_plain_forward(base, trained, random_samples(7, seed=1))


def test_d1_reference_logprobs_of_a_real_model_equal_a_plain_forward() -> None:
    if not STORIES.is_dir():
        pytest.skip("the stories260k model (../shared/models) is not beside this checkout")
    trainer = new_trainer(STORIES)
    assert_reference_matches_plain_forward(STORIES, trainer, random_samples(4, vocab_size=512))


def test_d1_the_temperature_matters(trained: Trainer) -> None:
    samples = random_samples(3)
    warm, cold = (trained.compute_logprobs(samples, adapter="policy", temperature=t)[0] for t in (1.0, 0.7))
    assert (warm - cold).abs().max() > 1e-2


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_d1_policy_and_reference_are_identical_before_training(base: Path, temperature: float) -> None:
    trainer, samples = new_trainer(base), random_samples(9)
    policy = torch.cat(trainer.compute_logprobs(samples, adapter="policy", temperature=temperature))
    reference = torch.cat(trainer.compute_logprobs(samples, adapter="reference", temperature=temperature))
    assert (policy - reference).abs().max() == 0.0


def test_training_moves_the_policy_and_leaves_the_reference(base: Path, trained: Trainer) -> None:
    samples = random_samples(5)
    policy, reference = (
        torch.cat(trained.compute_logprobs(samples, adapter=adapter, temperature=1.0))
        for adapter in ("policy", "reference")
    )
    untouched = torch.cat(new_trainer(base).compute_logprobs(samples, adapter="reference", temperature=1.0))
    assert (policy - reference).abs().max() > 1e-3
    assert reference.equal(untouched)


def test_d2_results_come_back_in_the_order_and_lengths_of_the_samples(trained: Trainer) -> None:
    samples = random_samples(9)
    together = trained.compute_logprobs(samples, adapter="policy", temperature=1.0)
    assert [len(row) for row in together] == [len(s.response_token_ids) for s in samples]
    for sample, row in zip(samples, together, strict=True):
        (alone,) = trained.compute_logprobs([sample], adapter="policy", temperature=1.0)
        torch.testing.assert_close(row, alone, atol=1e-5, rtol=0.0)


def test_d3_more_padding_changes_nothing(trained: Trainer) -> None:
    short, long = Sample([4, 5], [6, 7, 8]), Sample([9] * 20, [10] * 20)
    alone = trained.compute_logprobs([short], adapter="policy", temperature=1.0)[0]
    padded = trained.compute_logprobs([short, long], adapter="policy", temperature=1.0)[0]
    torch.testing.assert_close(padded, alone, atol=1e-5, rtol=0.0)
    values = trained.compute_values([short])[0]
    torch.testing.assert_close(trained.compute_values([short, long])[0], values, atol=1e-5, rtol=0.0)


def test_d3_the_id_that_fills_the_padding_is_never_read(trained: Trainer) -> None:
    (micro,) = build_micro_batches([Sample([4, 5], [6]), Sample([9] * 5, [10] * 5)], range(2), max_tokens=100)
    other = micro.token_ids.clone()
    other[0, 2:] = 33
    refilled = replace(micro, token_ids=other)
    with trained._model.using("policy"), torch.no_grad():
        first, second = (response_logprobs(trained._model, m, temperature=1.0) for m in (micro, refilled))
    assert first.equal(second)


def test_d2_values_are_read_at_the_state_before_each_token(trained: Trainer) -> None:
    sample = Sample([4, 5, 6], [7, 8, 9])
    values = trained.compute_values([sample])[0]
    for t in range(3):
        prefix = Sample([4, 5, 6], [7, 8, 9][: t + 1])
        torch.testing.assert_close(trained.compute_values([prefix])[0][t], values[t], atol=1e-6, rtol=0.0)
    # The last token is an action, not a state: what it is must not matter to any value.
    assert trained.compute_values([Sample([4, 5, 6], [7, 8, 40])])[0].equal(values)
    assert not trained.compute_values([Sample([4, 5, 41], [7, 8, 9])])[0].equal(values)


def test_chunks_over_the_vocabulary_change_neither_logprobs_nor_gradients(
    trained: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    (micro,) = build_micro_batches(random_samples(6), range(6), max_tokens=1000)
    results = []
    for chunk_logits in (10**9, 48 * 3, 1):
        monkeypatch.setattr(token_module, "MAX_LOGITS", chunk_logits)
        with trained._model.using("policy"):
            logprobs = response_logprobs(trained._model, micro, temperature=0.7)
            parameters = list(trained._model.adapter_parameters("policy").values())
            gradients = torch.autograd.grad((logprobs * torch.arange(len(logprobs))).sum(), parameters)
        results.append(torch.cat([logprobs.detach(), *(g.flatten() for g in gradients)]))
    torch.testing.assert_close(results[1], results[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(results[2], results[0], atol=1e-4, rtol=1e-4)


def test_never_more_than_a_chunk_of_logits_exists_at_a_time(trained: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_module, "MAX_LOGITS", 48 * 5)
    model, sizes = trained._model, []
    hook = model._head.register_forward_hook(lambda _module, _inputs, output: sizes.append(output.shape))
    micro_batches = build_micro_batches(random_samples(10), range(10), max_tokens=1000)
    with model.using("policy"):
        torch.autograd.backward([response_logprobs(model, m, temperature=1.0).sum() for m in micro_batches])
    hook.remove()
    assert max(rows for rows, _vocabulary in sizes) == 5
    # Each chunk runs twice: its logits are not kept for the backward pass.
    assert sum(rows for rows, _vocabulary in sizes) == 2 * sum(len(s.response_token_ids) for s in random_samples(10))
    for parameter in model.adapter_parameters("policy").values():
        parameter.grad = None


def test_d26_entropies_come_with_the_same_logprobs_bit_for_bit(trained: Trainer) -> None:
    (micro,) = build_micro_batches(random_samples(6), range(6), max_tokens=1000)
    with trained._model.using("policy"):
        logprobs, entropies = response_logprobs_and_entropies(trained._model, micro, temperature=1.3)
        plain = response_logprobs(trained._model, micro, temperature=1.3)
    assert logprobs.equal(plain)
    assert entropies.min() > 0.0
    assert entropies.max() <= math.log(48)


def test_gather_flat_puts_every_result_in_its_place_without_gradient(trained: Trainer) -> None:
    samples = random_samples(8)
    layout = build_micro_batches(samples, range(8), max_tokens=20)
    num_tokens = sum(len(s.response_token_ids) for s in samples)
    got = gather_flat(layout, lambda micro: micro.targets, num_tokens=num_tokens)
    assert got.tolist() == [t for s in samples for t in s.response_token_ids]
    with trained._model.using("critic"):
        values = gather_flat(layout, lambda micro: response_values(trained._model, micro), num_tokens=num_tokens)
    assert not values.requires_grad
    torch.testing.assert_close(values, torch.cat(trained.compute_values(samples)), atol=1e-5, rtol=0.0)


@pytest.mark.parametrize("temperature", [0.0, 0.009, 2.1, -1.0, math.nan])
def test_d1_a_temperature_out_of_range_is_refused(trained: Trainer, temperature: float) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        trained.compute_logprobs(random_samples(1), adapter="policy", temperature=temperature)
    assert caught.value.violations[0].field == "temperature"


def test_probe_logprobs_are_those_of_the_policy_at_temperature_1(trained: Trainer) -> None:
    probes = random_samples(3)
    rows = trained.compute_logprobs(probes, adapter="policy", temperature=1.0)
    assert trained.probe_logprobs(probes) == [row.tolist() for row in rows]
    base = trained.compute_logprobs(probes, adapter="reference", temperature=1.0)
    assert trained.base_logprobs(probes) == [row.tolist() for row in base] != trained.probe_logprobs(probes)


def test_a_bfloat16_base_gives_float32_logprobs_close_to_float32(base: Path, tmp_path: Path) -> None:
    samples = random_samples(6)
    half = torch.cat(new_trainer(base, dtype="bfloat16").compute_logprobs(samples, adapter="policy", temperature=1.0))
    full = torch.cat(new_trainer(base).compute_logprobs(samples, adapter="policy", temperature=1.0))
    assert half.dtype == torch.float32
    assert 0.0 < (half - full).abs().mean() < 0.1
