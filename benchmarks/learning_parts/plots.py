"""The plots of the studies, as SVG with text drawn as paths."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from benchmarks.learning_parts.runs import RunResult

__all__ = ["FrontierPoint", "draw_frontier", "draw_methods"]

FrontierPoint = tuple[float, float, float, str]
"""KL in nats per 64 tokens, mean score, its standard error, label."""

_INK, _SOFT, _LINE = "#1f2933", "#7b8794", "#e4e7eb"
_COLOURS = ("#2563eb", "#dc2626", "#0d9488", "#7c3aed", "#d97706")
matplotlib.rcParams.update({"font.family": "DejaVu Sans", "svg.hashsalt": "tether", "svg.fonttype": "path"})


def draw_methods(results: Mapping[str, Sequence[RunResult]], *, kl_target: float, tolerance: float) -> Figure:
    """Return score and KL over the steps: a thin line for each seed, a thick one for their mean.

    Args:
        results: Runs of equally many steps, by method.
        kl_target: Nats per response.
        tolerance: Share of the target that is still at the target.
    """
    figure, (scores, kls) = _new_figure(2, width=9.6)
    for colour, (label, runs) in zip(_COLOURS, results.items(), strict=False):
        for panel, metric in ((scores, "score_mean"), (kls, "kl_per_sequence")):
            curves = [run.curve(metric) for run in runs]
            for curve in curves:
                panel.plot(curve, color=colour, linewidth=0.8, alpha=0.35)
            mean = [statistics.fmean(column) for column in zip(*curves, strict=True)]
            panel.plot(mean, color=colour, linewidth=2.2, label=label)
    kls.axhspan(kl_target * (1 - tolerance), kl_target * (1 + tolerance), color=_SOFT, alpha=0.15, linewidth=0)
    kls.axhline(kl_target, color=_SOFT, linewidth=1, linestyle="--")
    _style(scores, title="Score", unit="mean over the samples of a step", x="step")
    _style(kls, title="KL to the reference", unit="nats per response; band: target and tolerance", x="step")
    scores.legend(frameon=False, fontsize=9, loc="lower right")
    return figure


def draw_frontier(ppo: Sequence[FrontierPoint], best_of_n: Sequence[FrontierPoint]) -> Figure:
    """Return held-out score against KL: PPO at several leashes beside best-of-n, with one standard error."""
    figure, (panel,) = _new_figure(1, width=7.2)
    # Labels stand away from the other curve: those of PPO below it, those of best-of-n, which is steeper, above.
    groups = ((_COLOURS[0], "PPO", ppo, (6, -11)), (_COLOURS[4], "best of n", best_of_n, (-4, 7)))
    for colour, label, points, offset in groups:
        ordered = sorted(points)
        kls, scores, errors, texts = (list(column) for column in zip(*ordered, strict=True))
        panel.errorbar(kls, scores, yerr=errors, color=colour, marker="o", markersize=4.5, label=label, elinewidth=1)
        for kl, score, text in zip(kls, scores, texts, strict=True):
            panel.annotate(text, (kl, score), xytext=offset, textcoords="offset points", fontsize=8, color=_SOFT)
    _style(panel, title="Score against KL", unit="held-out prompts, mean and standard error", x="nats per 64 tokens")
    panel.legend(frameon=False, fontsize=9, loc="lower right")
    return figure


def _new_figure(num_panels: int, *, width: float) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, 3.8), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12))
    figure.patch.set_facecolor("white")
    return figure, list(figure.subplots(1, num_panels, squeeze=False).flat)


def _style(panel: Axes, *, title: str, unit: str, x: str) -> None:
    panel.set_title(title, loc="left", fontsize=11, color=_INK, fontweight="bold", pad=20)
    panel.text(0, 1.03, unit, transform=panel.transAxes, fontsize=8.5, color=_SOFT)
    panel.set_xlabel(x, fontsize=9, color=_SOFT)
    panel.grid(axis="y", color=_LINE, linewidth=0.8)
    panel.set_axisbelow(True)
    for side in ("top", "right", "left"):
        panel.spines[side].set_visible(False)
    panel.spines["bottom"].set_color(_LINE)
    panel.tick_params(which="both", colors=_SOFT, labelsize=8.5, length=0)
