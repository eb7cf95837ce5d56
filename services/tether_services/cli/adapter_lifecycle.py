"""`tether adapter list | activate | rollback`: what a generator has stored, and which of it is served."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tether.adapter import ActiveAdapter, Adapter, AdapterClient
from tether.errors import AbortedError, FailedPreconditionError, NotFoundError, TetherError
from tether.orchestrator import FINAL_STATES, OrchestratorClient
from tether_services.cli.connection import Endpoint, credential_options

__all__ = [
    "PUSHED_RUN",
    "activate",
    "check_owner",
    "check_untrained",
    "describe_active",
    "explaining_stale",
    "list_stored",
    "orchestrator_of",
    "roll_back",
    "switch",
]

PUSHED_RUN = "pushed"
"""The run that adapters belong to which no training run pushed."""
ASK_SECONDS = 3.0
"""How long the orchestrator is asked whether a run is being trained."""


def list_stored(known: argparse.Namespace) -> int:
    """Print the stored adapters of a generator and return 0."""
    active, adapters = asyncio.run(_read(known))
    if known.json:
        stored = [dataclasses.asdict(adapter) for adapter in adapters]
        now = {"run_id": active.run_id, "policy_version": active.policy_version}
        print(json.dumps({"active": now, "adapters": stored}, indent=2, default=str))
        return 0
    print(f"active: {describe_active(active)}")
    if adapters:
        print(*_lines(adapters), sep="\n")
    return 0


async def _read(known: argparse.Namespace) -> tuple[ActiveAdapter, tuple[Adapter, ...]]:
    async with AdapterClient(known.address, timeout_seconds=known.timeout, **credential_options(known)) as client:
        return await client.get_active_adapter(), await client.list_adapters()


def _lines(adapters: tuple[Adapter, ...]) -> list[str]:
    """Return a line per adapter below a heading, in columns."""
    rows: list[tuple[str, ...]] = [
        ("", "run", "version", "state", "rank", "bytes", "requests", "sha256", "stored (UTC)")
    ]
    for adapter in adapters:
        numbers = map(str, (adapter.rank, adapter.size_bytes, adapter.active_request_count))
        mark, stored = "*" if adapter.state == "active" else "", adapter.create_time.strftime("%Y-%m-%d %H:%M:%S")
        run_id, version = adapter.run_id, str(adapter.policy_version)
        rows.append((mark, run_id, version, adapter.state, *numbers, adapter.sha256[:12], stored))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def activate(known: argparse.Namespace) -> int:
    """Have new requests use a stored version, and return 0.

    Raises:
        FailedPreconditionError: IN_TRAINING, OWNER_UNKNOWN: a run would be disturbed; --take is not given.
        NotFoundError: The version is not loaded.
        AbortedError: Something else was activated meanwhile, or --epoch is not that of the run's present writer.
    """
    return asyncio.run(_activate(known))


async def _activate(known: argparse.Namespace) -> int:
    async with AdapterClient(known.address, timeout_seconds=known.timeout, **credential_options(known)) as client:
        active = await client.get_active_adapter()
        await check_owner(active, known.run_id, take=known.take, orchestrator=orchestrator_of(known))
        await switch(client, known.run_id, known.policy_version, active=active, epoch=known.epoch)
    return 0


def roll_back(known: argparse.Namespace) -> int:
    """Have new requests use the newest stored version below the active one, print it, and return 0.

    Raises:
        FailedPreconditionError: As `activate`; RUN_NOT_ACTIVE, NOTHING_BELOW: there is nothing to go back to.
        AbortedError: As `activate`.
    """
    return asyncio.run(_roll_back(known))


async def _roll_back(known: argparse.Namespace) -> int:
    async with AdapterClient(known.address, timeout_seconds=known.timeout, **credential_options(known)) as client:
        active = await client.get_active_adapter()
        if active.run_id != known.run_id:
            message = f"run {known.run_id} is not what is served; {describe_active(active)} is"
            raise FailedPreconditionError(message, field="run_id", reason="RUN_NOT_ACTIVE")
        await check_owner(active, known.run_id, take=known.take, orchestrator=orchestrator_of(known))
        with explaining_stale():
            version = await client.rollback(
                known.run_id, expected_policy_version=active.policy_version, epoch=known.epoch
            )
    print(f"active; {describe_active(active)} was served before", file=sys.stderr)
    print(version)
    return 0


async def switch(client: AdapterClient, run_id: str, version: int, *, active: ActiveAdapter, epoch: int) -> None:
    """Have new requests use a version; what was served before is named on stderr."""
    with explaining_stale():
        await client.activate(
            run_id,
            version,
            expected_run_id=active.run_id,
            expected_policy_version=active.policy_version,
            epoch=epoch,
        )
    print(f"active; {describe_active(active)} was served before", file=sys.stderr)


def describe_active(active: ActiveAdapter) -> str:
    """Return what is served in words."""
    if not active.run_id:
        return "the base model"
    what = f"version {active.policy_version} of run {active.run_id}"
    if active.policy_version == 0:
        return f"{what}, the base model"
    return what if active.adapter else f"{what}, which is missing since a restart"


def orchestrator_of(known: argparse.Namespace) -> Endpoint:
    """Return the orchestrator that --orchestrator names; it is shown the same credentials as the generator."""
    return Endpoint(known.orchestrator, credential_options(known))


async def check_owner(active: ActiveAdapter, run_id: str, *, take: bool, orchestrator: Endpoint) -> None:
    """Refuse to switch under a run that is being trained on this generator, unless told to.

    Where that cannot be found out, only another run is kept from taking the place of the owner.

    Args:
        active: What the generator serves.
        run_id: The run whose version is to be served.
        take: Told to.
        orchestrator: Whom to ask about the run that owns the generator.

    Raises:
        FailedPreconditionError: IN_TRAINING: the run is being trained; OWNER_UNKNOWN: that cannot be found out.
    """
    if active.run_id in ("", PUSHED_RUN) or take:
        return
    try:
        training = await _is_trained(active.run_id, orchestrator)
    except TetherError as error:
        unknown = isinstance(error, NotFoundError)
        if unknown and active.run_id == run_id:
            return
        message = (
            f"run {active.run_id} owns the generator, and the orchestrator that would know whether it is being trained"
            f" {'does not know it' if unknown else 'does not answer'} ({error.message})."
        )
        if active.run_id == run_id:
            print(f"warning: {message} If it is, it takes its own version back with its next step", file=sys.stderr)
            return
        message += " Name it with --orchestrator, or give --take if it is not"
        raise FailedPreconditionError(message, field="take", reason="OWNER_UNKNOWN") from None
    if not training:
        return
    own = "takes its own version back with its next step" if active.run_id == run_id else "fails then: it has lost it"
    message = f"run {active.run_id} is being trained on this generator and {own}. Give --take to switch all the same"
    raise FailedPreconditionError(message, field="take", reason="IN_TRAINING")


async def check_untrained(run_id: str, *, take: bool, orchestrator: Endpoint) -> None:
    """Refuse to push a version of a run that is being trained, unless told to: the run fails when it comes to that one.

    Where that cannot be found out, there is a warning; a run that the orchestrator does not know is not trained there.

    Args:
        run_id: The run whose version is to be pushed.
        take: Told to.
        orchestrator: Whom to ask about it.

    Raises:
        FailedPreconditionError: IN_TRAINING.
    """
    if run_id == PUSHED_RUN or take:
        return
    try:
        if not await _is_trained(run_id, orchestrator):
            return
    except NotFoundError:
        return
    except TetherError as error:
        print(
            f"warning: the orchestrator that would know whether run {run_id} is being trained does not answer"
            f" ({error.message}). If it is, it fails when it comes to this version; name it with --orchestrator",
            file=sys.stderr,
        )
        return
    message = (
        f"run {run_id} is being trained and fails when it comes to a version that it has not made. Push under another"
        " --run-id, or give --take to push all the same"
    )
    raise FailedPreconditionError(message, field="take", reason="IN_TRAINING")


async def _is_trained(run_id: str, orchestrator: Endpoint) -> bool:
    """Return whether a run is being trained.

    Raises:
        NotFoundError: The orchestrator does not know it.
        TetherError: The orchestrator does not answer.
    """
    address, credentials = orchestrator.address, orchestrator.credentials
    async with OrchestratorClient(address, timeout_seconds=ASK_SECONDS, retries=False, **credentials) as client:
        return (await client.get_run(run_id)).state not in FINAL_STATES


@contextmanager
def explaining_stale() -> Iterator[None]:
    """Say the way out where a writer with a higher epoch was there."""
    try:
        yield
    except AbortedError as error:
        raise _explain(error) from None


def _explain(error: AbortedError) -> AbortedError:
    """Return the error with the way out where a writer with a higher epoch was there."""
    if error.reason != "STALE_EPOCH":
        return error
    message = f"{error.message} That is the attempt of its training run; give --epoch with that number to act beside it"
    return AbortedError(message, field="epoch", reason=error.reason)
