"""A reward service in a thread of the test, for programs that call it as they would call a remote one."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from tests.rpc.scripted_server import in_thread
from tests.rpc.serving import LOCAL, Served, serving
from tether_services.reward.config import RewardSettings
from tether_services.reward.service import RewardService


@contextmanager
def reward_in_thread(**values: object) -> Iterator[Served]:
    """Serve until the block ends, with the fake engine unless the values say otherwise."""
    chosen = values if "models" in values else {"engine": "fake"} | values
    settings = RewardSettings.model_validate(LOCAL | {"admin_address": "127.0.0.1:0"} | chosen)
    running: list[Served] = []

    @asynccontextmanager
    async def serve() -> AsyncIterator[str]:
        async with serving(settings, lambda registry: RewardService(settings, registry)) as served:
            running.append(served)
            yield served.target

    with in_thread(serve):
        yield running[0]
