"""`tether model` against a real reward service in a thread of its own."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.rpc.certificates import authority, service_files
from tests.rpc.reward_model_serving import fake_model, serve_rewards, store_model
from tests.rpc.scripted_server import in_thread
from tests.rpc.token_inputs import add_token
from tether.reward import ScoreItem
from tether_services.cli.main import main

Tether = Callable[..., int]


@pytest.fixture
def tether(tmp_path: Path) -> Iterator[Tether]:
    """Run the command against a service with m@1, m@2 in its store, and a cache."""
    store_model(tmp_path, "m", "2")
    started, stop = threading.Event(), threading.Event()
    addresses: list[str] = []

    async def serve() -> None:
        values = {"models": [fake_model("m", "1")], "model_store": str(tmp_path), "cache": {"max_items": 10}}
        async with serve_rewards(**values) as rewards:
            for _ in range(2):
                await rewards.reward.score([ScoreItem("p", "r")])
            addresses.append(rewards.admin_target)
            started.set()
            await asyncio.to_thread(stop.wait)

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    try:
        assert started.wait(20)
        yield lambda action, *words: main(["model", action, *words, "--address", addresses[0], "--timeout", "20"])
    finally:
        stop.set()
        thread.join()


def test_a_version_is_loaded_compared_switched_to_and_the_old_one_unloaded(
    tether: Tether, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tether("load", "m@2") == 0
    sha256 = capsys.readouterr().out.strip()
    assert len(sha256) == 64
    assert tether("load", "m@2", "--sha256", sha256) == 0
    assert tether("shadow", "m@2", "--fraction", "0.5") == 0
    assert "m@2 beside m@1 on 50 % of the calls" in capsys.readouterr().out
    assert tether("list") == 0
    heading, first, second, cache, shadow = capsys.readouterr().out.splitlines()
    assert heading.split()[:3] == ["model", "state", "engine"]
    assert first.split()[:4] == ["*", "m@1", "serving", "fake"]
    assert second.split()[:3] == ["m@2", "warm", "fake"] and sha256[:12] in second
    assert "1 of 10 scores" in cache and "50.0 % of 2 items found" in cache
    assert shadow.startswith("shadow: m@2")
    assert tether("shadow", "--clear") == 0
    assert capsys.readouterr().out.startswith("cleared; at last shadow: m@2")
    assert tether("shadow", "--clear") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "there was no shadow"
    assert tether("set-default", "m@2") == 0
    assert "m@2 is the default; m@1 was before" in capsys.readouterr().err
    assert tether("set-default", "m@1", "--name-only") == 0
    assert tether("set-default", "m@2", "--expected", "m@1") == 0
    assert tether("unload", "m@1") == 0
    capsys.readouterr()
    assert tether("list", "--json") == 0
    listed = json.loads(capsys.readouterr().out)
    assert [(model["name"], model["version"], model["state"]) for model in listed["models"]] == [("m", "2", "serving")]
    assert listed["cache"]["max_item_count"] == 10 and listed["shadow"] is None


@pytest.mark.parametrize(
    ("words", "status", "text"),
    [
        (["load", "m"], 42, "'m' is not NAME@VERSION"),
        (["load", "m@3"], 1, "[VERSION_NOT_FOUND]"),
        (["load", "m@2", "--sha256", "0" * 64], 1, "[WRONG_SHA256]"),
        (["unload", "m@1"], 1, "[LAST_MODEL]"),
        (["set-default", "m@1", "--expected", "m"], 1, "expected_current"),
        (["set-default", "x@1", "--name-only"], 42, "no reward model 'x'"),
        (["shadow"], 42, "Give a candidate or --clear"),
        (["shadow", "m@1"], 1, "cannot be compared with itself"),
    ],
)
def test_what_is_refused_is_told_with_the_way_out(
    tether: Tether, capsys: pytest.CaptureFixture[str], words: list[str], status: int, text: str
) -> None:
    assert tether(*words) == status
    assert text in capsys.readouterr().err


@asynccontextmanager
async def secured_service(folder: Path) -> AsyncIterator[str]:
    """Serve with TLS and the tokens of an operator, who may switch models, and of a caller, who may score."""
    (folder / "ca.pem").write_bytes(authority().root)
    for name, scopes in (("operator", ("model.read", "model.write")), ("caller", ("score",))):
        (folder / f"{name}.token").write_text(add_token(folder / "tokens.toml", name=name, scopes=scopes))
    values = {"tls": service_files(folder).settings(), "tokens_file": str(folder / "tokens.toml")}
    async with serve_rewards(**values) as rewards:
        yield rewards.admin_target


def test_the_control_port_of_a_secured_service_is_reached_with_credentials(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with in_thread(lambda: secured_service(tmp_path)) as target:

        def listing(*words: str) -> int:
            return main(["model", "list", "--address", target, "--timeout", "10", *words])

        trusted = ("--ca-file", str(tmp_path / "ca.pem"))
        assert listing(*trusted, "--token-file", str(tmp_path / "operator.token")) == 0
        assert "m@1" in capsys.readouterr().out
        assert listing(*trusted, "--token-file", str(tmp_path / "caller.token")) == 1
        assert "SCOPE_MISSING" in capsys.readouterr().err
        assert listing(*trusted) == 1
        assert "TOKEN_MISSING" in capsys.readouterr().err
