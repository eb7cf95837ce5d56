"""`tether bench score`: its arguments, and the load that they ask for."""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import selectors
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from tether.errors import InvalidArgumentError
from tether_services.cli.connection import add_credentials, credential_options

if TYPE_CHECKING:
    from tether_services.bench.plan import CallerPlan, LoadPlan
    from tether_services.bench.report import LoadReport
    from tether_services.bench.run import Progress

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

DESCRIPTION = """\
Load a reward service and measure it. Calls become due at fixed times, whatever becomes of those before, and latencies
count from then; answers are checked. Exit status 1 if an answer was wrong or none was right.
"""
EPILOG = """\
examples:
  tether bench score --address 127.0.0.1:50052 --rate 200 --duration 30
  tether bench score --address 127.0.0.1:50052 --closed --concurrency 16
  tether bench score --address 127.0.0.1:50052 --caller polite=20:polite.token --caller busy=200:busy.token --json
  tether bench score --address reward.example.org:50052 --rate 200 --token-file token --ca-file ca.pem
"""
PICTURE_ENDINGS = (".svg", ".png")
INTERRUPTED_EXIT_CODE = 130
PIPED_WIDTH = 160


def add_bench(commands: Commands) -> None:
    """Add `tether bench` to the command."""
    parser = commands.add_parser("bench", help="load a service and measure it")
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    inner = actions.add_parser(
        "score",
        help="load a reward service",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    inner.add_argument("--address", required=True, metavar="HOST:PORT", help="of the reward service")
    _add_callers(inner)
    _add_limits(inner)
    _add_items(inner)
    add_credentials(inner)
    inner.add_argument("--json", action="store_true", help="print the report as JSON instead of tables")
    inner.add_argument("--report", type=Path, metavar="FILE", help="also draw a picture: FILE.svg or FILE.png")
    inner.set_defaults(run=bench_score)


def _add_callers(parser: argparse.ArgumentParser) -> None:
    rates = parser.add_mutually_exclusive_group(required=True)
    rates.add_argument("--rate", type=float, metavar="R", help="calls per second that are due; 0 is --closed")
    rates.add_argument(
        "--closed", action="store_true", help="call again as soon as an answer is there: the most it takes"
    )
    rates.add_argument(
        "--caller",
        action="append",
        metavar="NAME=RATE[:TOKEN_FILE]",
        help="one of several callers at once, with its own rate and token; repeatable",
    )
    parser.add_argument(
        "--arrivals", choices=("constant", "poisson"), default="constant", help="gaps between calls (constant)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of items and random gaps (0)")


def _add_limits(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--concurrency", type=int, default=64, metavar="C", help="calls in flight per caller at most; more wait (64)"
    )
    parser.add_argument("--duration", type=float, default=10.0, metavar="SECONDS", help="how long calls are due (10)")
    parser.add_argument("--deadline", type=float, default=10.0, metavar="SECONDS", help="of a call (10)")
    parser.add_argument("--max-calls", type=int, default=1_000_000, metavar="N", help="calls at most (1000000)")
    parser.add_argument("--model", default="", metavar="NAME", help="reward model; the default one otherwise")
    parser.add_argument("--model-version", default="", metavar="VERSION", help="whichever is loaded otherwise")


def _add_items(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--items", type=Path, metavar="FILE", help="JSONL with items to send in turn; synthetic otherwise"
    )
    parser.add_argument("--items-per-call", type=int, default=1, metavar="N", help="items of a call (1)")
    parser.add_argument(
        "--tokens", default="32:128", metavar="MIN:MAX", help="length of a synthetic item, uniform (32:128)"
    )
    parser.add_argument(
        "--form", choices=("tokens", "text"), default="tokens", help="synthetic items; text counts characters (tokens)"
    )
    parser.add_argument(
        "--repeat-share", type=float, default=0.0, metavar="S", help="share of items that repeat a recent one (0)"
    )


def bench_score(known: argparse.Namespace) -> int:
    """Carry out the load, print its report, and return 0, 1 if it did not pass, or 130 after Ctrl-C."""
    _check_picture(known.report)
    plan = read_plan(known)
    # Timers of this selector are exact to microseconds; those of others are whole milliseconds, which is lag.
    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selectors.SelectSelector())) as runner:
        report = runner.run(_run(plan))
    _show(report, known)
    if report.interrupted:
        return INTERRUPTED_EXIT_CODE
    return 0 if report.passed else 1


def _check_picture(path: Path | None) -> None:
    """Refuse a picture that could not be drawn, before the load rather than after it."""
    if path is None:
        return
    if path.suffix not in PICTURE_ENDINGS:
        raise InvalidArgumentError(f"{path} must end in .svg or .png.", field="--report", reason="INVALID_CONFIG")
    if not path.parent.is_dir():
        raise InvalidArgumentError(f"There is no folder {path.parent}.", field="--report", reason="INVALID_CONFIG")
    if importlib.util.find_spec("matplotlib") is None:
        raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")


def read_plan(known: argparse.Namespace) -> LoadPlan:
    """Return the load that the arguments ask for.

    Raises:
        InvalidArgumentError: Names the argument that cannot be read, or every field of the plan that is out of range.
    """
    from tether_services.bench.items import read_items
    from tether_services.bench.plan import ItemPlan, LoadPlan, check_plan

    shortest, longest = read_range(known.tokens)
    shown = credential_options(known)
    plan = LoadPlan(
        known.address,
        callers=_read_callers(known),
        duration_seconds=known.duration,
        concurrency=known.concurrency,
        arrivals=known.arrivals,
        seed=known.seed,
        deadline_seconds=known.deadline,
        max_calls=known.max_calls,
        model=known.model,
        version=known.model_version,
        items=ItemPlan(
            per_call=known.items_per_call,
            min_tokens=shortest,
            max_tokens=longest,
            form=known.form,
            repeat_share=known.repeat_share,
            given=read_items(known.items) if known.items else (),
        ),
        tls=shown["tls"],
        allow_plaintext_token=shown["allow_plaintext_token"],
    )
    check_plan(plan)
    return plan


def read_range(text: str) -> tuple[int, int]:
    """Return the two ends of MIN:MAX, or of N alone."""
    first, _, last = text.partition(":")
    try:
        return int(first), int(last or first)
    except ValueError:
        message = f"{text!r} is not MIN:MAX, two whole numbers."
        raise InvalidArgumentError(message, field="--tokens", reason="INVALID_CONFIG") from None


def _read_callers(known: argparse.Namespace) -> tuple[CallerPlan, ...]:
    from tether_services.bench.plan import CallerPlan

    if known.caller:
        if known.token_file:
            message = "--token-file would be ignored beside --caller: write NAME=RATE:TOKEN_FILE."
            raise InvalidArgumentError(message, field="--token-file", reason="INVALID_CONFIG")
        return tuple(read_caller(text) for text in known.caller)
    return (CallerPlan("caller", known.rate or 0.0, known.token_file),)


def read_caller(text: str) -> CallerPlan:
    """Return the caller of NAME=RATE[:TOKEN_FILE]."""
    from tether_services.bench.plan import CallerPlan

    name, _, rest = text.partition("=")
    rate, _, file = rest.partition(":")
    try:
        return CallerPlan(name, float(rate), Path(file) if file else None)
    except ValueError:
        message = f"{text!r} is not NAME=RATE or NAME=RATE:TOKEN_FILE."
        raise InvalidArgumentError(message, field="--caller", reason="INVALID_CONFIG") from None


async def _run(plan: LoadPlan) -> LoadReport:
    """Return the report; the first Ctrl-C ends the load, a second one the command."""
    from tether_services.bench.run import run_load

    stop, loop = asyncio.Event(), asyncio.get_running_loop()

    def end() -> None:
        loop.remove_signal_handler(signal.SIGINT)
        stop.set()

    loop.add_signal_handler(signal.SIGINT, end)
    with _ProgressBar(plan) as tell:
        return await run_load(plan, on_progress=tell, stop=stop)


class _ProgressBar:
    """A bar on stderr that a load moves; nothing where stderr is no terminal."""

    def __init__(self, plan: LoadPlan) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bar

        columns = (TimeElapsedColumn(), BarColumn(bar_width=20), TextColumn("{task.description}"))
        console = Console(file=sys.stderr)
        # Drawn by the load itself, twice a second: a thread of its own would take turns from the calls.
        self._bar = Bar(*columns, console=console, transient=True, auto_refresh=False, disable=not console.is_terminal)
        self._task = self._bar.add_task("connecting", total=plan.duration_seconds)

    def __enter__(self) -> Callable[[Progress], None]:
        self._bar.start()
        return self._tell

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def _tell(self, progress: Progress) -> None:
        text = (
            f"{progress.num_offered} due, {progress.num_ok} OK, {progress.num_rejected} rejected,"
            f" {progress.num_wrong} wrong, {progress.num_in_flight} in flight, {progress.num_waiting} waiting"
        )
        self._bar.update(self._task, completed=progress.elapsed_seconds, description=text, refresh=True)


def _show(report: LoadReport, known: argparse.Namespace) -> None:
    from rich.console import Console

    from tether_services.bench.tables import print_report

    if known.json:
        print(json.dumps(report.document(), indent=2, allow_nan=False))
    else:
        print_report(report, Console(width=None if sys.stdout.isatty() else PIPED_WIDTH))
    if known.report:
        from tether_services.bench.picture import draw_report

        draw_report(report, known.report)
