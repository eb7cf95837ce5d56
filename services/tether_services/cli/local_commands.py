"""`tether up`, and how a command on this machine ends when it is interrupted."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import time
from collections.abc import Coroutine
from typing import Any

from tether_services.local.deployment import SERVICES, Addresses, LocalDeployment, LocalOptions
from tether_services.runtime.settings import merge_overrides

INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Ctrl-C, a polite kill, a closed terminal: each stops the children before this process ends."""


def up(known: argparse.Namespace) -> int:
    """Run the four services until Ctrl-C and return the exit status."""
    overrides: dict[str, Any] = {}
    merge_overrides(overrides, known.overrides)
    options = local_options(
        known, state_dir=known.state_dir, settings=overrides, usual_ports=True, deterministic=known.deterministic
    )
    return run_until_interrupted(_up(options))


def local_options(known: argparse.Namespace, **options: Any) -> LocalOptions:
    """Return the options of a command line; what it leaves out has the defaults of LocalOptions."""
    given = {name: getattr(known, name) for name in ("engine", "model", "reward_model", "threads")}
    return LocalOptions(**{name: value for name, value in given.items() if value is not None}, **options)


async def _up(options: LocalOptions) -> int:
    async with LocalDeployment(options, report=report_event) as deployment:
        for line in describe_addresses(deployment.addresses):
            print(line)
        print(f"logs and configurations in {deployment.log_folder}; Ctrl-C stops everything", flush=True)
        await deployment.wait()
    return 0


def report_event(text: str) -> None:
    """Print one event with the time of day."""
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def describe_addresses(addresses: Addresses) -> list[str]:
    """Return a line per address."""
    named = {name: getattr(addresses, name) for name in ("generator", "adapter", "reward", "reference", "orchestrator")}
    lines = [f"{name:<13}{address}" for name, address in named.items()]
    lines += [f"{name + ' HTTP':<21}http://{addresses.http[name]}" for name in SERVICES]
    return lines + [f"{name + ' metrics':<21}http://{addresses.metrics[name]}/metrics" for name in SERVICES]


def run_until_interrupted(work: Coroutine[Any, Any, int]) -> int:
    """Return the result of the work, or 128 + the signal's number if a signal cancelled it.

    The first signal cancels the work, which then cleans up. A second one ends this process, the children with it.
    """
    received: list[int] = []

    async def main() -> int:
        loop = asyncio.get_running_loop()
        task = asyncio.ensure_future(work)

        def interrupt(number: int) -> None:
            if received:
                os._exit(128 + number)
            received.append(number)
            task.cancel()

        for number in INTERRUPTS:
            loop.add_signal_handler(number, interrupt, number)
        return await task

    try:
        return asyncio.run(main())
    except asyncio.CancelledError:
        return 128 + received[0] if received else 1
