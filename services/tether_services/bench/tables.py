"""A report for people: tables of rich and lines below them."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tether_services.bench.report import CallerReport, LatencySummary, LoadReport

CALL_HEADINGS = ("caller", "loop", "due/s", "due", "delayed", "unsent", "OK", "wrong", "rejected", "OK/s", "share")
LATENCY_HEADINGS = ("caller", "milliseconds", "calls", "mean", "p50", "p90", "p95", "p99", "p99.9", "max")


def print_report(report: LoadReport, console: Console) -> None:
    """Print everything that the report says, except the course over time."""
    console.print(_call_table(report), _latency_table(report), sep="\n")
    if report.total.rejections:
        console.print(_rejection_table(report))
    for line in _describe(report):
        console.print(line, highlight=False, soft_wrap=True, markup=False)
    for warning in report.warnings:
        console.print(f"[yellow]note:[/yellow] {escape(warning)}", highlight=False, soft_wrap=True)


def _call_table(report: LoadReport) -> Table:
    table = _table(CALL_HEADINGS)
    for caller in _rows(report):
        counts = (caller.num_offered, caller.num_delayed, caller.num_unsent, caller.num_ok, caller.num_wrong)
        cells = [f"{caller.rate:g}", *map(str, counts), str(caller.num_rejected), f"{caller.goodput:.1f}"]
        table.add_row(escape(caller.name), caller.loop, *cells, f"{caller.share:.1%}")
    return table


def _latency_table(report: LoadReport) -> Table:
    table = _table(LATENCY_HEADINGS, num_text=2)
    for caller in _rows(report):
        kinds = {
            "OK, since due": caller.ok_latency,
            "OK, since sent": caller.ok_service_time,
            "rejected, since due": caller.rejected_latency,
            "rejected, since sent": caller.rejected_service_time,
        }
        for kind, summary in kinds.items():
            if summary is not None and not (caller.loop == "closed" and kind.endswith("due")):
                table.add_row(escape(caller.name), kind, str(summary.count), *_milliseconds(summary))
    return table


def _milliseconds(summary: LatencySummary) -> Iterator[str]:
    for seconds in (
        summary.mean_seconds,
        summary.p50_seconds,
        summary.p90_seconds,
        summary.p95_seconds,
        summary.p99_seconds,
        summary.p999_seconds,
        summary.max_seconds,
    ):
        yield f"{seconds * 1e3:.2f}"


def _rejection_table(report: LoadReport) -> Table:
    table = _table(("caller", "code", "reason", "calls"), num_text=3)
    for caller in report.callers:
        for rejection in caller.rejections:
            table.add_row(escape(caller.name), rejection.code, escape(rejection.reason), str(rejection.count))
    return table


def _describe(report: LoadReport) -> Iterator[str]:
    model = f"model {report.model} ({report.engine})" if report.engine else "an unknown model"
    yield f"{report.target}, {model}, {report.elapsed_seconds:.1f} s, {report.arrivals} arrivals, seed {report.seed}"
    checks = report.checks
    yield (
        f"checked: {checks.num_by_oracle} scores by the oracle, {checks.num_by_repeat} by a repeat,"
        f" {checks.num_unforeseen} only for being finite"
    )
    yield f"tokens read: {report.total.token_goodput:.0f}/s; items: {report.total.item_goodput:.1f}/s"
    lag = report.generator.lag
    late = f"sent late by p50 {lag.p50_seconds * 1e3:.2f} ms, p99 {lag.p99_seconds * 1e3:.2f} ms; " if lag else ""
    yield f"this generator: {late}{report.generator.cpu_share:.0%} of a processor"


def _rows(report: LoadReport) -> list[CallerReport]:
    return [*report.callers, *([report.total] if len(report.callers) > 1 else [])]


def _table(headings: tuple[str, ...], num_text: int = 1) -> Table:
    """Return an empty table whose columns are numbers but for the first ones."""
    table = Table(box=None, pad_edge=False)
    for index, heading in enumerate(headings):
        is_text = index < num_text or heading == "loop"
        table.add_column(heading, justify="left" if is_text else "right", no_wrap=True)
    return table
