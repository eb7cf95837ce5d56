"""What a run achieved, from its report.json, as tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from rich.console import Console
from rich.markup import escape
from rich.table import Table

FIGURES: Final[Mapping[str, tuple[str, str]]] = {
    "mean score": ("score_mean", "{:+.3f}"),
    "standard deviation of the scores": ("score_std", "{:.3f}"),
    "KL to the reference, nats per response": ("kl_per_response", "{:.2f}"),
    "KL to the reference, nats per 64 tokens": ("kl_per_64_tokens", "{:.2f}"),
    "tokens per response": ("response_length_mean", "{:.1f}"),
    "share of responses cut by the limit": ("truncated_ratio", "{:.0%}"),
}
"""Row of the table -> key and format of the figure."""
NUM_STORIES: Final = 3


def print_summary(report: Mapping[str, Any], console: Console) -> None:
    """Print the held-out figures before and after, some story pairs side by side, and the checks."""
    if report["before"] is None or report["after"] is None:
        console.print("The run had no evaluation.")
        return
    console.print(figures_table(report))
    console.print(stories_table(report["before"], report["after"]))
    for line in check_lines(report):
        console.print(line, highlight=False)


def figures_table(report: Mapping[str, Any]) -> Table:
    """Return the held-out figures before and after."""
    before, after = report["before"], report["after"]
    table = Table(title=f"{len(before['samples'])} held-out prompts", title_justify="left")
    table.add_column("")
    table.add_column("before", justify="right")
    table.add_column(f"after (policy version {after['policy_version']})", justify="right")
    for label, (key, form) in FIGURES.items():
        table.add_row(label, form.format(before[key]), form.format(after[key]))
    return table


def stories_table(before: Mapping[str, Any], after: Mapping[str, Any]) -> Table:
    """Return the first held-out stories, each as it was written before and after; nothing is picked by hand."""
    table = Table(title="the first held-out stories", title_justify="left", show_lines=True)
    table.add_column("before", ratio=1)
    table.add_column("after", ratio=1)
    later = {sample["prompt"]: sample for sample in after["samples"]}
    pairs = [(sample, later[sample["prompt"]]) for sample in before["samples"] if sample["prompt"] in later]
    for pair in pairs[:NUM_STORIES]:
        table.add_row(*(_story(sample) for sample in pair))
    return table


def check_lines(report: Mapping[str, Any]) -> list[str]:
    """Return what was measured about the run itself, a line each."""
    gain = report["gain_in_sd"]
    samples = report["samples"]
    mismatch = report["mean_abs_dlogp_max"]
    return [
        "gain: " + ("undefined, all scores before were equal" if gain is None else f"{gain:+.2f} standard deviations"),
        f"samples: {samples['generated']} generated, {samples['trained']} trained on, {samples['dropped']} dropped",
        f"every sample from the expected version: {'yes' if report['versions_as_expected'] else 'NO'}",
        f"largest mean |trainer - generator logprob| of a step: {mismatch:.1e} nats",
    ]


def _story(sample: Mapping[str, Any]) -> str:
    return f"[bold]{escape(sample['prompt'])}[/bold]{escape(sample['response'])}\n\nscore {sample['score']:+.2f}"
