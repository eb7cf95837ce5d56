"""Pictures of a stage, as SVG files in its output folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no window, on any machine
import matplotlib.pyplot as plt

__all__ = ["draw_history", "draw_rewards", "save_figure"]


def draw_history(rows: Sequence[Mapping[str, float]], *, title: str, path: Path) -> None:
    """Draw loss and learning rate over the steps and write the file."""
    figure, (losses, rates) = plt.subplots(
        2, 1, sharex=True, figsize=(7, 5), height_ratios=(3, 1), layout="constrained"
    )
    for name, label in (("loss", "training"), ("eval_loss", "validation")):
        points = [(row["step"], row[name]) for row in rows if name in row]
        if points:
            losses.plot(*zip(*points, strict=True), label=label, marker="o" if len(points) < 40 else "", markersize=3)
    losses.set(ylabel="loss", title=title)
    losses.legend()
    points = [(row["step"], row["learning_rate"]) for row in rows if "learning_rate" in row]
    if points:
        rates.plot(*zip(*points, strict=True))
    rates.set(xlabel="optimiser step", ylabel="learning rate")
    save_figure(figure, path)


def draw_rewards(rows: Sequence[Mapping[str, float]], *, title: str, path: Path) -> None:
    """Draw margin and accuracy of the implicit rewards of a preference training over the steps and write the file."""
    figure, axes = plt.subplots(2, 1, sharex=True, figsize=(7, 5), layout="constrained")
    for axis, name, label in zip(axes, ("margins", "accuracies"), ("reward margin", "pair accuracy"), strict=True):
        for key, part in ((f"rewards/{name}", "training"), (f"eval_rewards/{name}", "validation")):
            points = [(row["step"], row[key]) for row in rows if key in row]
            if points:
                axis.plot(*zip(*points, strict=True), label=part, marker="o" if len(points) < 40 else "", markersize=3)
        axis.set(ylabel=label)
    axes[0].set(title=title)
    axes[0].legend()
    axes[1].set(xlabel="optimiser step")
    save_figure(figure, path)


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure without a date and random names in it, so that equal figures are equal files, and close it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": path.stem}):
        figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
