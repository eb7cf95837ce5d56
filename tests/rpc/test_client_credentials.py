"""Tokens and TLS against real servers: on every kind of call, through rotations, and where they must fail."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio

import tether.rotation
from tests.rpc.certificates import Authority, client_files
from tests.rpc.scripted_reward import ITEM, ScriptedReward, answer
from tests.rpc.scripted_server import in_thread
from tests.rpc.test_client_watch import RUNNING, SUCCEEDED, run_event
from tests.rpc.tls_serving import Identity, Visitors, serving_tls
from tether import (
    AdapterClient,
    Client,
    OrchestratorClient,
    RewardClient,
    Run,
    TlsFiles,
    UnauthenticatedError,
    UnavailableError,
)
from tether.channel import open_channel
from tether.rotation import CredentialChannel
from tether.v1 import (
    adapter_pb2,
    adapter_pb2_grpc,
    orchestrator_pb2,
    orchestrator_pb2_grpc,
    reward_pb2,
    reward_pb2_grpc,
)

SECRET = "tth_canary.0123456789"


class Everything(orchestrator_pb2_grpc.OrchestratorServiceServicer, adapter_pb2_grpc.AdapterServiceServicer):
    """One method with effect, one server stream that waits for a signal, one client stream."""

    def __init__(self) -> None:
        self.may_end = asyncio.Event()

    def add(self, server: grpc.aio.Server) -> None:
        orchestrator_pb2_grpc.add_OrchestratorServiceServicer_to_server(self, server)
        adapter_pb2_grpc.add_AdapterServiceServicer_to_server(self, server)

    async def CancelRun(self, request: orchestrator_pb2.CancelRunRequest, context: Any) -> Any:
        return orchestrator_pb2.CancelRunResponse(run=RUNNING)

    async def WatchRun(self, request: Any, context: Any) -> AsyncIterator[orchestrator_pb2.WatchRunResponse]:
        yield run_event(RUNNING)
        await self.may_end.wait()
        yield run_event(SUCCEEDED)

    async def PushChunks(self, request_iterator: Any, context: Any) -> adapter_pb2.PushChunksResponse:
        return adapter_pb2.PushChunksResponse(committed_offset=sum([len(r.data) async for r in request_iterator]))


def run(scenario: Any) -> None:
    asyncio.run(asyncio.wait_for(scenario, 60))


@pytest.mark.parametrize("encrypted", [True, False])
def test_every_kind_of_call_shows_the_token(encrypted: bool, tmp_path: Path) -> None:
    authority = Authority()
    identity = Identity(authority, authority.sign("service")) if encrypted else None
    options: Any = {"token": SECRET, "tls": client_files(tmp_path, authority) if encrypted else None}
    visitors = Visitors()
    everything = Everything()  # type: ignore[abstract]

    async def chunks() -> AsyncIterator[adapter_pb2.PushChunksRequest]:
        yield adapter_pb2.PushChunksRequest(data=b"abc")

    async def scenario() -> None:
        everything.may_end.set()
        adders = (everything.add, ScriptedReward(answer).add)
        async with (
            serving_tls(identity, *adders, visitors=visitors) as target,
            RewardClient(target, **options) as reward,
            OrchestratorClient(target, **options) as runs,
            AdapterClient(target, **options) as adapters,
            open_channel(target, **options) as channel,
        ):
            await reward.score([ITEM])
            await reward.is_serving()
            await runs.cancel_run("a")
            assert [event.state async for event in runs.watch_run("a") if isinstance(event, Run)] == [
                "running",
                "succeeded",
            ]
            assert (await adapters._upload(adapters._stub.PushChunks, chunks, 10)).committed_offset == 3
            raw = reward_pb2_grpc.RewardServiceStub(channel)
            await raw.ListRewardModels(reward_pb2.ListRewardModelsRequest(), timeout=10)

    run(scenario())
    methods = ("Score", "Check", "CancelRun", "WatchRun", "PushChunks", "ListRewardModels")
    for method in methods:
        assert visitors.tokens(method) == {f"Bearer {SECRET}"}, method


def test_without_a_token_nothing_is_shown_and_a_wrong_one_is_an_error_that_does_not_tell_it() -> None:
    async def scenario() -> None:
        visitors = Visitors()
        async with serving_tls(None, ScriptedReward(answer).add, visitors=visitors) as target:
            async with RewardClient(target) as client:
                await client.score([ITEM])
            assert visitors.tokens("Score") == {None}
            visitors.wanted = "right"
            async with RewardClient(target, token=SECRET) as client:
                with pytest.raises(UnauthenticatedError) as caught:
                    await client.score([ITEM])
                assert SECRET not in repr(caught.value) + str(caught.value)
            async with RewardClient(target, token="right") as client:
                assert (await client.score([ITEM])).scores[0].score == 14.0

    run(scenario())


def test_the_synchronous_client_shows_the_same_credentials(tmp_path: Path) -> None:
    authority = Authority()
    identity = Identity(authority, authority.sign("service"), mutual=True)
    files = client_files(tmp_path, authority, authority.sign("client"))
    serve = in_thread(lambda: serving_tls(identity, ScriptedReward(answer).add, visitors=Visitors(SECRET)))
    with serve as target, Client(reward=target, token=SECRET, tls=files) as client:
        assert client.score("Once upon a time", " all was well.").score == 14.0


def test_a_token_that_is_rotated_in_its_file_is_shown_from_the_next_call_on(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("first")

    async def scenario() -> None:
        visitors = Visitors("first")
        async with (
            serving_tls(None, ScriptedReward(answer).add, visitors=visitors) as target,
            RewardClient(target, token=file) as client,
        ):
            await client.score([ITEM])
            visitors.wanted = "second"
            with pytest.raises(UnauthenticatedError):
                await client.score([ITEM])
            file.write_text("second")
            await client.score([ITEM])

    run(scenario())


async def _try(target: str, tls: Any) -> bool:
    """Return whether a call succeeds; it fails as UNAVAILABLE otherwise."""
    async with RewardClient(target, tls=tls, retries=False) as client:
        try:
            await client.score([ITEM], timeout_seconds=10)
        except UnavailableError as error:
            assert target in error.message
            return False
        return True


def test_only_the_right_files_reach_a_service_with_mutual_tls(tmp_path: Path) -> None:
    authority, stranger = Authority(), Authority("stranger")
    folders = {name: tmp_path / name for name in ("right", "no_certificate", "wrong_ca", "wrong_client")}
    for folder in folders.values():
        folder.mkdir()
    right = client_files(folders["right"], authority, authority.sign("client"))
    cases = {
        "right": right,
        "named": TlsFiles(right.ca_file, right.certificate_file, right.key_file, server_name="localhost"),
        "no_certificate": client_files(folders["no_certificate"], authority),
        "wrong_ca": client_files(folders["wrong_ca"], stranger, authority.sign("client")),
        "wrong_client": client_files(folders["wrong_client"], authority, stranger.sign("client")),
        "wrong_name": TlsFiles(right.ca_file, right.certificate_file, right.key_file, server_name="reward.example"),
        "unencrypted": False,
    }

    async def scenario() -> None:
        identity = Identity(authority, authority.sign("service"), mutual=True)
        async with serving_tls(identity, ScriptedReward(answer).add, visitors=Visitors()) as target:
            reached = {name for name, tls in cases.items() if await _try(target, tls)}
        async with serving_tls(None, ScriptedReward(answer).add, visitors=Visitors()) as target:
            assert not await _try(target, right), "a service without TLS is not taken for one with it"
        assert reached == {"right", "named"}

    run(scenario())


def test_replaced_certificates_are_used_by_the_next_call_while_calls_in_flight_finish(tmp_path: Path) -> None:
    """The authority changes, so that only a new connection with the new files can succeed."""
    old, new = Authority("old"), Authority("new")
    files = client_files(tmp_path, old, old.sign("client"))
    everything = Everything()  # type: ignore[abstract]

    async def scenario() -> None:
        identity = Identity(old, old.sign("service"), mutual=True)
        adders = (everything.add, ScriptedReward(answer).add)
        async with (
            serving_tls(identity, *adders, visitors=Visitors()) as target,
            OrchestratorClient(target, tls=files) as client,
            RewardClient(target, tls=files, retries=False) as untouched,
        ):
            await untouched.score([ITEM])
            watching = client.watch_run("a")
            first = await anext(watching)
            channel = client._opened
            assert isinstance(channel, CredentialChannel) and isinstance(first, Run) and first.state == "running"
            identity.authority, identity.pair = new, new.sign("service")
            client_files(tmp_path, new, new.sign("client"))
            await client.cancel_run("a")
            assert len(channel._draining) == 1, "the stream is still on the old connection"
            everything.may_end.set()
            assert [event.state async for event in watching if isinstance(event, Run)] == ["succeeded"]
            while channel._draining:
                await asyncio.sleep(0)
            await untouched.score([ITEM])

    run(scenario())


def test_calls_under_load_survive_certificates_that_change_all_the_time(tmp_path: Path) -> None:
    authority = Authority()
    files = client_files(tmp_path, authority, authority.sign("client"))

    async def scenario() -> None:
        identity = Identity(authority, authority.sign("service"), mutual=True)
        servicer = ScriptedReward(answer)
        async with (
            serving_tls(identity, servicer.add, visitors=Visitors()) as target,
            RewardClient(target, tls=files, retries=False) as client,
        ):
            done = asyncio.Event()

            async def call() -> None:
                while not done.is_set():
                    await client.score([ITEM], timeout_seconds=20)

            calling = [asyncio.create_task(call()) for _ in range(8)]
            for _ in range(10):
                client_files(tmp_path, authority, authority.sign("client"))
                reached = servicer.calls + 40
                while servicer.calls < reached and not any(task.done() for task in calling):
                    await asyncio.sleep(0.01)
            done.set()
            await asyncio.gather(*calling)
            assert isinstance(client._opened, CredentialChannel)
            while client._opened._draining:
                await asyncio.sleep(0)

    run(scenario())


def test_a_call_that_waits_for_a_connection_takes_up_files_that_are_replaced_meanwhile(tmp_path: Path) -> None:
    wrong, right = Authority("wrong"), Authority("right")
    files = client_files(tmp_path, wrong)

    async def scenario() -> None:
        identity = Identity(right, right.sign("service"))
        async with (
            serving_tls(identity, ScriptedReward(answer).add, visitors=Visitors()) as target,
            RewardClient(target, tls=files) as client,
        ):
            client._has_answered = True
            call = asyncio.create_task(client.score([ITEM], timeout_seconds=30))
            waiting = asyncio.Event()
            comes_back = client._comes_back

            async def note(give_up: float, pause: float) -> bool:
                waiting.set()
                return await comes_back(give_up, pause)

            client._comes_back = note  # type: ignore[method-assign]
            await waiting.wait()
            await asyncio.sleep(tether.rotation.LOOK_SECONDS + 0.5)  # until it waits for a connection of the old files
            client_files(tmp_path, right)
            assert (await call).scores[0].score == 14.0

    run(scenario())


def test_the_probe_of_a_breaker_shows_the_credentials(tmp_path: Path) -> None:
    authority = Authority()
    files = client_files(tmp_path, authority, authority.sign("client"))
    visitors = Visitors(SECRET)

    async def scenario() -> None:
        identity = Identity(authority, authority.sign("service"), mutual=True)
        states = aio.HealthServicer()
        await states.set("", health_pb2.HealthCheckResponse.SERVING)

        def add(server: grpc.aio.Server) -> None:
            health_pb2_grpc.add_HealthServicer_to_server(states, server)

        async with (
            serving_tls(identity, add, visitors=visitors) as target,
            RewardClient(target, token=SECRET, tls=files, breaker=True) as client,
            RewardClient(target, token="wrong", tls=files) as refused,
        ):
            assert await client.is_serving() and await client.answers()
            assert not await refused.is_serving()

    run(scenario())
    assert visitors.tokens("Check") == {f"Bearer {SECRET}", "Bearer wrong"}


def test_a_token_for_this_machine_goes_through_no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with serving_tls(None, ScriptedReward(answer).add, visitors=Visitors()) as target:
            for name in ("http_proxy", "grpc_proxy", "https_proxy"):
                monkeypatch.setenv(name, "http://127.0.0.1:1")
            for name in ("no_proxy", "no_grpc_proxy", "NO_PROXY"):
                monkeypatch.delenv(name, raising=False)
            async with RewardClient(target, token=SECRET, retries=False) as client:
                await client.score([ITEM])
            async with RewardClient(target, retries=False) as client:
                with pytest.raises(UnavailableError):  # the control: without a token the proxy is asked
                    await client.score([ITEM])

    run(scenario())
