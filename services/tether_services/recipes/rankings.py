"""Rankings as token ids: K answers to one prompt, or labelled texts put together into rankings."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tether.errors import InvalidArgumentError
from tether_services.recipes.config import RewardModelConfig
from tether_services.recipes.data.records import LabelledText, Ranking
from tether_services.recipes.data.rendering import Renderer, fit
from tether_services.recipes.progress import tracked

__all__ = [
    "RankingRows",
    "distinct_answers",
    "drop_tokens",
    "encode_rankings",
    "group_texts",
    "join_sentences",
    "labelled_pools",
    "labelled_rankings",
    "vary_case",
]

POOL_TEXTS = 2000
"""Labelled texts that are measured against each other: up to a million pairs."""


@dataclass(frozen=True, slots=True)
class RankingRows:
    """Rankings as token ids."""

    rows: list[dict[str, Any]]
    """`answer_ids` [K][T], prompt and end token included; `levels` [K], higher is better; `margin`, or None for 0."""
    lengths: list[list[int]]
    """[K] characters of the answers of each ranking."""
    num_overlong: int = 0
    """Records left out or cut because they were longer than `max_tokens`."""
    num_alike: int = 0
    """Answers left out because they are the same tokens as another one of their ranking, for example once cut."""
    num_only_ties: int = 0
    """Rankings left out because all their answers have the same level, before or after alike ones were left out."""

    @property
    def num_tokens(self) -> int:
        """Return the tokens that one pass reads."""
        return sum(len(ids) for row in self.rows for ids in row["answer_ids"])

    @property
    def num_answers(self) -> int:
        """Return the answers of all rankings."""
        return sum(len(row["levels"]) for row in self.rows)


def encode_rankings(items: Sequence[Ranking], renderer: Renderer, config: RewardModelConfig) -> RankingRows:
    """Return rankings as token ids, each answer after its prompt and with its end token.

    A ranking that `overlong = "drop"` leaves out is left out whole: one answer of it is too long. Of answers that are
    the same tokens with one level the first stays, with several levels none. Only ties teach a regression something.
    """
    rows: list[dict[str, Any]] = []
    lengths: list[list[int]] = []
    num_overlong = num_alike = num_only_ties = 0
    for item in tracked(items, title="reward: token ids"):
        prompt = renderer.prompt_ids(item.prompt)
        answers = [renderer.answer_ids(item.prompt, answer) for answer in item.answers]
        num_overlong += len(prompt) + max(len(answer) for answer in answers) > config.max_tokens
        fitted = fit(prompt, answers, max_tokens=config.max_tokens, overlong=config.overlong)
        if fitted is None:
            continue
        prompt, answers = fitted
        kept = distinct_answers(answers, item.levels)
        num_alike += len(answers) - len(kept)
        levels = [item.levels[place] for place in kept]
        if not levels or (config.objective == "ranking" and len(set(levels)) == 1):
            num_only_ties += 1
            continue
        rows.append({"answer_ids": [prompt + answers[k] for k in kept], "levels": levels, "margin": item.margin})
        lengths.append([len(item.answers[place]) for place in kept])
    return RankingRows(rows, lengths, num_overlong, num_alike, num_only_ties)


def distinct_answers(answers: Sequence[Sequence[int]], levels: Sequence[float]) -> list[int]:
    """Return the places of the answers to keep: the first of those alike, none where people ranked them differently.

    Example: answers a, b, a, c, c with levels 2, 1, 2, 0, 3 keep the places 0 and 1.
    """
    found: dict[tuple[int, ...], list[int]] = {}
    for place, answer in enumerate(answers):
        found.setdefault(tuple(answer), []).append(place)
    return [places[0] for places in found.values() if len({levels[place] for place in places}) == 1]


def labelled_rankings(items: Sequence[LabelledText], renderer: Renderer, config: RewardModelConfig) -> RankingRows:
    """Return the rankings of all passes over labelled texts in the order to train on, other ones in every pass.

    The rankings of a pass use every text of the rarer label about once. A text ends with the end token half of the
    time: the score has to hold at the end of a finished text and of one that was cut.

    Raises:
        InvalidArgumentError: There are too few texts of one label for a single ranking.
    """
    rng = random.Random(config.seed)
    kept, num_overlong = _without_overlong(items, renderer, config)
    rows: list[dict[str, Any]] = []
    lengths = []
    for group in _all_passes(kept, config, rng=rng):
        ids = [_varied_ids(renderer, item.text, config, rng=rng) for item in group]
        rows.append({"answer_ids": ids, "levels": [float(item.label) for item in group], "margin": None})
        lengths.append([len(item.text) for item in group])
    return RankingRows(rows, lengths, num_overlong)


def labelled_pools(items: Sequence[LabelledText], renderer: Renderer, config: RewardModelConfig) -> RankingRows:
    """Return labelled texts, as they are and without an end token, as one ranking of all positive over all negative.

    Of more than half of `POOL_TEXTS` of a label an evenly spaced part is taken.

    Raises:
        InvalidArgumentError: One of the labels is missing.
    """
    kept, num_overlong = _without_overlong(items, renderer, config)
    sides = [[item for item in kept if item.label == label] for label in (1, 0)]
    pool = [item for side in sides for item in side[:: math.ceil(2 * len(side) / POOL_TEXTS) or 1]]
    if {item.label for item in pool} != {0, 1}:
        raise InvalidArgumentError("the validation texts must have both labels", field="data.validation_sources")
    ids = [renderer.document_ids(item.text, is_finished=False)[: config.max_tokens] for item in pool]
    row = {"answer_ids": ids, "levels": [float(item.label) for item in pool], "margin": None}
    return RankingRows([row], [[len(item.text) for item in pool]], num_overlong)


def group_texts(
    items: Sequence[LabelledText], *, group_size: int, max_sentences: int, rng: random.Random
) -> Iterator[list[LabelledText]]:
    """Yield groups of texts to rank, half of each positive, until the texts of one label are used up.

    Args:
        items: Each is used at most once.
        group_size: Texts in a group; of an odd number the smaller half is positive.
        max_sentences: A text of a group joins 1 to this many of one label, each in one of three casings.
        rng: Decides everything.
    """
    pools = {label: [item for item in items if item.label == label] for label in (1, 0)}
    for pool in pools.values():
        rng.shuffle(pool)
    wanted = [1] * (group_size // 2) + [0] * (group_size - group_size // 2)
    while True:
        group = []
        for label in wanted:
            size = rng.randint(1, max_sentences)
            if len(pools[label]) < size:
                return
            parts = [pools[label].pop() for _ in range(size)]
            text = join_sentences([vary_case(part.text, rng=rng) for part in parts])
            group.append(LabelledText(text, label, parts[0].place))
        yield group


def vary_case(text: str, *, rng: random.Random) -> str:
    """Return the text as it is, in lower case, or with a capital first letter, one in three each."""
    choice = rng.randrange(3)
    return (text, text.lower(), text[:1].upper() + text[1:])[choice]


def join_sentences(sentences: Sequence[str]) -> str:
    """Return one text of several sentences; one that ends without a mark gets a full stop."""
    ended = (sentence if sentence[-1:] in '.!?"' else sentence + "." for sentence in sentences[:-1])
    return " ".join([*ended, *sentences[-1:]])


def drop_tokens(token_ids: Sequence[int], *, share: float, rng: random.Random) -> list[int]:
    """Return token ids without a random share of them; the first, which begins the text, stays, and one other."""
    kept = [token for token in token_ids[1:] if rng.random() >= share]
    return [*token_ids[:1], *(kept or token_ids[1:2])]


def _all_passes(
    items: Sequence[LabelledText], config: RewardModelConfig, *, rng: random.Random
) -> Iterator[list[LabelledText]]:
    """Yield the groups of `num_epochs` passes, or as many as `max_steps` takes."""
    training = config.training
    left = math.inf if training.max_steps is None else training.max_steps * training.rows_per_step
    num_passes = training.num_epochs if training.max_steps is None else math.inf
    while left > 0 and num_passes > 0:
        groups = list(group_texts(items, group_size=config.group_size, max_sentences=config.max_sentences, rng=rng))
        if not groups:
            message = f"{len(items)} texts are too few for one ranking of {config.group_size}, half of each label"
            raise InvalidArgumentError(f"{message}; lower group_size or give more data", field="group_size")
        taken = math.ceil(min(1.0, num_passes) * len(groups))
        yield from groups[: int(min(left, taken))]
        left, num_passes = left - taken, num_passes - 1


def _varied_ids(renderer: Renderer, text: str, config: RewardModelConfig, *, rng: random.Random) -> list[int]:
    """Return a text as token ids, some left out, cut to `max_tokens`, with the end token half of the time."""
    is_finished = rng.random() < 0.5
    ids = renderer.document_ids(text, is_finished=is_finished)
    body, end = (ids[:-1], ids[-1:]) if is_finished else (ids, [])
    kept = drop_tokens(body, share=config.token_dropout, rng=rng)
    return [*kept[: config.max_tokens - len(end)], *end]


def _without_overlong(
    items: Sequence[LabelledText], renderer: Renderer, config: RewardModelConfig
) -> tuple[list[LabelledText], int]:
    """Return the texts to use, and how many are longer than `max_tokens`; those are left out, or later cut."""
    fits = [len(renderer.document_ids(item.text)) <= config.max_tokens for item in items]
    kept = list(items) if config.overlong == "truncate" else [i for i, fit in zip(items, fits, strict=True) if fit]
    return kept, fits.count(False)
