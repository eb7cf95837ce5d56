"""A service that hangs instead of dying: `tether up` finds out by its liveness and replaces it."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import psutil
import pytest

from tether import DeadlineExceededError, RewardClient, ScoreItem, UnavailableError
from tether_services.local.ports import free_ports
from tether_services.local.supervision import HUNG_PROBES, Child, ChildSpec

ITEM = ScoreItem("Once", " upon")
HANGS_ONCE = """
import time
from pathlib import Path

def score(prompt, response, *, mark):
    try:
        Path(mark).touch(exist_ok=False)
    except FileExistsError:
        return 1.0
    time.sleep(3600)
"""


@asynccontextmanager
async def supervised(
    folder: Path, config: str, *, probe_seconds: float, hung_seconds: float = 2.0
) -> AsyncIterator[tuple[Child, list[str]]]:
    """Yield a supervised reward service and its events."""
    (folder / "hangs_once.py").write_text(HANGS_ONCE)
    (folder / "reward.toml").write_text(config)
    reward, metrics = (f"127.0.0.1:{port}" for port in free_ports(2))
    spec = ChildSpec(
        name="reward",
        module="tether_services.reward",
        arguments=(
            *("--config", str(folder / "reward.toml")),
            *("--set", f"address={reward}", "--set", f"metrics_address={metrics}"),
        ),
        environment={"PYTHONPATH": f"{folder}:{os.environ.get('PYTHONPATH', '')}"},
        address=reward,
        log_file=folder / "reward.log",
    )
    events: list[str] = []
    child = Child(spec, report=events.append, probe_seconds=probe_seconds, hung_seconds=hung_seconds)
    try:
        await child.start(timeout_seconds=60)
        yield child, events
    finally:
        await child.stop(grace_seconds=2)


async def served_again(child: Child, events: list[str], *, seconds: float) -> bool:
    """Return whether the service has been started and has served a second time, at the latest after some seconds."""
    for _ in range(int(seconds / 0.1)):
        if sum("serving on" in event for event in events) == 2:
            async with RewardClient(child.spec.address) as client:
                return (await client.score([ITEM])).scores[0].error is None
        await asyncio.sleep(0.1)
    return False


@pytest.mark.parametrize("probed", [True, False])
def test_a_stopped_service_is_killed_and_replaced(probed: bool, tmp_path: Path) -> None:
    """The control never looks at the liveness: the process lives, so it stays."""

    async def main() -> None:
        async with supervised(tmp_path, 'engine = "fake"', probe_seconds=0.5 if probed else 3600) as (child, events):
            assert child.pid is not None
            stopped = psutil.Process(child.pid)
            await asyncio.sleep(0.5 * (HUNG_PROBES + 2))
            assert child.num_restarts == 0, "a healthy one is left alone"
            os.kill(stopped.pid, signal.SIGSTOP)
            assert await served_again(child, events, seconds=30 if probed else 6) is probed
            assert stopped.is_running() is not probed
            hung = [event for event in events if "liveness checks for 2 s" in event]
            assert len(hung) == probed

    asyncio.run(main())


def test_a_service_whose_engine_is_stuck_is_replaced_although_its_port_answers(tmp_path: Path) -> None:
    rule = f'name = "rule"\nengine = "rules"\nfunction = "hangs_once:score"\narguments = {{mark = "{tmp_path}/mark"}}'
    config = f'liveness_seconds = 0.5\nrule_seconds = 0.5\n[[models]]\nname = "stuck"\n[[models.components]]\n{rule}\n'

    async def main() -> None:
        async with supervised(tmp_path, config, probe_seconds=0.5) as (child, events):
            async with RewardClient(child.spec.address, retries=False) as client:
                with suppress(DeadlineExceededError, UnavailableError):
                    await client.score([ITEM], timeout_seconds=0.5)
            assert await served_again(child, events, seconds=30)

    asyncio.run(main())


def test_a_service_that_was_merely_slow_is_left_alone(tmp_path: Path) -> None:
    """It fails more checks in a row than HUNG_PROBES, and then answers again before `hung_seconds`."""

    async def main() -> None:
        async with supervised(tmp_path, 'engine = "fake"', probe_seconds=0.2, hung_seconds=60) as (child, _):
            assert child.pid is not None
            os.kill(child.pid, signal.SIGSTOP)
            await asyncio.sleep(0.4 * (HUNG_PROBES + 3))
            os.kill(child.pid, signal.SIGCONT)
            async with RewardClient(child.spec.address) as client:
                assert (await client.score([ITEM])).scores[0].error is None
            assert child.num_restarts == 0

    asyncio.run(main())
