from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from tether_services.ppo import logprobs as module
from tether_services.ppo.kl import estimate_kl
from tether_services.ppo.logprobs import token_logprobs, token_logprobs_and_entropies

VOCAB = 11


def problem(count: int = 7, *, seed: int = 0) -> tuple[Tensor, Tensor, nn.Linear]:
    torch.manual_seed(seed)
    head = nn.Linear(5, VOCAB).double()
    return torch.randn(count, 5, dtype=torch.float64), torch.randint(0, VOCAB, (count,)), head


def logprobs_at(temperature: float, *, seed: int = 0) -> Tensor:
    hidden, tokens, head = problem(seed=seed)
    return token_logprobs(hidden, tokens, head=head, vocab_size=VOCAB, temperature=temperature)


def slow_logprob(logits: list[float], token: int, temperature: float) -> float:
    scaled = [logit / temperature for logit in logits]
    return scaled[token] - math.log(sum(math.exp(logit) for logit in scaled))


def slow_entropy(logits: list[float], temperature: float) -> float:
    logprobs = [slow_logprob(logits, token, temperature) for token in range(len(logits))]
    return -sum(math.exp(logprob) * logprob for logprob in logprobs)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
def test_d1_logprobs_and_entropies_equal_a_slow_loop(temperature: float) -> None:
    hidden, tokens, head = problem()
    rows = head(hidden).tolist()
    expected = [slow_logprob(row, token, temperature) for row, token in zip(rows, tokens.tolist(), strict=True)]
    entropies = [slow_entropy(row, temperature) for row in rows]
    got, got_entropies = token_logprobs_and_entropies(
        hidden, tokens, head=head, vocab_size=VOCAB, temperature=temperature
    )
    assert got.tolist() == pytest.approx(expected, abs=1e-12)
    assert got_entropies.tolist() == pytest.approx(entropies, abs=1e-12)
    alone = token_logprobs(hidden, tokens, head=head, vocab_size=VOCAB, temperature=temperature)
    assert torch.equal(alone, got)


def test_d1_the_kl_of_equal_policies_is_0_at_one_temperature_and_not_at_two() -> None:
    policy, reference = logprobs_at(0.7), logprobs_at(0.7)
    assert estimate_kl(policy, reference, kind="k1").eq(0.0).all()
    assert estimate_kl(policy, logprobs_at(1.0), kind="k1").abs().max() > 0.05


def test_d2_the_logprob_of_a_token_uses_the_state_before_it() -> None:
    # Two rows of different prompt length, gathered from one packed run of states.
    hidden, _, head = problem(8)
    ids = torch.arange(8) % VOCAB
    contexts, ends = (2, 6), (4, 8)
    positions = [t for ctx, end in zip(contexts, ends, strict=True) for t in range(ctx, end)]
    states = hidden[[t - 1 for t in positions]]
    got = token_logprobs(states, ids[positions], head=head, vocab_size=VOCAB, temperature=1.0)
    expected = [slow_logprob(head(hidden[t - 1]).tolist(), int(ids[t]), 1.0) for t in positions]
    assert got.tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("max_logits", [1, VOCAB, 2 * VOCAB, 3 * VOCAB + 1, 1000])
def test_the_chunk_size_changes_nothing(monkeypatch: pytest.MonkeyPatch, max_logits: int) -> None:
    whole = logprobs_at(0.7)
    monkeypatch.setattr(module, "MAX_LOGITS", max_logits)
    assert torch.allclose(whole, logprobs_at(0.7), atol=1e-14, rtol=0)


def test_no_chunk_holds_more_logits_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, tokens, head = problem(10)
    monkeypatch.setattr(module, "MAX_LOGITS", 3 * VOCAB)
    sizes: list[int] = []

    def counting(states: Tensor) -> Tensor:
        logits: Tensor = head(states)
        sizes.append(logits.numel())
        return logits

    with torch.no_grad():
        token_logprobs(hidden, tokens, head=counting, vocab_size=VOCAB, temperature=1.0)
    assert sizes == [3 * VOCAB, 3 * VOCAB, 3 * VOCAB, VOCAB]


def test_gradients_equal_those_of_a_plain_log_softmax(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, tokens, head = problem()
    hidden.requires_grad_()
    plain = torch.log_softmax(head(hidden) / 0.7, -1).gather(-1, tokens[:, None]).sum()
    expected = torch.autograd.grad(plain, [hidden, head.weight])
    monkeypatch.setattr(module, "MAX_LOGITS", 2 * VOCAB)
    total = token_logprobs(hidden, tokens, head=head, vocab_size=VOCAB, temperature=0.7).sum()
    got = torch.autograd.grad(total, [hidden, head.weight])
    for one, other in zip(expected, got, strict=True):
        assert torch.allclose(one, other, atol=1e-12)


def test_d26_gradients_of_the_entropies_equal_those_of_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, tokens, head = problem()
    logp = torch.log_softmax(head(hidden) / 0.7, -1)
    (expected,) = torch.autograd.grad(-(logp.exp() * logp).sum(), head.weight)
    monkeypatch.setattr(module, "MAX_LOGITS", 2 * VOCAB)
    _, entropies = token_logprobs_and_entropies(hidden, tokens, head=head, vocab_size=VOCAB, temperature=0.7)
    (got,) = torch.autograd.grad(entropies.sum(), head.weight)
    assert torch.allclose(got, expected, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_half_precision_states_give_float32(dtype: torch.dtype) -> None:
    hidden, tokens, head = problem()
    states, half = hidden.to(dtype), head.to(dtype)
    got = token_logprobs(states, tokens, head=half, vocab_size=VOCAB, temperature=1.0)
    assert got.dtype == torch.float32
    exact = torch.log_softmax(half(states).double(), -1).gather(-1, tokens[:, None]).squeeze(-1)
    assert torch.allclose(got.double(), exact, atol=1e-5)


def test_one_token_is_enough_and_none_is_an_error() -> None:
    hidden, tokens, head = problem(1)
    assert token_logprobs(hidden, tokens, head=head, vocab_size=VOCAB, temperature=1.0).shape == (1,)
    with pytest.raises(ValueError, match="at least 1"):
        token_logprobs(hidden[:0], tokens[:0], head=head, vocab_size=VOCAB, temperature=1.0)
    with pytest.raises(ValueError, match="same length"):
        token_logprobs(hidden, tokens.repeat(2), head=head, vocab_size=VOCAB, temperature=1.0)
