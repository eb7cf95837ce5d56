"""A picture of a report: how it went over time, and the percentiles of each caller."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from tether_services.bench.report import LatencySummary, LoadReport
from tether_services.recipes.plots import save_figure

PERCENTILES = (50.0, 90.0, 95.0, 99.0, 99.9)


def draw_report(report: LoadReport, path: Path) -> None:
    """Draw the report and write the file; its ending chooses SVG or PNG."""
    figure = Figure(figsize=(11, 6.5), layout="constrained")
    axes = figure.subplots(2, 2, width_ratios=(3, 2))
    _draw_course(report, axes[0, 0], axes[1, 0])
    _draw_percentiles(report, axes[0, 1])
    _draw_goodput(report, axes[1, 1])
    figure.suptitle(
        f"{report.total.goodput:.1f} OK calls/s of {report.total.rate:g} due, {report.elapsed_seconds:.0f} s"
    )
    save_figure(figure, path)


def _draw_course(report: LoadReport, latency: Any, calls: Any) -> None:
    # What is over after the duration is a rest of an interval, whose rate would look like a fall.
    course = [interval for interval in report.course if interval.start_seconds < report.duration_seconds]
    rows = [(interval.start_seconds, interval.ok_latency) for interval in course if interval.ok_latency]
    for name in ("p50", "p95", "p99", "max"):
        points = [(start, getattr(summary, f"{name}_seconds") * 1e3) for start, summary in rows]
        if points:
            latency.plot(*zip(*points, strict=True), label=name, marker="o" if len(points) < 40 else "", markersize=3)
    latency.set(ylabel="latency since due, ms", yscale="log", title="answered calls, by when they were over")
    starts = [interval.start_seconds for interval in course]
    width = min((after - before for before, after in pairwise(starts)), default=1.0)
    for name, color in (("num_ok", "tab:green"), ("num_rejected", "tab:red")):
        counts = [getattr(interval, name) / width for interval in course]
        calls.step(starts, counts, where="post", label=name.removeprefix("num_"), color=color)
    calls.set(xlabel="seconds", ylabel="calls per second", ylim=(0, None))
    latency.legend()
    calls.legend()


def _draw_percentiles(report: LoadReport, axis: Any) -> None:
    places = range(len(PERCENTILES))
    for caller in report.callers:
        if caller.ok_latency is not None:
            line = axis.plot(places, _milliseconds(caller.ok_latency), label=f"{caller.name}, since due", marker="o")[0]
            if caller.ok_service_time is not None and caller.loop == "open":
                values = _milliseconds(caller.ok_service_time)
                axis.plot(places, values, "--", color=line.get_color(), label=f"{caller.name}, since sent")
    axis.set(yscale="log", ylabel="ms", title="percentiles of answered calls")
    axis.set_xticks(places, [f"p{percentile:g}" for percentile in PERCENTILES])
    if axis.lines:
        axis.legend(fontsize="small")


def _draw_goodput(report: LoadReport, axis: Any) -> None:
    names = [caller.name for caller in report.callers]
    axis.barh(names, [caller.rate for caller in report.callers], color="lightgrey", label="due")
    axis.barh(names, [caller.goodput for caller in report.callers], height=0.4, color="tab:green", label="OK")
    axis.set(xlabel="calls per second")
    axis.invert_yaxis()
    axis.legend(fontsize="small")


def _milliseconds(summary: LatencySummary) -> list[float]:
    values = (
        summary.p50_seconds,
        summary.p90_seconds,
        summary.p95_seconds,
        summary.p99_seconds,
        summary.p999_seconds,
    )
    return [seconds * 1e3 for seconds in values]
