"""How a service starts: open on loopback only, and with ports for those who have no credentials."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from tests.rpc.certificates import authority, service_files, trusting
from tests.rpc.runs_service import serving_runs, who_am_i
from tests.rpc.serving import LOCAL, run, serving
from tests.rpc.token_inputs import add_token, bearing, revoke_all
from tether.errors import InvalidArgumentError
from tether.v1 import reward_pb2, reward_pb2_grpc
from tether_services.generator.config import GeneratorSettings
from tether_services.local.deployment import LocalOptions, _choose_addresses, service_settings
from tether_services.reward.config import RewardSettings
from tether_services.reward.service import RewardService
from tether_services.runtime import access, probe
from tether_services.runtime.access import describe_security
from tether_services.runtime.server import Port, shows_reflection
from tether_services.runtime.settings import CONFIG_ERROR_EXIT_CODE, ServerSettings, validate

EVERYWHERE = "0.0.0.0:0"
IDENTITY = {"name": "trainer", "scopes": ["run.read"], "spiffe": "spiffe://prod/trainer"}


def settings(**changes: Any) -> ServerSettings:
    return validate(ServerSettings, {**LOCAL, **changes})


def test_another_address_than_loopback_needs_both_authentication_and_transport_security(tmp_path: Path) -> None:
    tls = service_files(tmp_path).settings(client_root=authority().root)
    plain = {key: path for key, path in tls.items() if key != "client_ca_file"}
    tokens = str(tmp_path / "tokens.toml")
    protections: tuple[tuple[dict[str, Any], tuple[str, ...]], ...] = (
        ({}, ("authentication", "transport security")),
        ({"tokens_file": tokens}, ("transport security",)),
        ({"tls": plain}, ("authentication",)),
        ({"tls": plain, "tokens_file": tokens}, ()),
        ({"tls": tls, "identities": [IDENTITY]}, ()),
    )
    for given, lacking in protections:
        everywhere = settings(**given, address=EVERYWHERE)
        assert everywhere.lacking_protections == lacking
        if not lacking:
            everywhere.check_addresses()
            continue
        with pytest.raises(InvalidArgumentError, match=" and no ".join(lacking)) as caught:
            everywhere.check_addresses()
        assert caught.value.reason == "INSECURE_ADDRESS"
        settings(**given, address=EVERYWHERE, insecure=True).check_addresses()


@pytest.mark.parametrize("name", ["address", "metrics_address", "http_address", "health_address"])
def test_a_malformed_address_is_refused_whatever_the_protection(name: str) -> None:
    unusable = {"address": [""], "metrics_address": ["", "unix:/tmp/x"], "http_address": ["unix:/tmp/x"]}
    for malformed in ("nowhere", "127.0.0.1:99999", *unusable.get(name, [])):
        with pytest.raises(InvalidArgumentError) as caught:
            settings(insecure=True, **{name: malformed}).check_addresses()
        assert caught.value.violations[0].field == name


def test_an_address_may_be_left_empty_where_that_is_its_default_and_nowhere_else() -> None:
    reward = {**LOCAL, "engine": "fake"}
    RewardSettings.model_validate({**reward, "admin_address": "", "http_address": ""}).check_addresses()
    generator = GeneratorSettings.model_validate({**reward, "admin_address": ""})
    with pytest.raises(InvalidArgumentError) as caught:
        generator.check_addresses()
    assert caught.value.violations[0].field == "admin_address"


def test_a_port_is_checked_when_it_is_opened_whichever_setting_it_comes_from() -> None:
    given = RewardSettings.model_validate({**LOCAL, "engine": "fake"})

    class Elsewhere(RewardService):
        def ports(self) -> list[Port]:
            return [replace(port, setting="bulk_address", address=EVERYWHERE) for port in super().ports()]

    async def scenario() -> None:
        async with serving(given, lambda registry: Elsewhere(given, registry)):
            raise AssertionError("it started")

    with pytest.raises(InvalidArgumentError) as caught:
        run(scenario())
    assert (caught.value.reason, caught.value.violations[0].field) == ("INSECURE_ADDRESS", "bulk_address")


@pytest.mark.parametrize("name", ["address", "metrics_address", "http_address"])
def test_a_service_without_protection_does_not_start_where_others_can_reach_it(name: str) -> None:
    async def scenario() -> None:
        async with serving_runs(**{name: EVERYWHERE}):
            raise AssertionError("it started")

    with pytest.raises(InvalidArgumentError) as caught:
        run(scenario())
    assert caught.value.violations[0].field == name


def test_an_open_service_says_so_when_it_starts(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "tether_services")

    async def scenario() -> None:
        async with serving_runs() as served, grpc.aio.insecure_channel(served.target) as channel:
            assert await who_am_i(channel) == "anonymous"

    run(scenario())
    (listening,) = [record.__dict__["fields"] for record in caplog.records if record.message == "listening"]
    assert (listening["auth"], listening["transport"]) == ("none: everybody may call", "plain")


def test_the_log_says_how_a_service_is_protected(tmp_path: Path) -> None:
    tls = service_files(tmp_path).settings(client_root=authority().root)
    given = settings(tls=tls, identities=[IDENTITY], tokens_file=str(tmp_path / "t"))
    assert describe_security(given) == {"auth": "tokens or certificates", "transport": "mutual TLS"}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"identities": [IDENTITY]}, "tls.client_ca_file"),
        ({"tls": {"certificate_file": "a", "key_file": "b", "client_ca_file": "c"}}, "lets nobody call"),
        ({"max_calls": 4, "reserved_calls": 4}, "reserved_calls"),
        ({"identities": [{**IDENTITY, "scopes": ["everything"]}]}, "scope"),
        ({"identities": [{**IDENTITY, "common_name": "x"}]}, "exactly one"),
        ({"identities": [{**IDENTITY, "spiffe": "spiffe://prod"}]}, "pattern"),
        ({"identities": [{**IDENTITY, "spiffe": "spiffe://"}]}, "pattern"),
        ({"identities": [{**IDENTITY, "weihgt": 2}]}, "unknown key"),
        ({"tls": {"certificate_file": "a"}}, "required"),
    ],
)
def test_settings_that_would_be_ignored_or_shut_everybody_out_are_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        settings(**changes)
    assert any(named in violation.description for violation in caught.value.violations)


def test_a_token_and_an_identity_of_one_name_must_agree_on_its_limits(tmp_path: Path) -> None:
    path = tmp_path / "tokens.toml"
    add_token(path, name="trainer", requests_per_second=1.0)
    tls = service_files(tmp_path).settings(client_root=authority().root)

    async def scenario() -> None:
        async with serving_runs(tls=tls, identities=[IDENTITY], tokens_file=str(path)):
            raise AssertionError("it started")

    with pytest.raises(InvalidArgumentError, match="'trainer'"):
        run(scenario())


@pytest.mark.parametrize("more", [(), ("--dry-run",)], ids=["start", "dry run"])
def test_the_command_ends_with_the_status_of_a_bad_configuration(more: tuple[str, ...]) -> None:
    words = [sys.executable, "-m", "tether_services", "serve", "reward", *more, "--set", "engine=fake"]
    done = subprocess.run([*words, "--set", f"address={EVERYWHERE}"], capture_output=True, text=True, timeout=60)
    assert done.returncode == CONFIG_ERROR_EXIT_CODE
    assert "no authentication and no transport security" in done.stderr and "docs/security.md" in done.stderr


def test_reflection_is_shown_on_loopback_alone_unless_it_is_asked_for() -> None:
    assert shows_reflection(settings(), "127.0.0.1:1") and not shows_reflection(settings(), EVERYWHERE)
    assert shows_reflection(settings(reflection=True), EVERYWHERE)
    assert not shows_reflection(settings(reflection=False), "127.0.0.1:1")


def test_the_health_port_answers_probes_without_credentials_and_nothing_else(tmp_path: Path) -> None:
    tls = service_files(tmp_path).settings(client_root=authority().root)

    async def scenario() -> None:
        async with serving_runs(tls=tls, identities=[IDENTITY], health_address="127.0.0.1:0") as served:
            address = f"127.0.0.1:{served.runner.health_port}"
            assert await asyncio.to_thread(probe.main, [address, "tether.v1.OrchestratorService"]) == 0
            assert await asyncio.to_thread(probe.probe, served.target) == "UNAVAILABLE"
            async with grpc.aio.insecure_channel(address) as channel:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await who_am_i(channel)
                assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
            await served.runner.health.engine_failed()
            assert await asyncio.to_thread(probe.main, [address, "liveness"]) == 1

    run(scenario())


def test_the_probe_speaks_mutual_tls(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tls = service_files(tmp_path).settings(client_root=authority().root)
    own = authority().sign("kubelet")
    (tmp_path / "own.pem").write_bytes(own.chain)
    (tmp_path / "own.key").write_bytes(own.key)
    words = ["--ca-file", tls["client_ca_file"], "--server-name", "localhost"]
    words += ["--certificate-file", str(tmp_path / "own.pem"), "--key-file", str(tmp_path / "own.key")]

    async def scenario() -> tuple[int, int]:
        async with serving_runs(tls=tls, identities=[IDENTITY]) as served:
            with_own = await asyncio.to_thread(probe.main, [served.target, *words])
            return with_own, await asyncio.to_thread(probe.main, [served.target, *words[:4]])

    assert run(scenario()) == (0, 1)
    assert probe.main([]) == probe.main(["a:1", "--key-file", "x"]) == 2
    assert "go together" in capsys.readouterr().err


def test_a_local_deployment_watches_services_with_transport_security_at_their_health_ports() -> None:
    tls = {"certificate_file": "a", "key_file": "b"}
    options = LocalOptions(engine="fake", settings={"reward": {"tls": tls}, "reference": {"tls": tls}})
    chosen = service_settings(options, _choose_addresses(usual=False))
    ports = [chosen[name]["health_address"] for name in ("reward", "reference")]
    assert len(set(ports)) == 2 and all(port.startswith("127.0.0.1:") for port in ports)
    assert "health_address" not in chosen["generator"]


async def name_or_code(channel: grpc.aio.Channel, token: str) -> str:
    """Return as whom a token calls, or the status code."""
    try:
        return await who_am_i(channel, metadata=bearing(token))
    except grpc.aio.AioRpcError as error:
        return error.code().name


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    for _ in range(500):
        if await condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("the condition never came true")


def test_a_token_works_and_is_revoked_within_a_second_or_so(tmp_path: Path) -> None:
    path = tmp_path / "tokens.toml"
    add_token(path, name="team-a", scopes=["run.read"])

    async def scenario() -> float:
        async with (
            serving_runs(tokens_file=str(path)) as served,
            grpc.aio.insecure_channel(served.target) as channel,
        ):
            token = add_token(path, name="team-b", scopes=["run.read"])
            await until(lambda: _is(name_or_code(channel, token), "team-b"))
            started = time.monotonic()
            revoke_all(path)
            await until(lambda: _is(name_or_code(channel, token), "UNAUTHENTICATED"))
            return time.monotonic() - started

    assert run(scenario()) < 10  # a busy machine included


async def _is(found: Awaitable[str], expected: str) -> bool:
    return await found == expected


def test_a_broken_tokens_file_opens_nothing_and_shuts_nobody_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(access, "RELOAD_SECONDS", 0.01)
    path = tmp_path / "tokens.toml"
    token = add_token(path, name="team-a", scopes=["run.read"])
    good = path.read_text()

    async def scenario() -> None:
        async with (
            serving_runs(tokens_file=str(path)) as served,
            grpc.aio.insecure_channel(served.target) as channel,
        ):

            async def is_stale(expected: float) -> bool:
                return served.value("tether_credentials_stale", file="tokens") == expected

            for broken in ("", "version = 3", "[[tokens", good.replace("sha256", "sha257"), None):
                if broken is None:
                    path.unlink()
                else:
                    path.write_text(broken)
                await until(lambda: is_stale(1))
                assert await name_or_code(channel, token) == "team-a"
                assert await name_or_code(channel, "tether_0") == "UNAUTHENTICATED"
                path.write_text(good)
                await until(lambda: is_stale(0))
                assert await name_or_code(channel, token) == "team-a"

    run(scenario())


@pytest.mark.parametrize(
    ("num_bytes", "code"), [(8_000, "OK"), (17_000, "RESOURCE_EXHAUSTED"), (60_000, "RESOURCE_EXHAUSTED")]
)
def test_metadata_is_bounded(num_bytes: int, code: str) -> None:
    async def scenario() -> str:
        async with serving_runs() as served, grpc.aio.insecure_channel(served.target) as channel:
            try:
                await who_am_i(channel, metadata=(("x", "a" * num_bytes),))
            except grpc.aio.AioRpcError as error:
                return error.code().name
            return "OK"

    assert run(scenario()) == code


@pytest.mark.parametrize(
    ("changes", "num_chars", "code"),
    [
        ({}, 400_000, "OK"),
        ({}, 2_200_000, "RESOURCE_EXHAUSTED"),
        ({"max_message_bytes": 300_000}, 400_000, "RESOURCE_EXHAUSTED"),
        ({"max_message_bytes": 4 * 2**20}, 2_200_000, "OK"),
    ],
)
def test_the_size_of_requests_is_a_setting(changes: dict[str, int], num_chars: int, code: str) -> None:
    given = RewardSettings.model_validate(
        {**LOCAL, "admin_address": "127.0.0.1:0", "engine": "fake", "max_text_chars": 10**7, **changes}
    )
    item = reward_pb2.ScoreItem(prompt="p", response="r" * num_chars)

    async def scenario() -> str:
        async with (
            serving(given, lambda registry: RewardService(given, registry)) as served,
            grpc.aio.insecure_channel(served.target) as channel,
        ):
            stub = reward_pb2_grpc.RewardServiceStub(channel)
            try:
                await stub.Score(reward_pb2.ScoreRequest(items=[item]), timeout=20)
            except grpc.aio.AioRpcError as error:
                return error.code().name
            return "OK"

    assert run(scenario()) == code


def test_a_service_with_transport_security_is_reached_with_it(tmp_path: Path) -> None:
    path = tmp_path / "tokens.toml"
    token = add_token(path, scopes=["run.read"])

    async def scenario() -> str:
        async with (
            serving_runs(tls=service_files(tmp_path).settings(), tokens_file=str(path)) as served,
            grpc.aio.secure_channel(served.target, trusting()) as channel,
        ):
            return await who_am_i(channel, metadata=bearing(token))

    assert run(scenario()) == "team-a"
