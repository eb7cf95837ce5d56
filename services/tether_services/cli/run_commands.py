"""`tether run show`: a run and what its steps left behind, from the ledger."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import sys
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from rich.console import Console
from rich.table import Table

from tether import OrchestratorClient, Run, StepState
from tether_services.cli.client_commands import run_table
from tether_services.cli.connection import credential_options

_SHOWN_HASH = 12
"""Leading digits of a hash in the table; --json has all of it."""
_PIPED_WIDTH = 160
"""Characters of a line where the output is no terminal: all columns whole."""


def show(known: argparse.Namespace) -> int:
    """Print a run, and its steps if asked for, and return 0."""
    run, steps = asyncio.run(_read(known))
    if known.json:
        print(json.dumps(as_json(run, steps if known.steps else None), indent=2))
        return 0
    console = Console(width=None if sys.stdout.isatty() else _PIPED_WIDTH)
    console.print(run_table(run))
    if known.steps:
        console.print()
        console.print(steps_table(steps))
    return 0


async def _read(known: argparse.Namespace) -> tuple[Run, tuple[StepState, ...]]:
    async with OrchestratorClient(known.address, timeout_seconds=known.timeout, **credential_options(known)) as client:
        run = await client.get_run(known.run_id)
        return run, await client.list_steps(known.run_id) if known.steps else ()


def steps_table(steps: Sequence[StepState]) -> Table:
    """Return a table with a row per committed step; the sums are in the last one."""
    table = Table(box=None, pad_edge=False)
    for heading in ("step", "version", "makes", "attempt", "asked", "generated", "trained", "dropped"):
        table.add_column(heading, justify="right")
    for heading in ("adapter made", "checkpoint", "committed (UTC)"):
        table.add_column(heading, no_wrap=heading != "checkpoint", overflow="fold")
    for step in steps:
        counts = step.samples
        table.add_row(
            *(str(step.step), str(step.policy_version), str(step.new_version), str(step.epoch)),
            *(str(counts.asked), str(counts.generated), str(counts.trained), _dropped(step)),
            *(step.adapter_sha256[:_SHOWN_HASH], step.checkpoint or "-"),
            step.commit_time.strftime("%Y-%m-%d %H:%M:%S"),
        )
    if len(steps) > 1:
        totals = [sum(getattr(step.samples, name) for step in steps) for name in ("asked", "generated", "trained")]
        dropped = sum(sum(step.samples.dropped.values()) for step in steps)
        table.add_row("sum", "", "", "", *map(str, totals), str(dropped))
    return table


def _dropped(step: StepState) -> str:
    reasons = step.samples.dropped
    named = ", ".join(f"{reason} {count}" for reason, count in sorted(reasons.items()))
    return f"{sum(reasons.values())} ({named})" if named else "0"


def as_json(run: Run, steps: Sequence[StepState] | None) -> dict[str, Any]:
    """Return a run as plain values, with its steps unless they are None; times in ISO 8601."""
    content: dict[str, Any] = _plain(dataclasses.asdict(run))
    return content if steps is None else content | {"steps": [_plain(dataclasses.asdict(step)) for step in steps]}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return value.isoformat() if isinstance(value, datetime) else value
