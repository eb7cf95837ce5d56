"""The curves of a run as one inline SVG."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

__all__ = ["draw_charts"]

_INK, _SOFT, _LINE = "#1f2933", "#7b8794", "#e4e7eb"
_CURVES = (
    ("Score", "per sample, mean and one standard deviation", "score_mean", "#2563eb"),
    ("KL to the reference", "nats per response (k1)", "kl_per_sequence", "#dc2626"),
    ("Entropy", "nats per token", "entropy", "#7c3aed"),
    ("Response length", "tokens, mean", "response_length_mean", "#0d9488"),
    ("Generation speed", "tokens per second", "tokens_per_second", "#d97706"),
    ("Trainer against generator", "mean |delta log-probability|, nats", "mean_abs_dlogp", "#475569"),
)
"""(title, unit, figure of the step, colour)."""
_BANDS = {"score_mean": "score_std"}
_LOGARITHMIC = frozenset({"mean_abs_dlogp"})


def draw_charts(steps: Sequence[Mapping[str, Any]]) -> str:
    """Return six small charts over the steps as an SVG element; text is drawn as paths, so no font is needed.

    Args:
        steps: As in report.json, at least one.
    """
    with matplotlib.rc_context({"font.family": "DejaVu Sans", "svg.hashsalt": "tether", "svg.fonttype": "path"}):
        figure = Figure(figsize=(10.4, 5.6), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12))
        figure.patch.set_alpha(0.0)
        axes = figure.subplots(2, 3)
        for panel, (title, unit, name, colour) in zip(axes.flat, _CURVES, strict=True):
            _draw_curve(panel, steps, name, colour)
            panel.set_title(title, loc="left", fontsize=11, color=_INK, fontweight="bold", pad=20)
            panel.text(0, 1.03, unit, transform=panel.transAxes, fontsize=8.5, color=_SOFT)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :]


def _draw_curve(panel: Axes, steps: Sequence[Mapping[str, Any]], name: str, colour: str) -> None:
    x = [step["step"] for step in steps]
    y = [step["metrics"][name] for step in steps]
    marker = "o" if len(x) <= 40 else ""
    panel.plot(x, y, color=colour, linewidth=2, marker=marker, markersize=3.5, solid_capstyle="round")
    if name in _BANDS:
        spread = [step["metrics"][_BANDS[name]] for step in steps]
        low = [a - b for a, b in zip(y, spread, strict=True)]
        high = [a + b for a, b in zip(y, spread, strict=True)]
        panel.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)
    if name in _LOGARITHMIC and min(y) > 0:
        panel.set_yscale("log")
        panel.set_ylim(min(y) / 10, max(y) * 10)
    else:
        panel.yaxis.set_major_locator(MaxNLocator(nbins=4))
    _style(panel)


def _style(panel: Axes) -> None:
    panel.set_facecolor("none")
    panel.grid(axis="y", color=_LINE, linewidth=0.8)
    panel.set_axisbelow(True)
    for side in ("top", "right", "left"):
        panel.spines[side].set_visible(False)
    panel.spines["bottom"].set_color(_LINE)
    panel.tick_params(which="both", colors=_SOFT, labelsize=8.5, length=0)
    panel.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    panel.margins(x=0.03, y=0.15)
