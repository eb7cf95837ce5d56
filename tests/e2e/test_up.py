"""The four services as supervised processes: start, death and restart, orderly and disorderly ends."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from tether import Client, GeneratorClient, OrchestratorClient, ReferenceClient, RewardClient, ScoreItem
from tether.errors import FailedPreconditionError, InvalidArgumentError, UnavailableError
from tether_services.cli.main import main
from tether_services.local.deployment import (
    USUAL_PORTS,
    LocalDeployment,
    LocalOptions,
    service_settings,
)
from tether_services.local.ports import is_free
from tether_services.local.supervision import Child, ChildSpec


def with_deployment(
    options: LocalOptions, use: Callable[[LocalDeployment], Awaitable[None]] | None = None
) -> list[str]:
    """Run a deployment, use it, and return its event lines."""
    events: list[str] = []

    async def run() -> None:
        async with LocalDeployment(options, report=events.append) as deployment:
            if use is not None:
                await use(deployment)

    asyncio.run(run())
    return events


async def wait_until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        await asyncio.sleep(0.05)


def fake(tmp_path: Path) -> LocalOptions:
    return LocalOptions(state_dir=tmp_path, engine="fake", threads=1)


def has_served(name: str, times: int, events: list[str]) -> bool:
    return sum(f"{name} serving" in event for event in events) == times


def read_page(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as response:
        return str(response.read().decode())


def gone(pids: list[int]) -> bool:
    return not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids)


def test_the_four_services_start_answer_and_stop(tmp_path: Path) -> None:
    pids: list[int] = []

    async def use(deployment: LocalDeployment) -> None:
        pids.extend(pid for pid in deployment.pids.values() if pid)
        addresses = deployment.addresses
        async with GeneratorClient(addresses.generator) as generator:
            assert (await generator.get_generator()).engine == "fake"
        async with RewardClient(addresses.reward) as reward:
            assert (await reward.list_reward_models())[0].engine == "fake"
        async with ReferenceClient(addresses.reference) as reference:
            assert (await reference.get_reference()).engine == "fake"
        async with OrchestratorClient(addresses.orchestrator) as orchestrator:
            assert await orchestrator.list_runs() == ()

    events = with_deployment(fake(tmp_path), use)
    assert len(pids) == 4 and gone(pids)
    for name in ("generator", "reward", "reference", "orchestrator"):
        own = [event for event in events if event.startswith(name + " ")]
        assert len(own) == 3, own
        assert "starting (pid" in own[0] and str(tmp_path / "_services" / f"{name}.log") in own[0]
        assert "serving on 127.0.0.1:" in own[1]
        assert own[2] == f"{name} stopped"
    assert next(event for event in events if event.endswith("stopped")) == "orchestrator stopped"


def test_a_dead_service_is_reported_and_restarted_at_the_same_address(tmp_path: Path) -> None:
    events: list[str] = []

    async def run() -> None:
        async with LocalDeployment(fake(tmp_path), report=events.append) as deployment:
            for killed in range(1, 3):
                pid = deployment.pids["reward"]
                assert pid is not None
                os.kill(pid, signal.SIGKILL)
                await wait_until(partial(has_served, "reward", killed + 1, events))
                async with RewardClient(deployment.addresses.reward) as client:
                    result = await client.score([ScoreItem("a", "b")])
                    assert result.scores[0].error is None
                assert deployment.pids["reward"] != pid

    asyncio.run(run())
    deaths = [event for event in events if "was ended by SIGKILL" in event]
    assert len(deaths) == 2
    assert "restarting in 0.5 s" in deaths[0] and "restarting in 1 s" in deaths[1]
    assert all(str(tmp_path / "_services" / "reward.log") in event for event in deaths)


def test_a_service_that_cannot_start_is_named_with_its_last_log_lines_and_nothing_is_left(tmp_path: Path) -> None:
    options = LocalOptions(state_dir=tmp_path, model=str(tmp_path / "no-such-model"), threads=1)
    events: list[str] = []

    async def run() -> None:
        async with LocalDeployment(options, report=events.append):
            pytest.fail("must not start")

    with pytest.raises(InvalidArgumentError, match="no-such-model") as caught:
        asyncio.run(run())
    assert "log" in caught.value.message and str(tmp_path) in caught.value.message
    assert sum(event.endswith("stopped") for event in events) == 4


def test_a_bad_setting_of_a_service_is_in_the_message(tmp_path: Path) -> None:
    options = LocalOptions(state_dir=tmp_path, engine="fake", threads=1, settings={"reward": {"max_itmes": 3}})
    with pytest.raises(InvalidArgumentError, match="status 42") as caught:
        with_deployment(options)
    assert caught.value.reason == "INVALID_CONFIG"
    assert "max_itmes" in caught.value.message


def test_a_service_that_does_not_serve_in_time_is_named(tmp_path: Path) -> None:
    options = LocalOptions(state_dir=tmp_path, engine="fake", threads=1, start_seconds=0.01)
    with pytest.raises(UnavailableError, match=r"did not serve within 0\.01 s"):
        with_deployment(options)


def test_a_service_whose_configuration_has_become_bad_is_given_up_with_its_last_log_lines(tmp_path: Path) -> None:
    async def use(deployment: LocalDeployment) -> None:
        (deployment.log_folder / "reward.toml").write_text("max_itmes = 3\n")
        pid = deployment.pids["reward"]
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(FailedPreconditionError, match="reward ended with status 42") as caught:
            await asyncio.wait_for(deployment.wait(), 30)
        assert "max_itmes" in caught.value.message

    with_deployment(fake(tmp_path), use)


def test_bad_options_of_the_command_are_a_configuration_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["up", "--engine", "fake", "--set", "rewards.max_items=3"]) == 42
    assert main(["up", "--engine", "fake", "--threads", "0"]) == 42
    assert main(["up", "--engine", "fake", "--set", "reward.address=127.0.0.1:1"]) == 42
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and "rewards" in lines[0] and "threads" in lines[1] and "reward.address" in lines[2]


def test_an_exception_inside_stops_everything(tmp_path: Path) -> None:
    pids: list[int] = []

    async def fail(deployment: LocalDeployment) -> None:
        pids.extend(pid for pid in deployment.pids.values() if pid)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        with_deployment(fake(tmp_path), fail)
    assert len(pids) == 4 and gone(pids)


def test_two_deployments_live_beside_each_other(tmp_path: Path) -> None:
    async def use(first: LocalDeployment) -> None:
        async with LocalDeployment(fake(tmp_path / "second"), report=lambda text: None) as second:
            assert first.addresses.generator != second.addresses.generator
            async with RewardClient(second.addresses.reward) as client:
                assert await client.list_reward_models()

    with_deployment(fake(tmp_path / "first"), use)


def test_a_child_that_ignores_sigterm_is_killed_after_the_grace(tmp_path: Path) -> None:
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
    (tmp_path / "stubborn.py").write_text(code)
    events: list[str] = []

    async def run() -> None:
        spec = ChildSpec(
            name="stubborn",
            module="stubborn",
            arguments=(),
            environment={"PYTHONPATH": str(tmp_path)},
            address="127.0.0.1:1",
            log_file=tmp_path / "stubborn.log",
        )
        child = Child(spec, report=events.append)
        starting = asyncio.create_task(child.start(timeout_seconds=30))
        await wait_until(lambda: spec.log_file.exists() and "up" in spec.log_file.read_text())
        pid = child.pid
        assert pid is not None
        starting.cancel()
        await child.stop(grace_seconds=0.5)
        assert gone([pid])

    asyncio.run(run())
    assert "stubborn did not stop within 0.5 s and is killed" in events


@contextmanager
def up(state_dir: Path) -> Iterator[tuple[subprocess.Popen[str], dict[str, str], list[int]]]:
    """Run `tether up`; yield the process, the addresses it printed and the pids of its children."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tether_services", "up", "--engine", "fake", "--state-dir", str(state_dir)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    addresses: dict[str, str] = {}
    try:
        for line in process.stdout:
            words = line.split()
            if len(words) == 2 and words[1].startswith("127.0.0.1:"):
                addresses[words[0]] = words[1]
            if "Ctrl-C" in line:
                break
        yield process, addresses, [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_stops_everything_and_ends_with_its_status(
    tmp_path: Path, number: signal.Signals, status: int
) -> None:
    with up(tmp_path) as (process, _addresses, pids):
        assert len(pids) == 4
        process.send_signal(number)
        output, _nothing = process.communicate(timeout=30)
        assert process.returncode == status
        assert gone(pids)
        assert output.count("stopped") == 4
        assert "Traceback" not in output


def test_the_children_of_a_killed_parent_die(tmp_path: Path) -> None:
    if sys.platform != "linux":
        pytest.skip("only Linux tells a process that its parent died")
    with up(tmp_path) as (process, _addresses, pids):
        assert len(pids) == 4
        process.kill()
        process.wait(10)
        asyncio.run(wait_until(lambda: gone(pids), 10))


def test_a_second_interrupt_ends_at_once(tmp_path: Path) -> None:
    with up(tmp_path) as (process, _addresses, pids):
        stopped = psutil.Process(pids[0])
        stopped.suspend()  # so that the orderly end would take until the grace is over
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        assert process.wait(5) == 130
        asyncio.run(wait_until(lambda: gone(pids), 10))


def test_the_printed_addresses_answer(tmp_path: Path) -> None:
    with up(tmp_path) as (_process, addresses, _pids):
        assert set(addresses) == {"generator", "adapter", "reward", "reference", "orchestrator"}
        with Client(reward=addresses["reward"], generator=addresses["generator"]) as client:
            assert -1 <= client.score("Once", " upon").score < 1
            assert client.generate("Once").completions[0].token_ids


def test_the_metrics_addresses_answer(tmp_path: Path) -> None:
    async def use(deployment: LocalDeployment) -> None:
        for name, address in deployment.addresses.metrics.items():
            assert f"tether_{name}_" in await asyncio.to_thread(read_page, f"http://{address}/metrics")

    with_deployment(fake(tmp_path), use)


def test_the_usual_ports_are_taken_only_if_all_of_them_are_free(tmp_path: Path) -> None:
    def addresses() -> set[str]:
        deployment = LocalDeployment(LocalOptions(state_dir=tmp_path, usual_ports=True), report=print)
        chosen = deployment.addresses
        served = {chosen.generator, chosen.adapter, chosen.reward, chosen.reward_models, chosen.reference}
        return {*served, chosen.orchestrator}

    usual = {f"127.0.0.1:{port}" for port in (50051, 50061, 50052, 50062, 50053, 50054)}
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", 50053))
        except OSError:
            assert addresses().isdisjoint(usual)  # somebody else has it
            return
        listener.listen()
        assert addresses().isdisjoint(usual)
    assert addresses() == usual or not all(is_free(port) for port in USUAL_PORTS)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        (LocalOptions(threads=0), "threads"),
        (LocalOptions(settings={"rewards": {}}), "settings.rewards"),
        (LocalOptions(settings={"reward": {"address": "127.0.0.1:1"}}), "reward.address"),
        (LocalOptions(settings={"orchestrator": {"state_dir": "x"}}), "orchestrator.state_dir"),
    ],
)
def test_options_that_cannot_be_met_are_refused_before_anything_starts(options: LocalOptions, field: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        LocalDeployment(options, report=print)
    assert caught.value.violations[0].field == field


def test_named_reward_models_replace_the_one_of_the_options(tmp_path: Path) -> None:
    part: dict[str, Any] = {"name": "length", "engine": "rules", "function": "tether_services.reward.rules:length_band"}
    part["arguments"] = {"low": 1, "high": 9}
    model = {"name": "short", "components": [part]}
    options = LocalOptions(state_dir=tmp_path, engine="fake", threads=1, settings={"reward": {"models": [model]}})

    async def use(deployment: LocalDeployment) -> None:
        async with RewardClient(deployment.addresses.reward) as client:
            (known,) = await client.list_reward_models()
            assert (known.name, known.engine) == ("short", "rules")

    with_deployment(options, use)


def test_threads_are_shared_by_those_who_work_at_the_same_time() -> None:
    options = LocalOptions(threads=8)
    settings = service_settings(options, LocalDeployment(options, report=print).addresses)
    assert [settings[name]["threads"] for name in ("generator", "reward", "reference")] == [4, 2, 2]
    assert settings["orchestrator"]["threads"] == 8
    single = service_settings(LocalOptions(threads=1), LocalDeployment(options, report=print).addresses)
    assert {part["threads"] for part in single.values()} == {1}
