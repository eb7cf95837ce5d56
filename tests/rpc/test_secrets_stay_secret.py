"""Canaries: no part of a token, a key or a request comes out in a log, a metric or an error."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from tests.rpc.certificates import Pair, authority, service_files
from tests.rpc.runs_service import serving_runs, who_am_i
from tests.rpc.serving import run
from tests.rpc.token_inputs import add_token, bearing, revoke_all
from tether.errors import InvalidArgumentError
from tether_services.runtime.logging import JsonFormatter

CANARY = "CanaryCanaryCanary"


def written(caplog: pytest.LogCaptureFixture) -> str:
    """Return all lines of the log as they are written."""
    formatter = JsonFormatter("x")
    return "\n".join(formatter.format(record) for record in caplog.records)


def test_tokens_come_out_nowhere(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    path = tmp_path / "tokens.toml"
    made = [
        add_token(path, name="team-a", scopes=["run.read"]),
        add_token(path, name="team-b", scopes=["score"]),
        add_token(path, name="team-c", scopes=["run.read"], expired=True),
        add_token(path, name="team-d", scopes=["run.read"], requests_per_second=0.01),
    ]
    stored = [line.split('"')[1] for line in path.read_text().splitlines() if line.startswith("sha256")]
    sent = [*made, made[3], made[0][:-18] + CANARY, f"tether_{CANARY}", CANARY]
    errors: list[str] = []

    async def scenario() -> str:
        async with serving_runs(tokens_file=str(path)) as served:
            async with grpc.aio.insecure_channel(served.target) as channel:
                extra: Any = (("x-canary", CANARY), ("authorization-bin", CANARY.encode()))
                for token in sent:
                    try:
                        await who_am_i(channel, metadata=(*bearing(token), *extra))
                    except grpc.aio.AioRpcError as error:
                        errors.append(repr(error) + str(error.trailing_metadata()))
                revoke_all(path)
            return served.metrics()

    metrics = run(scenario())
    assert len(errors) == len(sent) - 2
    text = metrics + written(caplog) + "".join(errors)
    assert "team-b" in text, "nothing was written at all"
    for secret in (CANARY, *stored, *(token[24:] for token in made)):
        assert secret not in text


def test_a_log_line_cannot_be_forged_by_a_caller(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "tokens.toml"
    add_token(path)

    async def scenario() -> None:
        async with serving_runs(tokens_file=str(path)) as served, grpc.aio.insecure_channel(served.target) as channel:
            for method in ("/tether.v1.OrchestratorService/GetRun\x1b[2J", '/x"} 1\ntether_forged 1/y'):
                send: Any = channel.unary_unary(method)
                with pytest.raises(grpc.aio.AioRpcError):
                    await send(b"", timeout=5)
            assert "forged" not in served.metrics()

    run(scenario())
    lines = written(caplog).splitlines()
    assert len(lines) == len(caplog.records)
    assert all(json.loads(line) and "\x1b" not in line for line in lines)


@pytest.mark.parametrize("where", ["certificate", "key"])
def test_a_broken_key_file_is_not_quoted(tmp_path: Path, where: str, caplog: pytest.LogCaptureFixture) -> None:
    pair = authority().sign()
    files = service_files(tmp_path)
    broken = pair.key.replace(b"\n", CANARY.encode() + b"\n", 2)

    async def scenario() -> str:
        async with serving_runs(tls=files.settings()) as served:
            files.write(Pair(broken, pair.key) if where == "certificate" else Pair(pair.chain, broken))
            await served.runner.health.ready()
            with pytest.raises(InvalidArgumentError) as caught:
                async with serving_runs(tls=files.settings()):
                    pass
            return str(caught.value) + served.metrics()

    text = run(scenario()) + written(caplog)
    assert CANARY not in text and "PRIVATE KEY" not in text
