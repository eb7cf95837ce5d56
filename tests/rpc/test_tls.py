"""Transport security: who gets a connection, and certificates that change while the service runs."""

from __future__ import annotations

import asyncio
import socket
import ssl
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Final

import grpc
import grpc.aio
import pytest

from tests.rpc.certificates import DAY, Authority, Pair, ServiceFiles, authority, service_files, trusting
from tests.rpc.runs_service import NUM_EVENTS, serving_runs, watch, who_am_i
from tests.rpc.serving import Served, run
from tests.rpc.test_access_table import reason_of
from tests.rpc.token_inputs import add_token, bearing
from tether.errors import InvalidArgumentError
from tether_services.runtime.reloading import Reloaded

EXPIRY: Final = "tether_tls_certificate_expiry_timestamp_seconds"
IDENTITY: Final = {"name": "trainer", "scopes": ["run.read"], "spiffe": "spiffe://prod/trainer"}


def service_pair(kind: str) -> Pair:
    """Return what a service shows."""
    made: dict[str, Callable[[], Pair]] = {
        "valid": authority().sign,
        "corrupted": lambda: authority().sign().corrupted(),
        "expired": lambda: authority().sign(ends=-DAY),
        "wrong CA": lambda: authority("another").sign(),
    }
    return made[kind]()


def caller_pair(kind: str) -> Pair | None:
    """Return what a caller shows."""
    uris = [IDENTITY["spiffe"]]
    made: dict[str, Callable[[], Pair | None]] = {
        "valid": lambda: authority().sign("trainer", uris=uris),  # type: ignore[arg-type]
        "none": lambda: None,
        "corrupted": lambda: authority().sign("trainer", uris=uris).corrupted(),  # type: ignore[arg-type]
        "expired": lambda: authority().sign("trainer", uris=uris, ends=-DAY),  # type: ignore[arg-type]
        "wrong CA": lambda: authority("another").sign("trainer", uris=uris),  # type: ignore[arg-type]
    }
    return made[kind]()


async def attempt(served: Served, credentials: grpc.ChannelCredentials | None, method: str) -> str:
    """Return OK, or the status code of a call on a new connection."""
    if credentials is None:
        channel = grpc.aio.insecure_channel(served.target)
    else:
        channel = grpc.aio.secure_channel(served.target, credentials)
    async with channel:
        try:
            if method == "unary":
                await who_am_i(channel)
            else:
                assert await watch(channel) == NUM_EVENTS
        except grpc.aio.AioRpcError as error:
            return error.code().name
    return "OK"


@pytest.mark.parametrize("method", ["unary", "stream"])
@pytest.mark.parametrize("kind", ["valid", "none", "corrupted", "expired", "wrong CA"])
def test_a_caller_talks_only_to_a_service_with_a_valid_certificate(tmp_path: Path, kind: str, method: str) -> None:
    security = {} if kind == "none" else {"tls": service_files(tmp_path, service_pair(kind)).settings()}

    async def scenario() -> str:
        async with serving_runs(**security) as served:
            return await attempt(served, trusting(), method)

    assert run(scenario()) == ("OK" if kind == "valid" else "UNAVAILABLE")


@pytest.mark.parametrize("method", ["unary", "stream"])
@pytest.mark.parametrize("kind", ["valid", "none", "corrupted", "expired", "wrong CA"])
def test_a_service_that_asks_for_certificates_talks_only_to_callers_with_a_valid_one(
    tmp_path: Path, kind: str, method: str
) -> None:
    tls = service_files(tmp_path).settings(client_root=authority().root)

    async def scenario() -> str:
        async with serving_runs(tls=tls, identities=[IDENTITY]) as served:
            assert await attempt(served, trusting(caller_pair("valid")), method) == "OK"
            return await attempt(served, trusting(caller_pair(kind)), method)

    assert run(scenario()) == ("OK" if kind == "valid" else "UNAVAILABLE")


def test_a_caller_without_transport_security_reaches_no_service_that_has_it(tmp_path: Path) -> None:
    async def scenario() -> str:
        async with serving_runs(tls=service_files(tmp_path).settings()) as served:
            return await attempt(served, None, "unary")

    assert run(scenario()) == "UNAVAILABLE"


@pytest.mark.parametrize(
    ("version", "outcomes"),
    [
        (ssl.TLSVersion.TLSv1_2, {"TLSv1.2"}),
        (ssl.TLSVersion.TLSv1_1, {"TLSV1_ALERT_PROTOCOL_VERSION", "UNEXPECTED_EOF_WHILE_READING"}),
    ],
)
def test_nothing_older_than_tls_1_2_is_spoken(tmp_path: Path, version: ssl.TLSVersion, outcomes: set[str]) -> None:
    async def scenario() -> str:
        async with serving_runs(tls=service_files(tmp_path).settings()) as served:
            return await asyncio.to_thread(handshake, served.target, version)

    assert run(scenario()) in outcomes


def handshake(target: str, version: ssl.TLSVersion) -> str:
    """Return the version that was agreed on, or why the other side refused."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_ciphers("ALL:@SECLEVEL=0")  # else this side would refuse, and nothing be learnt of the other
    context.set_alpn_protocols(["h2"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        context.minimum_version = context.maximum_version = version
    host, port = target.split(":")
    with socket.create_connection((host, int(port)), timeout=5) as plain:
        try:
            with context.wrap_socket(plain) as secure:
                return str(secure.version())
        except ssl.SSLError as error:
            return error.reason


async def shown(target: str) -> str:
    """Return the certificate that a service shows on a new connection."""
    host, port = target.split(":")
    return await asyncio.to_thread(ssl.get_server_certificate, (host, int(port)), timeout=5)


async def settle() -> None:
    """Let files become old enough that their times can be trusted; the outcome does not depend on it."""
    await asyncio.sleep(0.15)


async def rotate(served: Served, files: ServiceFiles) -> str:
    """Replace an expired pair by a valid one and return how a call on a new connection ends."""
    assert await attempt(served, trusting(), "unary") == "UNAVAILABLE"
    await settle()
    files.write(authority().sign())
    return await attempt(served, trusting(), "unary")


def test_an_expired_certificate_is_replaced_without_a_restart(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = service_files(tmp_path, service_pair("expired"))

    async def scenario() -> tuple[str, float, float]:
        async with serving_runs(tls=files.settings()) as served:
            before = served.value(EXPIRY)
            return await rotate(served, files), before, served.value(EXPIRY)

    outcome, before, after = run(scenario())
    assert outcome == "OK"
    assert after - before == pytest.approx(2 * DAY.total_seconds(), abs=60)
    assert "the certificate of the service has expired" in caplog.text


def test_a_service_that_never_looks_at_its_files_again_shows_the_expired_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control of the test above."""
    monkeypatch.setattr(Reloaded, "refresh", lambda self: self.value)
    files = service_files(tmp_path, service_pair("expired"))

    async def scenario() -> str:
        async with serving_runs(tls=files.settings()) as served:
            return await rotate(served, files)

    assert run(scenario()) == "UNAVAILABLE"


def test_certificates_are_rotated_under_load_and_no_call_fails(tmp_path: Path) -> None:
    """Every 0.5 s a new pair, each file on its own; calls on one old channel and on a new one each time."""
    files = service_files(tmp_path)

    async def rotating(served: Served, stop: asyncio.Event) -> None:
        for _ in range(8):
            pair, half_a_second = authority().sign(), asyncio.create_task(asyncio.sleep(0.5))
            (tmp_path / "service.pem").write_bytes(pair.chain)  # in place, so that halves can be seen as well
            await asyncio.sleep(0.01)
            (tmp_path / "service.key").write_bytes(pair.key)
            while await shown(served.target) != pair.chain.decode():
                await asyncio.sleep(0.01)
            await half_a_second
        stop.set()

    async def calling(served: Served, stop: asyncio.Event) -> int:
        count = 0
        while not stop.is_set():
            async with grpc.aio.secure_channel(served.target, trusting()) as channel:
                assert await who_am_i(channel) == "anonymous"
                assert await watch(channel) == NUM_EVENTS
            count += 2
        return count

    async def calling_on(channel: grpc.aio.Channel, stop: asyncio.Event) -> int:
        count = 0
        while not stop.is_set():
            assert await who_am_i(channel) == "anonymous"
            await asyncio.sleep(0.005)
            count += 1
        return count

    async def scenario() -> list[int]:
        stop = asyncio.Event()
        async with (
            serving_runs(tls=files.settings()) as served,
            grpc.aio.secure_channel(served.target, trusting()) as channel,
        ):
            counts = asyncio.gather(*(calling(served, stop) for _ in range(3)), calling_on(channel, stop))
            await rotating(served, stop)
            return await counts

    assert min(run(scenario())) >= 10


def test_an_invalid_certificate_shuts_new_connections_out_and_leaves_old_ones_alone(tmp_path: Path) -> None:
    files = service_files(tmp_path)

    async def scenario() -> list[str]:
        async with (
            serving_runs(tls=files.settings()) as served,
            grpc.aio.secure_channel(served.target, trusting()) as old,
        ):
            await who_am_i(old)
            seen = []
            for kind in ("expired", "wrong CA", "valid"):
                files.write(service_pair(kind))
                seen.append(await attempt(served, trusting(), "unary"))
                assert await who_am_i(old) == "anonymous"
            return seen

    assert run(scenario()) == ["UNAVAILABLE", "UNAVAILABLE", "OK"]


@pytest.mark.parametrize("broken", ["key of another", "half a certificate", "no key", "not PEM", "pass phrase"])
def test_a_broken_pair_keeps_the_last_good_one_and_says_so(
    tmp_path: Path, broken: str, caplog: pytest.LogCaptureFixture
) -> None:
    files, pair = service_files(tmp_path), authority().sign()
    locked = b"-----BEGIN ENCRYPTED PRIVATE KEY-----\nMAAA\n-----END ENCRYPTED PRIVATE KEY-----\n"
    changes: dict[str, Callable[[], object]] = {
        "key of another": lambda: files.write(Pair(pair.chain, authority().sign().key)),
        "half a certificate": lambda: files.write(Pair(pair.chain + pair.chain[:300], pair.key)),
        "no key": lambda: (tmp_path / "service.key").unlink(),
        "not PEM": lambda: files.write(Pair(b"\x00" * 100, pair.key)),
        "pass phrase": lambda: files.write(Pair(pair.chain, locked)),
    }

    async def scenario() -> None:
        async with serving_runs(tls=files.settings()) as served:
            before = await shown(served.target)
            changes[broken]()
            assert await shown(served.target) == before
            assert await attempt(served, trusting(), "unary") == "OK"
            assert served.value("tether_credentials_stale", file="tls") == 1
            files.write(pair)
            assert await shown(served.target) == pair.chain.decode()
            assert served.value("tether_credentials_stale", file="tls") == 0

    run(scenario())
    assert caplog.text.count("credentials not reloaded") >= 1


@pytest.mark.parametrize("broken", ["key of another", "missing", "not PEM", "roots"])
def test_a_service_does_not_start_with_a_broken_pair(tmp_path: Path, broken: str) -> None:
    files = service_files(tmp_path)
    settings = files.settings(client_root=b"nothing" if broken == "roots" else None)
    if broken == "key of another":
        files.write(Pair(authority().sign().chain, authority().sign().key))
    elif broken == "missing":
        (tmp_path / "service.pem").unlink()
    elif broken == "not PEM":
        files.write(Pair(b"nothing", b"nothing"))

    async def scenario() -> None:
        async with serving_runs(tls=settings, tokens_file=str(tmp_path / "tokens.toml")):
            raise AssertionError("it started")

    add_token(tmp_path / "tokens.toml")
    with pytest.raises(InvalidArgumentError) as caught:
        run(scenario())
    assert caught.value.violations[0].field.startswith("tls.")


def test_roots_of_callers_are_read_again_too(tmp_path: Path) -> None:
    fresh = Authority("fresh")
    files = service_files(tmp_path)
    tls = files.settings(client_root=authority().root)
    caller = fresh.sign("trainer", uris=["spiffe://prod/trainer"])

    async def scenario() -> tuple[str, str]:
        async with serving_runs(tls=tls, identities=[IDENTITY]) as served:
            before = await attempt(served, trusting(caller), "unary")
            files.settings(client_root=authority().root + fresh.root)
            return before, await attempt(served, trusting(caller), "unary")

    assert run(scenario()) == ("UNAVAILABLE", "OK")


CALLERS: Final = [
    {"name": "trainer", "scopes": ["run.read"], "spiffe": "spiffe://prod/trainer"},
    {"name": "teams", "scopes": ["run.read"], "spiffe": "spiffe://prod/teams/"},
    {"name": "team-a", "scopes": ["run.read"], "spiffe": "spiffe://prod/teams/a/"},
    {"name": "scorer", "scopes": ["score"], "spiffe": "spiffe://prod/scorer"},
    {"name": "laptop", "scopes": ["run.read"], "common_name": "laptop"},
]


@pytest.mark.parametrize(
    ("common_name", "uris", "expected"),
    [
        ("", ["spiffe://prod/trainer"], "trainer"),
        ("", ["spiffe://prod/trainer2"], "CERTIFICATE_UNKNOWN"),
        ("", ["spiffe://other/trainer"], "CERTIFICATE_UNKNOWN"),
        ("", ["spiffe://prod/teams/b"], "teams"),
        ("", ["spiffe://prod/teams/a/worker"], "team-a"),
        ("", ["spiffe://prod/scorer"], "SCOPE_MISSING"),
        ("laptop", [], "laptop"),
        ("laptop", ["http://prod/x"], "laptop"),
        ("laptop", ["spiffe://prod/trainer"], "trainer"),
        ("laptop", ["spiffe://other/x"], "CERTIFICATE_UNKNOWN"),
        ("laptop", ["spiffe://prod/trainer", "spiffe://prod/scorer"], "TOKEN_MISSING"),
        ("laptop", ["http://prod/x", "spiffe://prod/trainer"], "TOKEN_MISSING"),
        ("laptop", ["SPIFFE://prod/trainer"], "CERTIFICATE_UNKNOWN"),
        ("spiffe://prod/trainer", [], "CERTIFICATE_UNKNOWN"),
        ("CN=laptop", [], "CERTIFICATE_UNKNOWN"),
        ("", [], "TOKEN_MISSING"),
    ],
)
def test_a_certificate_is_the_caller_that_the_operator_named(
    tmp_path: Path, common_name: str, uris: list[str], expected: str
) -> None:
    tls = service_files(tmp_path).settings(client_root=authority().root)
    pair = authority().sign(common_name, uris=uris)

    async def scenario() -> str:
        async with (
            serving_runs(tls=tls, identities=CALLERS) as served,
            grpc.aio.secure_channel(served.target, trusting(pair)) as channel,
        ):
            try:
                return await who_am_i(channel)
            except grpc.aio.AioRpcError as error:
                return reason_of(error)

    assert run(scenario()) == expected


def test_a_token_beside_a_certificate_decides_alone(tmp_path: Path) -> None:
    path = tmp_path / "tokens.toml"
    token = add_token(path, name="team-t", scopes=["run.read"])
    tls = service_files(tmp_path).settings(client_root=authority().root)
    known, unknown = (authority().sign("x", uris=[f"spiffe://prod/{name}"]) for name in ("trainer", "nobody"))

    async def scenario() -> None:
        async with serving_runs(tls=tls, identities=[IDENTITY], tokens_file=str(path)) as served:
            async with grpc.aio.secure_channel(served.target, trusting(known)) as channel:
                assert await who_am_i(channel) == "trainer"
                assert await who_am_i(channel, metadata=bearing(token)) == "team-t"
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await who_am_i(channel, metadata=bearing(token[:-4] + "aaaa"))
                assert reason_of(caught.value) == "TOKEN_UNKNOWN"
            async with grpc.aio.secure_channel(served.target, trusting(unknown)) as channel:
                assert await who_am_i(channel, metadata=bearing(token)) == "team-t"

    run(scenario())


def test_a_certificate_that_is_not_valid_yet_is_refused(tmp_path: Path) -> None:
    tls = service_files(tmp_path).settings(client_root=authority().root)
    pair = authority().sign("x", uris=["spiffe://prod/trainer"], begins=timedelta(hours=1))

    async def scenario() -> str:
        async with serving_runs(tls=tls, identities=[IDENTITY]) as served:
            return await attempt(served, trusting(pair), "unary")

    assert run(scenario()) == "UNAVAILABLE"
