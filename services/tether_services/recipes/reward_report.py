"""What a reward model got right, as a page and a picture in its folder."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import matplotlib.pyplot as plt

from tether_services.recipes.plots import save_figure
from tether_services.recipes.ranking_metrics import Agreement, Bin, Evaluation, Quartile

__all__ = ["draw_calibration", "evaluation_page"]

MAX_SIZE = 64
"""K above which a ranking is a pool of labelled texts, for which a row by K says nothing."""


def evaluation_page(evaluation: Evaluation, *, longer_wins: float | None) -> str:
    """Return the evaluation as a Markdown page: overall, by K, by difference in length, calibration.

    Args:
        evaluation: Of the validation rankings.
        longer_wins: Of all data read, training included; None leaves it out.
    """
    overall = evaluation.overall
    parts = [
        "# Evaluation on rankings that were not trained on",
        f"Rankings: {overall.num_rankings:,}. Pairs: {overall.num_pairs:,}; {evaluation.num_tied:,} more are ties and"
        " left out. Equal scores count half. `longer wins` is the share of pairs whose better answer has more"
        " characters; the length baseline is what always taking the longer, or always the shorter, answer would reach.",
        _agreement_table(evaluation),
        _notes(evaluation, longer_wins),
        "## By difference in length",
        _quartile_table(evaluation.quartiles),
        "## Calibration",
        "Predicted is sigmoid(difference of the raw scores); each pair counts once for either answer. Expected"
        f" calibration error {evaluation.calibration_error:.4f}.",
        _bin_table(evaluation.bins),
    ]
    return "\n\n".join(parts) + "\n"


def _notes(evaluation: Evaluation, longer_wins: float | None) -> str:
    every_prompt = f"Accuracy with every prompt counting once: {evaluation.prompt_accuracy:.4f}."
    if longer_wins is None:
        return every_prompt
    return f"{every_prompt} Of all pairs that were read, training included, the longer answer wins {longer_wins:.4f}."


def _agreement_table(evaluation: Evaluation) -> str:
    head = ("K", "rankings", "pairs", "accuracy", "longer wins", "length baseline", "top-1", "longest is best")
    sizes = evaluation.by_size if max(evaluation.by_size) <= MAX_SIZE else {}
    rows = [_agreement_row("all", evaluation.overall), *(_agreement_row(str(k), found) for k, found in sizes.items())]
    return _table(head, rows)


def _agreement_row(name: str, found: Agreement) -> Sequence[str]:
    shares = (found.accuracy, found.longer_wins, found.length_baseline, found.top1, found.longest_top1)
    return [name, f"{found.num_rankings:,}", f"{found.num_pairs:,}", *(f"{share:.4f}" for share in shares)]


def _quartile_table(quartiles: Iterable[Quartile]) -> str:
    head = ("characters", "pairs", "accuracy", "longer wins", "length baseline")
    rows = [
        [f"{q.low:,.0f} to {q.high:,.0f}", f"{q.num_pairs:,}", *(f"{x:.4f}" for x in _shares(q))] for q in quartiles
    ]
    return _table(head, rows)


def _shares(quartile: Quartile) -> Sequence[float]:
    return quartile.accuracy, quartile.longer_wins, quartile.length_baseline


def _bin_table(bins: Iterable[Bin]) -> str:
    rows = [
        [
            f"{b.low:.1f} to {b.high:.1f}",
            f"{b.num_predictions:,}",
            *((f"{b.probability:.4f}", f"{b.preferred:.4f}") if b.num_predictions else ("", "")),
        ]
        for b in bins
    ]
    return _table(("probability", "predictions", "predicted", "preferred"), rows)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draw_calibration(bins: Sequence[Bin], *, title: str, path: Path) -> None:
    """Draw observed over predicted preference, with the number of predictions below, and write the file."""
    figure, (shares, counts) = plt.subplots(
        2, 1, sharex=True, figsize=(5, 5.5), height_ratios=(3, 1), layout="constrained"
    )
    filled = [item for item in bins if item.num_predictions]
    shares.plot([0, 1], [0, 1], color="gray", linewidth=1, label="perfect")
    shares.plot([b.probability for b in filled], [b.preferred for b in filled], marker="o", label="reward model")
    shares.set(ylabel="preferred by people", xlim=(0, 1), ylim=(0, 1), title=title)
    shares.legend()
    width = 1.0 / len(bins)
    counts.bar([b.low for b in bins], [b.num_predictions for b in bins], width=width, align="edge")
    counts.set(xlabel="sigmoid(score difference)", ylabel="predictions")
    save_figure(figure, path)
