"""`tether score`, `tether generate` and `tether run`: the client on a command line."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import sys
from datetime import datetime
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tether import (
    Completion,
    GeneratorClient,
    ItemScore,
    OrchestratorClient,
    RewardClient,
    Run,
    SamplingParams,
    ScoreItem,
    TetherError,
)
from tether_services.cli.connection import credential_options


def score(known: argparse.Namespace) -> int:
    """Print a score per response and return 0, or 1 if one could not be scored."""
    return asyncio.run(_score(known))


async def _score(known: argparse.Namespace) -> int:
    items = [ScoreItem(known.prompt, response) for response in known.responses]
    async with RewardClient(known.address, timeout_seconds=known.timeout, **credential_options(known)) as client:
        result = await client.score(items, model=known.model, version=known.model_version)
    if known.json:
        print_json(result)
    else:
        for item in result.scores:
            print(_score_line(item))
        print(f"model {result.model} version {result.version}", file=sys.stderr)
    return 1 if any(item.error for item in result.scores) else 0


def _score_line(item: ItemScore) -> str:
    if item.error is not None:
        return f"error: {item.error}"
    notes = [f"{part.name} {part.value:.4f} x {part.weight:g}" for part in item.components if len(item.components) > 1]
    notes += ["prompt cut to fit"] if item.truncated else []
    return f"{item.score:.4f}" + (f"  ({', '.join(notes)})" if notes else "")


def generate(known: argparse.Namespace) -> int:
    """Print the completions of a prompt and return 0."""
    return asyncio.run(_generate(known))


async def _generate(known: argparse.Namespace) -> int:
    sampling = SamplingParams(
        max_tokens=known.max_tokens,
        temperature=known.temperature,
        top_p=known.top_p,
        top_k=known.top_k,
        stop=known.stop,
        seed=known.seed,
    )
    async with GeneratorClient(known.address, timeout_seconds=known.timeout, **credential_options(known)) as client:
        result = await client.generate(known.prompt, n=known.n, sampling=sampling, policy_version=known.policy_version)
    if known.json:
        print_json(result)
        return 0
    for number, completion in enumerate(result.completions, start=1):
        _print_completion(completion, number=number, of=known.n)
    print(f"policy version {result.policy_version}", file=sys.stderr)
    return 0


def _print_completion(completion: Completion, *, number: int, of: int) -> None:
    if of > 1:
        print(f"--- {number} of {of} ({len(completion.token_ids)} tokens, {completion.finish_reason})")
    print(completion.text)


def run(known: argparse.Namespace) -> int:
    """Carry out `tether run ACTION` and return the exit status; a run watched to a bad end is 1."""
    if getattr(known, "dry_run", False):
        from tether_services.cli.run_document import resolve_run_document

        print_json(resolve_run_document(known.config, known.overrides))
        return 0
    return asyncio.run(_run(known))


async def _run(known: argparse.Namespace) -> int:
    async with OrchestratorClient(known.address, timeout_seconds=known.timeout, **credential_options(known)) as client:
        if known.action == "list":
            Console().print(runs_table(await client.list_runs()))
            return 0
        if known.action == "watch":
            return await _watch(client, known.run_id, first_step=known.first_step)
        started = await _act(client, known)
        if getattr(known, "watch", False):
            return await _watch(client, started.run_id, first_step=started.committed_step_count)
        Console().print(run_table(started))
        return 0


async def _act(client: OrchestratorClient, known: argparse.Namespace) -> Run:
    if known.action == "start":
        from tether_services.cli.run_document import read_run_document

        return await client.start_run(known.run_id, read_run_document(known.config, known.overrides))
    if known.action == "resume":
        return await client.resume_run(known.run_id, from_step=known.from_step)
    if known.action == "rollback":
        return await client.roll_back_run(known.run_id, to_step=known.to_step)
    actions = {"get": client.get_run, "cancel": client.cancel_run}
    return await actions[known.action](known.run_id)


async def _watch(client: OrchestratorClient, run_id: str, *, first_step: int) -> int:
    from tether_services.cli.watching import follow_run

    ended = await follow_run(client, run_id, first_step=first_step, console=Console())
    return report_end(ended)


def report_end(ended: Run) -> int:
    """Print how a run ended, to stderr if it failed, and return the exit status."""
    failed = ended.state != "succeeded"
    reason = f": {ended.error}" if ended.error else ""
    print(f"run {ended.run_id} {ended.state}{reason}", file=sys.stderr if failed else sys.stdout)
    return 1 if failed else 0


def runs_table(runs: tuple[Run, ...]) -> Table:
    """Return a table with a row per run."""
    table = Table(box=None, pad_edge=False)
    for heading in ("run", "state", "steps", "policy version", "started (UTC)", "directory"):
        table.add_column(heading, no_wrap=heading == "run", overflow="fold")
    for entry in runs:
        steps = f"{entry.committed_step_count}/{entry.total_step_count}"
        started = entry.create_time.strftime("%Y-%m-%d %H:%M:%S")
        table.add_row(entry.run_id, entry.state, steps, str(entry.policy_version), started, escape(entry.directory))
    return table


def run_table(entry: Run) -> Table:
    """Return a table with a row per field of a run."""
    table = Table(box=None, pad_edge=False, show_header=False)
    for field in dataclasses.fields(entry):
        value = getattr(entry, field.name)
        if value not in ("", None, ()):
            table.add_row(field.name, _cell(value))
    return table


def _cell(value: Any) -> str:
    if isinstance(value, datetime):
        return value.isoformat()
    return escape("\n".join(map(str, value)) if isinstance(value, tuple) else str(value))


def print_json(value: Any) -> None:
    """Print a value of the client as JSON; what is not a number becomes null, an error its text."""
    print(json.dumps(_plain(value), indent=2))


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, TetherError):
        return {"reason": value.reason, "message": value.message, "fields": [v.field for v in value.violations]}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and value != value else value
