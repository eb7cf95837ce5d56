from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.reliability.fork_server import OUT_OF_REACH
from tests.reliability.processes import LOADED_VARIABLE, Process, is_serving, poll_until
from tests.reliability.sabotage import SABOTAGES
from tests.reliability.scenarios import all_scenarios
from tests.reliability.world import WorldPlan, open_world
from tests.rpc.serving import run
from tether.errors import UnavailableError
from tether.reward import RewardClient, ScoreItem
from tether_services.runtime.fault_points import PLAN_VARIABLE
from tether_services.runtime.threads import thread_environment

REWARD = WorldPlan(services=("reward",))


def test_a_service_is_killed_started_again_frozen_and_continued_at_one_address(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_world(tmp_path, REWARD) as world:
            reward = world.processes["reward"]
            async with RewardClient(world.target("reward"), timeout_seconds=5.0) as client:
                first = await client.score([ScoreItem("a", "b")])
                pid = reward.pid
                reward.kill()
                assert not reward.alive and not await is_serving(reward.address)
                await reward.start()
                assert (reward.starts, reward.pid != pid) == (2, True)
                assert (await score_patiently(client)) == first.scores[0].score
                reward.stop()
                assert reward.alive and not await is_serving(reward.address)
                reward.resume()
                assert await reward.wait_until_serving(seconds=10) < 10

    run(scenario(), timeout_seconds=60)


async def score_patiently(client: RewardClient) -> float:
    for _ in range(20):
        try:
            return (await client.score([ScoreItem("a", "b")])).scores[0].score
        except UnavailableError:
            await asyncio.sleep(0.2)
    raise AssertionError("the service never came back")


def test_nothing_is_left_running_whatever_ends_the_world(tmp_path: Path) -> None:
    pids: list[int] = []

    async def scenario() -> None:
        async with open_world(tmp_path, REWARD) as world:
            pids.append(world.processes["reward"].pid)
            raise RuntimeError("the scenario fails")

    with pytest.raises(RuntimeError, match="the scenario fails"):
        run(scenario(), timeout_seconds=60)
    assert not Path(f"/proc/{pids[0]}").exists()


PARENT = """
import asyncio, os, sys
from pathlib import Path
from tests.reliability.world import WorldPlan, open_world
async def main():
    async with open_world(Path(sys.argv[1]), WorldPlan(services=("reward",))) as world:
        print(world.processes["reward"].pid, flush=True)
        os.kill(os.getpid(), 9)
asyncio.run(main())
"""


def test_services_die_with_a_suite_that_is_killed(tmp_path: Path) -> None:
    parent = subprocess.run(
        [sys.executable, "-c", PARENT, str(tmp_path)], stdout=subprocess.PIPE, text=True, timeout=60, check=False
    )
    assert parent.returncode == -9
    service = Path(f"/proc/{int(parent.stdout)}")
    deadline = time.monotonic() + 10
    while service.exists() and "\tZ" not in (service / "status").read_text():
        assert time.monotonic() < deadline, "the service outlived the suite"
        time.sleep(0.05)


def test_a_service_that_does_not_start_is_reported_with_its_log(tmp_path: Path) -> None:
    plan = WorldPlan(services=("reward",), settings={"reward": {"no_such_setting": 1}})

    async def scenario() -> None:
        async with open_world(tmp_path, plan):
            raise AssertionError("it serves")

    with pytest.raises(AssertionError, match="no_such_setting"):
        run(scenario(), timeout_seconds=60)


def test_a_forked_service_is_killed_and_started_like_any_other_and_ends_with_its_world(tmp_path: Path) -> None:
    plan = WorldPlan(models="tiny", services=("reward", "reference"))
    pids: list[int] = []

    async def scenario() -> None:
        async with open_world(tmp_path, plan) as world:
            workers, reference = world.processes["workers"], world.processes["reference"]
            assert reference.pid in workers.children()
            reference.kill()
            assert (reference.alive, reference.exit_code) == (False, -9)
            assert not await is_serving(reference.address)
            await reference.start(seconds=30)
            assert await is_serving(reference.address)
            pids.extend(process.pid for process in world.processes.values())

    run(scenario(), timeout_seconds=120)
    assert len(pids) == 3
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_the_libraries_can_be_loaded_once_for_several_worlds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    socket = str(tmp_path / "loaded.socket")
    environment = thread_environment(1)
    loaded = Process("loaded", "tests.reliability.fork_server", (socket,), tmp_path / "log", socket, environment)
    monkeypatch.setenv(LOADED_VARIABLE, socket)
    pids: list[int] = []

    async def scenario(number: int) -> None:
        async with open_world(tmp_path / str(number), WorldPlan(models="tiny", services=("reward",))) as world:
            workers, reward = world.processes["workers"], world.processes["reward"]
            assert workers.pid in loaded.children()
            assert reward.pid in workers.children()
            pids.extend((workers.pid, reward.pid))

    try:
        loaded.launch()
        for number in range(2):
            run(scenario(number), timeout_seconds=120)
        assert loaded.alive and loaded.children() == []
    finally:
        loaded.kill()
    assert len(set(pids)) == 4


def test_a_forked_service_that_does_not_start_is_reported_with_its_log(tmp_path: Path) -> None:
    plan = WorldPlan(models="tiny", services=("reward",), settings={"reward": {"no_such_setting": 1}})

    async def scenario() -> None:
        async with open_world(tmp_path, plan):
            raise AssertionError("it serves")

    with pytest.raises(AssertionError, match="no_such_setting"):
        run(scenario(), timeout_seconds=60)


@pytest.mark.parametrize("out_of_reach", [False, True])
def test_a_worker_is_killed_with_its_client_unless_it_is_out_of_reach(out_of_reach: bool, tmp_path: Path) -> None:
    sabotage = {"worker": [OUT_OF_REACH]} if out_of_reach else {}

    async def scenario() -> None:
        async with open_world(tmp_path, WorldPlan(models="tiny", services=("reward",), sabotage=sabotage)) as world:
            reward = world.processes["reward"]
            pid = reward.pid
            reward._child._server.shutdown(socket.SHUT_RDWR)  # type: ignore[union-attr]  # the client is gone
            for _ in range(20):
                await asyncio.sleep(0.05)
                if not Path(f"/proc/{pid}").exists():
                    break
            assert Path(f"/proc/{pid}").exists() is out_of_reach

    run(scenario(), timeout_seconds=60)


def test_waiting_ends_at_its_deadline_and_says_for_what() -> None:
    async def never() -> bool:
        return False

    started = time.monotonic()
    with pytest.raises(AssertionError, match=r"after 0.2 s still not: the moon"):
        run(poll_until(never, seconds=0.2, what="the moon"))
    assert time.monotonic() - started < 2


@pytest.mark.parametrize("sabotage", sorted(SABOTAGES))
def test_every_sabotage_finds_what_it_takes_out(sabotage: str) -> None:
    program = f"from tests.reliability.sabotage import take_out; take_out({sabotage!r})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_the_start_count_chooses_the_part_of_a_fault_plan(tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text('{"generator": {"2": "no.such.point@1=kill"}}')
    options: dict[str, str] = {**os.environ, PLAN_VARIABLE: str(plan)}
    process = Process(
        name="generator",
        module="tether_services.generator",
        arguments=("--set", "engine=fake", "--dry-run"),
        log_file=tmp_path / "log",
        address="127.0.0.1:9",
        environment=options,
    )
    for expected in ("fake", "no.such.point"):
        process.launch()
        deadline = time.monotonic() + 30
        while process.alive:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert expected in process.log_tail()


def test_every_scenario_has_a_name_of_its_own_and_a_control_says_how_it_is_caught() -> None:
    scenarios = all_scenarios()
    assert len({scenario.name for scenario in scenarios}) == len(scenarios)
    for scenario in scenarios:
        assert bool(scenario.control) == bool(scenario.caught_as), scenario.name
