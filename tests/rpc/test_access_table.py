"""Who may call what: every method of the contract, as every kind of caller, on the four real services."""

from __future__ import annotations

import asyncio
import importlib
import pkgutil
import secrets
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import grpc
import grpc.aio
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

import tether.v1
from tests.rpc.serving import LOCAL, run, serving
from tests.rpc.token_inputs import add_token, bearing
from tether_services.generator.config import GeneratorSettings
from tether_services.generator.service import GeneratorService
from tether_services.orchestrator.config import OrchestratorSettings
from tether_services.orchestrator.service import OrchestratorService
from tether_services.reference.config import ReferenceSettings
from tether_services.reference.service import ReferenceService
from tether_services.reward.config import RewardSettings
from tether_services.reward.service import RewardService
from tether_services.runtime.scopes import METHOD_SCOPES, SCOPES
from tether_services.runtime.settings import LISTENING

STATES: Final = ("no token", "wrong", "expired", "revoked", "right")
REFUSALS: Final = {
    "no token": "TOKEN_MISSING",
    "wrong": "TOKEN_UNKNOWN",
    "expired": "TOKEN_EXPIRED",
    "revoked": "TOKEN_REVOKED",
}
REFUSED: Final = ("UNAUTHENTICATED", "PERMISSION_DENIED")


@dataclass(frozen=True, slots=True)
class Method:
    """A method of the contract and where it is served."""

    name: str
    streams_requests: bool
    streams_responses: bool
    channel: grpc.aio.Channel


def contract() -> dict[str, Any]:
    """Return the descriptors of all methods, by full name."""
    found: dict[str, Any] = {}
    for module in pkgutil.iter_modules(tether.v1.__path__):
        if module.name.endswith("_pb2"):
            for service in importlib.import_module(f"tether.v1.{module.name}").DESCRIPTOR.services_by_name.values():
                found |= {f"/{service.full_name}/{method.name}": method for method in service.methods}
    return found


@asynccontextmanager
async def all_services(folder: Path, **security: Any) -> AsyncIterator[list[Method]]:
    """Serve the four services with fake engines and yield every method with a channel to its port."""
    common = {**LOCAL, **security}
    generator = GeneratorSettings.model_validate({**common, "admin_address": "127.0.0.1:0", "engine": "fake"})
    reward = RewardSettings.model_validate({**common, "admin_address": "127.0.0.1:0", "engine": "fake"})
    reference = ReferenceSettings.model_validate({**common, "engine": "fake"})
    away = {f"{name}_address": "127.0.0.1:1" for name in ("generator", "adapter", "reward", "reference")}
    orchestrator = OrchestratorSettings.model_validate({**common, **away, "state_dir": str(folder / "state")})
    async with AsyncExitStack() as stack:
        ports: dict[str, int] = {}
        for settings, build in (
            (generator, lambda registry: GeneratorService(generator, registry)),
            (reward, lambda registry: RewardService(reward, registry)),
            (reference, lambda registry: ReferenceService(reference, registry)),
            (orchestrator, lambda registry: OrchestratorService(orchestrator, registry)),
        ):
            served = await stack.enter_async_context(serving(settings, build))
            for port, number in zip(served.service.ports(), served.runner.bound_ports, strict=True):
                assert port.setting in LISTENING  # the addresses that are refused without protection
                ports |= dict.fromkeys(port.service_names, number)
        channels = {
            name: await stack.enter_async_context(grpc.aio.insecure_channel(f"127.0.0.1:{number}"))
            for name, number in ports.items()
        }
        yield [
            Method(name, method.client_streaming, method.server_streaming, channels[name.split("/")[1]])
            for name, method in contract().items()
        ]


async def outcome(method: Method, token: str | None) -> tuple[str, str]:
    """Call a method with an empty request and return the status code and the reason; "OK" and "" if it answers."""
    channel: Any = method.channel  # calls without serialisers, of which the stubs know nothing
    given: dict[str, Any] = {"metadata": bearing(token) if token is not None else (), "timeout": 20}
    try:
        if method.streams_requests:
            await channel.stream_unary(method.name)(iter([b""]), **given)
        elif method.streams_responses:
            async for _ in channel.unary_stream(method.name)(b"", **given):
                pass
        else:
            await channel.unary_unary(method.name)(b"", **given)
    except grpc.aio.AioRpcError as error:
        return error.code().name, reason_of(error)
    return "OK", ""


def reason_of(error: grpc.aio.AioRpcError) -> str:
    status = rpc_status.from_call(error)  # type: ignore[arg-type]
    info = error_details_pb2.ErrorInfo()
    return next((info.reason for packed in status.details if packed.Unpack(info)), "") if status else ""


def is_right(method: str, scope: str, state: str, seen: tuple[str, str]) -> bool:
    """Return whether a caller of that kind got what it should."""
    if state != "right":
        return seen == ("UNAUTHENTICATED", REFUSALS[state])
    if METHOD_SCOPES[method] != scope:
        return seen == ("PERMISSION_DENIED", "SCOPE_MISSING")
    return seen[0] not in (*REFUSED, "UNKNOWN", "INTERNAL", "UNIMPLEMENTED")


def make_tokens(path: Path) -> dict[tuple[str, str], str | None]:
    """Write a token of each scope in each state and return them by both."""
    made: dict[tuple[str, str], str | None] = {}
    for scope in SCOPES:
        right = add_token(path, name=scope, scopes=[scope])
        made |= {
            (scope, "no token"): None,
            (scope, "wrong"): right[:-43] + secrets.token_urlsafe(32),
            (scope, "expired"): add_token(path, name=scope, scopes=[scope], expired=True),
            (scope, "revoked"): add_token(path, name=scope, scopes=[scope], revoked=True),
            (scope, "right"): right,
        }
    return made


async def wrong_cells(folder: Path, tokens: dict[tuple[str, str], str | None], **security: Any) -> list[str]:
    """Return the cells of the table that are not as they should be."""
    wrong = []
    async with all_services(folder, **security) as methods:
        assert {method.name for method in methods} == set(METHOD_SCOPES)
        for method in methods:
            cells = list(tokens)
            seen = await asyncio.gather(*(outcome(method, tokens[cell]) for cell in cells))
            wrong += [
                f"{method.name} {scope} {state}: {got}"
                for (scope, state), got in zip(cells, seen, strict=True)
                if not is_right(method.name, scope, state, got)
            ]
    return wrong


def test_every_method_lets_in_its_own_scope_and_nobody_else(tmp_path: Path) -> None:
    path = tmp_path / "tokens.toml"
    tokens = make_tokens(path)
    assert len(tokens) == len(SCOPES) * len(STATES)
    assert run(wrong_cells(tmp_path, tokens, tokens_file=str(path))) == []


def test_the_table_notices_a_service_that_asks_for_no_token(tmp_path: Path) -> None:
    """The control: all cells but those of the right token with the right scope are wrong."""
    tokens = make_tokens(tmp_path / "tokens.toml")
    wrong = run(wrong_cells(tmp_path, tokens))
    assert len(wrong) == len(METHOD_SCOPES) * (len(tokens) - 1)


def test_a_scoring_token_reaches_no_method_that_controls_anything(tmp_path: Path) -> None:
    path = tmp_path / "tokens.toml"
    token = add_token(path, scopes=["score"])

    async def scenario() -> list[str]:
        async with all_services(tmp_path, tokens_file=str(path)) as methods:
            seen = {method.name: await outcome(method, token) for method in methods}
            return [name for name, (code, _) in seen.items() if code not in REFUSED]

    assert {name.split("/")[1] for name in run(scenario())} == {"tether.v1.RewardService"}


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ((), "TOKEN_MISSING"),
        ((("authorization", "Basic dGVhbTphYmM="),), "TOKEN_UNKNOWN"),
        ((("authorization", "Bearer "),), "TOKEN_UNKNOWN"),
        ((("authorization", "Bearer tether_0000000000000000_"),), "TOKEN_UNKNOWN"),
        ((("authorization", "Bearer " + "a" * 4000),), "TOKEN_UNKNOWN"),
        ((("token", "TOKEN"),), "TOKEN_MISSING"),
    ],
)
def test_what_is_no_token_is_refused(tmp_path: Path, metadata: tuple[tuple[str, str], ...], reason: str) -> None:
    path = tmp_path / "tokens.toml"
    add_token(path)
    settings = RewardSettings.model_validate(
        {**LOCAL, "admin_address": "127.0.0.1:0", "engine": "fake", "tokens_file": str(path)}
    )

    async def scenario() -> str:
        async with (
            serving(settings, lambda registry: RewardService(settings, registry)) as served,
            grpc.aio.insecure_channel(served.target) as channel,
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                send: Any = channel.unary_unary("/tether.v1.RewardService/ListRewardModels")
                await send(b"", timeout=5, metadata=metadata)
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
            labels = {"caller": "unknown", "reason": reason}
            assert served.value("tether_reward_refused_calls_total", **labels) == 1
            return reason_of(caught.value)

    assert run(scenario()) == reason


def test_two_tokens_in_one_call_are_none_for_nobody_knows_which_was_meant(tmp_path: Path) -> None:
    path = tmp_path / "tokens.toml"
    token = add_token(path)

    async def scenario() -> tuple[str, str]:
        async with all_services(tmp_path, tokens_file=str(path)) as methods:
            method = next(m for m in methods if m.name.endswith("ListRewardModels"))
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                send: Any = method.channel.unary_unary(method.name)
                await send(b"", timeout=5, metadata=(*bearing(token), *bearing(token)))
            return caught.value.code().name, reason_of(caught.value)

    assert run(scenario()) == ("UNAUTHENTICATED", "TOKEN_UNKNOWN")
