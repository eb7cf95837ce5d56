"""What a data set holds: counts, lengths, repeats, contradictions, and how far length alone predicts a preference."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from tether_services.recipes.config import DataConfig
from tether_services.recipes.data.reading import OnRow, divide_parts, read_parts, report_of
from tether_services.recipes.data.records import Demonstration, LabelledText, Prompt, Ranking, ordered_pairs
from tether_services.recipes.data.rendering import Renderer
from tether_services.recipes.data.shapes import Record
from tether_services.recipes.data.splitting import canonical_prompt, split_key
from tether_services.recipes.ranking_metrics import Judged, measure_agreement

__all__ = ["Inspection", "LengthPreference", "Lengths", "Overlap", "inspect_data", "length_preference"]

PERCENTILES = (0, 25, 50, 75, 90, 99, 100)


@dataclass(frozen=True, slots=True)
class Lengths:
    """How long a part of the records is."""

    name: str
    """What is measured and in which unit, for example "answer characters"."""
    count: int
    mean: float
    percentiles: dict[str, int]
    """Nearest-rank percentiles by name, p0 (the shortest) to p100 (the longest)."""


@dataclass(frozen=True, slots=True)
class Overlap:
    """What two parts of the data share."""

    first: str
    second: str
    num_prompts: int
    """Distinct whole prompts, or texts, in both."""
    num_openings: int
    """Distinct keys of the split in both: what goes to validation together."""


@dataclass(frozen=True, slots=True)
class LengthPreference:
    """How often the longer answer is the preferred one: what a reward model must beat to know more than length."""

    num_pairs: int
    """Pairs of answers on different levels, over all rankings."""
    longer_wins: float
    """Share of them in which the preferred answer has more characters; equal lengths count half."""
    longest_is_best: float
    """Share of rankings with two levels or more in which the longest answer is a best one; equally long ones share."""


@dataclass(frozen=True, slots=True)
class Inspection:
    """Everything that `tether data inspect` prints."""

    report: dict[str, Any]
    """As a stage would report it: shapes, rows, what was dropped or malformed, sizes of both parts."""
    malformed_share: float
    """Malformed rows among all rows."""
    num_prompts: int
    """Distinct whole prompts, or texts."""
    num_repeated_prompts: int
    """Records whose prompt occurs earlier; not counting records that are equal altogether."""
    num_answers: dict[int, int]
    """Rankings by number of answers K."""
    labels: dict[int, int]
    """Labelled texts by label."""
    lengths: list[Lengths]
    overlaps: list[Overlap]
    """Training with validation data before shared prompts are taken out; then each two sources that share any."""
    num_conflicts: int
    """Pairs of answers that are ranked in both directions for one prompt."""
    length_preference: LengthPreference | None
    """For rankings only."""

    def as_dict(self) -> dict[str, Any]:
        """Return the figures as JSON spells them."""
        return asdict(self)


def inspect_data(config: DataConfig, *, renderer: Renderer | None = None, on_row: OnRow | None = None) -> Inspection:
    """Return what the sources of a configuration hold; malformed rows never refuse them here.

    Args:
        config: All sources of one kind.
        renderer: Counts tokens too; None: characters only.
        on_row: Called after every row.

    Raises:
        InvalidArgumentError: A source cannot be read, or holds another kind of record than the first.
    """
    parts = read_parts(config, kind=None, on_row=on_row)
    kept = [part.records for part in parts]
    train, validation = divide_parts(parts, fraction=config.validation_fraction)
    records = [record for part in kept for record in part]
    num_rows = sum(part.tally.num_rows for part in parts)
    rankings = [record for record in records if isinstance(record, Ranking)]
    prompts = {_prompt_key(record) for record in records}
    return Inspection(
        report=report_of(parts, num_train=len(train), num_validation=len(validation)).as_dict(),
        malformed_share=sum(part.tally.malformed.total() for part in parts) / max(1, num_rows),
        num_prompts=len(prompts),
        num_repeated_prompts=len(records) - len(prompts),
        num_answers=dict(sorted(Counter(len(ranking.answers) for ranking in rankings).items())),
        labels=dict(sorted(Counter(r.label for r in records if isinstance(r, LabelledText)).items())),
        lengths=list(_measure_lengths(records, renderer=renderer)),
        overlaps=list(_find_overlaps(kept if len(kept) == 2 else [train, validation], records)),
        num_conflicts=count_conflicts(rankings),
        length_preference=length_preference(rankings),
    )


def _prompt_key(record: Record) -> str:
    return canonical_prompt(record.prompt) if isinstance(record, Demonstration | Ranking) else split_key(record)


def preferred_pairs(ranking: Ranking) -> Iterator[tuple[str, str]]:
    """Yield (better, worse) for every two answers on different levels."""
    for better, worse in ordered_pairs(ranking.levels):
        yield ranking.answers[better], ranking.answers[worse]


def length_preference(rankings: Iterable[Ranking]) -> LengthPreference | None:
    """Return how far length alone predicts the order of answers, or None where there is no pair."""
    judged = []
    for ranking in rankings:
        if len(set(ranking.levels)) > 1:
            lengths = np.array([len(answer) for answer in ranking.answers], dtype=float)
            judged.append(Judged(scores=lengths, levels=np.array(ranking.levels, dtype=float), lengths=lengths))
    if not judged:
        return None
    found = measure_agreement(judged)
    return LengthPreference(found.num_pairs, found.longer_wins, found.longest_top1)


def count_conflicts(rankings: Iterable[Ranking]) -> int:
    """Return how many pairs of answers to one prompt are ranked in both directions."""
    seen = {
        (canonical_prompt(ranking.prompt), better, worse)
        for ranking in rankings
        for better, worse in preferred_pairs(ranking)
    }
    return sum((prompt, worse, better) in seen for prompt, better, worse in seen) // 2


def _find_overlaps(parts: Sequence[Sequence[Record]], records: Sequence[Record]) -> Iterator[Overlap]:
    yield _overlap("training", parts[0], "validation", parts[1])
    by_source: dict[str, list[Record]] = {}
    for record in records:
        by_source.setdefault(record.place.source, []).append(record)
    for (first, ours), (second, theirs) in itertools.combinations(by_source.items(), 2):
        overlap = _overlap(first, ours, second, theirs)
        if overlap.num_openings:
            yield overlap


def _overlap(first: str, ours: Sequence[Record], second: str, theirs: Sequence[Record]) -> Overlap:
    prompts = {_prompt_key(record) for record in ours} & {_prompt_key(record) for record in theirs}
    openings = {split_key(record) for record in ours} & {split_key(record) for record in theirs}
    return Overlap(first, second, len(prompts), len(openings))


def _measure_lengths(records: Sequence[Record], *, renderer: Renderer | None) -> Iterator[Lengths]:
    shown = [record for record in records if isinstance(record, Demonstration | Ranking)]
    texts = [record.text for record in records if not isinstance(record, Demonstration | Ranking)]
    answers = [(record.prompt, answer) for record in shown for answer in _answers(record)]
    if texts:
        yield _percentiles("text characters", map(len, texts))
    if shown:
        yield _percentiles("prompt characters", (_count_characters(record.prompt) for record in shown))
        yield _percentiles("answer characters", (len(answer) for _, answer in answers))
    if renderer and texts:
        yield _percentiles("text tokens", (len(renderer.document_ids(text)) for text in texts))
    if renderer and shown:
        yield _percentiles("prompt tokens", (len(renderer.prompt_ids(record.prompt)) for record in shown))
        yield _percentiles("answer tokens", (len(renderer.answer_ids(*answer)) for answer in answers))


def _answers(record: Demonstration | Ranking) -> tuple[str, ...]:
    return record.answers if isinstance(record, Ranking) else (record.answer,)


def _count_characters(prompt: Prompt) -> int:
    return len(prompt) if isinstance(prompt, str) else sum(len(turn.content) for turn in prompt)


def _percentiles(name: str, lengths: Iterable[int]) -> Lengths:
    ordered = sorted(lengths)
    last = len(ordered) - 1
    return Lengths(
        name,
        count=len(ordered),
        mean=sum(ordered) / len(ordered),
        percentiles={f"p{share}": ordered[round(share / 100 * last)] for share in PERCENTILES},
    )
