"""The port of the metrics: open as long as the service, and no longer."""

from __future__ import annotations

import asyncio
import threading
import time
import urllib.error
import urllib.request

from tests.rpc.serving import LOCAL, run, serving
from tether_services.reward.config import RewardSettings
from tether_services.reward.service import RewardService


def read(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        return str(answer.read().decode())


def is_refused(port: int) -> bool:
    """Return whether nobody listens; a connection that is reset was made just before."""
    try:
        read(port)
    except urllib.error.URLError as error:
        return isinstance(error.reason, ConnectionRefusedError)
    except OSError:
        return False
    return False


def test_the_metrics_port_and_its_thread_end_with_the_service() -> None:
    settings = RewardSettings.model_validate(LOCAL | {"engine": "fake"})
    before = set(threading.enumerate())

    async def scenario() -> int:
        async with serving(settings, lambda registry: RewardService(settings, registry)) as served:
            assert served.runner.metrics_port is not None
            assert "tether_reward_requests_total" in await asyncio.to_thread(read, served.runner.metrics_port)
            return served.runner.metrics_port

    port = run(scenario())
    left = [thread for thread in set(threading.enumerate()) - before if "serve_forever" in thread.name]
    deadline = time.monotonic() + 10
    for thread in left:
        thread.join(max(0.0, deadline - time.monotonic()))
        assert not thread.is_alive()
    while not is_refused(port):  # the socket is closed right after
        assert time.monotonic() < deadline, "the port is still open"
