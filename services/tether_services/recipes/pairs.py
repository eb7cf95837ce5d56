"""Rankings as pairs of token ids, and how well a policy tells the two answers of a pair apart."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

import numpy as np

from tether.reference import LogprobItem
from tether_services.recipes.config import DpoConfig
from tether_services.recipes.data.records import Ranking, ordered_pairs
from tether_services.recipes.data.rendering import Renderer, fit
from tether_services.recipes.ranking_metrics import win_share

__all__ = ["Logprobs", "Pairs", "TokenPair", "completions_of", "encode_pairs", "measure_pairs", "order_pairs"]

Logprobs = Mapping[LogprobItem, float]
"""Log-probability of each response, in nats, summed over its tokens."""


@dataclass(frozen=True, slots=True)
class TokenPair:
    """A prompt with a better and a worse answer."""

    prompt_ids: tuple[int, ...]
    chosen_ids: tuple[int, ...]
    """Of the better answer, the end token included."""
    rejected_ids: tuple[int, ...]
    """Of the other one, likewise."""
    extra_characters: int
    """By how much the text of the better answer is longer; below 0 where it is shorter."""

    @property
    def chosen(self) -> LogprobItem:
        """Return the better answer after its prompt."""
        return LogprobItem(self.prompt_ids, self.chosen_ids)

    @property
    def rejected(self) -> LogprobItem:
        """Return the other answer after the prompt."""
        return LogprobItem(self.prompt_ids, self.rejected_ids)


@dataclass(frozen=True, slots=True)
class Pairs:
    """The pairs of some rankings."""

    pairs: list[TokenPair]
    num_overlong: int
    """Pairs, which are the records here, left out or cut because one of the two was longer than `max_tokens`."""
    num_alike: int
    """Pairs left out because nothing tells the two apart, for example once both are cut."""
    num_only_ties: int
    """Rankings left out because all their answers have the same level."""

    @property
    def num_tokens(self) -> int:
        """Return the tokens that one pass reads; the prompt is read with either answer."""
        return sum(2 * len(p.prompt_ids) + len(p.chosen_ids) + len(p.rejected_ids) for p in self.pairs)


def order_pairs(levels: Sequence[float], *, pairs: Literal["all", "best_worst"]) -> Iterator[tuple[int, int]]:
    """Yield (better, worse) places of a ranking's answers; a tie is no pair.

    Args:
        levels: [K], higher is better, at least two differ.
        pairs: Every pair, or only the best answer with the worst, the first of each where there are several.
    """
    if pairs == "best_worst":
        yield levels.index(max(levels)), levels.index(min(levels))
    else:
        yield from ordered_pairs(levels)


def encode_pairs(rankings: Iterable[Ranking], renderer: Renderer, config: DpoConfig) -> Pairs:
    """Return the pairs of rankings as token ids of at most `max_tokens`; the two of a pair share one prompt."""
    pairs: list[TokenPair] = []
    num_overlong = num_alike = num_only_ties = 0
    for ranking in rankings:
        if len(set(ranking.levels)) == 1:
            num_only_ties += 1
            continue
        prompt = renderer.prompt_ids(ranking.prompt)
        answers = [renderer.answer_ids(ranking.prompt, answer) for answer in ranking.answers]
        for better, worse in order_pairs(ranking.levels, pairs=config.pairs):
            both = [answers[better], answers[worse]]
            num_overlong += len(prompt) + max(map(len, both)) > config.max_tokens
            fitted = fit(prompt, both, max_tokens=config.max_tokens, overlong=config.overlong)
            if fitted is None:
                continue
            if fitted[1][0] == fitted[1][1]:
                num_alike += 1
                continue
            extra = len(ranking.answers[better]) - len(ranking.answers[worse])
            pairs.append(TokenPair(tuple(fitted[0]), tuple(fitted[1][0]), tuple(fitted[1][1]), extra))
    return Pairs(pairs, num_overlong, num_alike, num_only_ties)


def completions_of(pairs: Iterable[TokenPair]) -> list[LogprobItem]:
    """Return the distinct answers after their prompts: a ranking of K has K of them, and K (K - 1) / 2 pairs."""
    return list(dict.fromkeys(item for pair in pairs for item in (pair.chosen, pair.rejected)))


def measure_pairs(
    pairs: Sequence[TokenPair], policy: Logprobs, reference: Logprobs, *, beta: float
) -> dict[str, float]:
    """Return how a policy ranks pairs by its implicit reward, beta * (log pi - log ref), beside the length baseline.

    Args:
        pairs: At least one.
        policy: Of the answers of the pairs.
        reference: Of the same ones.
        beta: Of the loss.

    Returns:
        `accuracy`: share of the pairs in which the better answer has the higher reward; equal rewards count half.
        `reward_margin`: mean difference of the two rewards. `chosen_logprob_change`, `rejected_logprob_change`: mean
        of log pi - log ref, nats per answer. `longer_wins`: share in which the better answer is the longer text,
        equal lengths count half; `length_baseline`: what always choosing by length would get, the longer or the
        shorter.
    """
    chosen = [policy[pair.chosen] - reference[pair.chosen] for pair in pairs]
    rejected = [policy[pair.rejected] - reference[pair.rejected] for pair in pairs]
    leads = np.subtract(chosen, rejected)
    longer_wins = win_share(np.array([pair.extra_characters for pair in pairs], dtype=float))
    return {
        "accuracy": win_share(leads),
        "reward_margin": beta * float(np.mean(leads)),
        "chosen_logprob_change": fmean(chosen),
        "rejected_logprob_change": fmean(rejected),
        "longer_wins": longer_wins,
        "length_baseline": max(longer_wins, 1.0 - longer_wins),
    }
