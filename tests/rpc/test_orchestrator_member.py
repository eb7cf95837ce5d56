"""One of several generators: a call ends when it hangs, not when it drains, and a long failure is only waited for."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.rpc.fleet_serving import ATTEMPT, PROMPT, ask, fleet_world, wait_until
from tests.rpc.generator_serving import serve_generator, settings
from tests.rpc.serving import run
from tether.errors import ResourceExhaustedError
from tether.generator import Generation, GeneratorClient, SamplingParams
from tether_services.local.ports import free_ports
from tether_services.orchestrator import fleet as fleets
from tether_services.orchestrator import member as members
from tether_services.orchestrator.config import GeneratorAddress, OrchestratorSettings
from tether_services.orchestrator.member import Member
from tether_services.orchestrator.remote import open_services


def test_the_calls_of_a_generator_that_drains_end_with_their_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """It says that it does not serve, then refuses connections, and works on what it has for 3 s all the while."""
    monkeypatch.setattr(members, "LOOK_SECONDS", 0.1)
    monkeypatch.setattr(members, "SILENT_LOOKS", 2)

    async def work(client: GeneratorClient) -> Generation:
        return await client.generate(PROMPT, sampling=SamplingParams(max_tokens=8, seed=7))

    async def scenario() -> None:
        address, admin = (f"127.0.0.1:{port}" for port in free_ports(2))
        given = settings(address=address, admin_address=admin, drain_seconds=10.0, fake_token_seconds=3.0 / 8)
        at = GeneratorAddress(address=address, adapter_address=admin)
        async with (
            AsyncExitStack() as running,
            open_services(OrchestratorSettings(generators=(at,), max_retries=0)) as services,
        ):
            await running.enter_async_context(serve_generator(given))
            member = Member(services.generators[0], ATTEMPT, lambda remote, state: None)
            calling = asyncio.create_task(member.generate(work))
            await asyncio.sleep(0.5)
            draining = asyncio.create_task(running.aclose())
            assert len((await calling).completions) == 1
            await draining
            await member.close()

    run(scenario())


def test_a_generator_without_room_for_hours_is_tried_again_and_the_others_serve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So many failures in a row that the doubled pause would be no number any more."""
    monkeypatch.setattr(fleets, "MAX_BACKOFF_SECONDS", 0.0)

    async def scenario() -> None:
        async with fleet_world(tmp_path) as w, w.fleet(laggards="leave_out") as fleet:
            await fleet.take_over(None)
            second, tries = fleet._members[1], 0

            async def is_serving() -> bool:
                return True

            async def full(*given: Any) -> None:
                nonlocal tries
                tries += 1
                raise ResourceExhaustedError("The disk has no room.", reason="STORAGE_FULL")

            monkeypatch.setattr(second, "is_serving", is_serving)
            monkeypatch.setattr(second, "prepare", full)
            with monkeypatch.context() as broken:
                broken.setattr(second, "bring", full)
                await fleet.publish(w.adapter(1))
                await wait_until(lambda: tries > 1100)
                assert len(fleet.lagging) == 1
                await fleet.generate(0, ask(fleet))
            await wait_until(lambda: not fleet.lagging)

    run(scenario())
