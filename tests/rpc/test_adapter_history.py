"""The history that a generator keeps, for the checker of the reliability suite: started, proven, activated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.reliability.checker import check
from tests.rpc.adapter_files import activate, begin_request, fake_adapter, push, push_fakes, rollback_request
from tests.rpc.generator_serving import refusal, serve_generator, settings
from tests.rpc.serving import run
from tether_services.generator.verification import WEIGHTS_NAME
from tether_services.runtime import history

ADMIN = "127.0.0.1:0"


@pytest.fixture
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "history.jsonl"
    monkeypatch.setattr(history, "_path", str(path))
    monkeypatch.setattr(history, "_file", None)
    return path


def read_all(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def read(path: Path) -> list[dict[str, Any]]:
    """Return the lines that the checker judges; a push that has begun proves nothing."""
    return [line for line in read_all(path) if line["kind"] != "pushing"]


def short(line: dict[str, Any]) -> tuple[Any, ...]:
    """What a line says besides who and when."""
    return tuple(value for key, value in line.items() if key not in ("t", "pid", "generator"))


def sha(version: int) -> str:
    return fake_adapter(version).sha256


def test_what_is_proven_and_activated_is_recorded_in_that_order(recorded: Path) -> None:
    async def scenario() -> None:
        async with serve_generator() as serving:
            await push_fakes(serving.adapters, "run-a", [1, 2])
            await activate(serving.adapters, "run-a", 2)
            await activate(serving.adapters, "run-a", 2)
            await serving.adapters.RollbackAdapter(rollback_request("run-a", 2, epoch=3), timeout=5)
            refused = begin_request(
                fake_adapter(3), "run-a", 3, epoch=3, probes=[*begin_request(fake_adapter(9), "run-a", 9).probes]
            )
            assert (await refusal(push(serving.adapters, refused, fake_adapter(3)))).reason == "PROOF_FAILED"

    run(scenario())
    begun = [short(line) for line in read_all(recorded) if line["kind"] == "pushing"]
    assert begun == [("pushing", "run-a", version) for version in (1, 2, 3)]
    lines = read(recorded)
    assert {line["generator"] for line in lines} == {ADMIN}
    assert [short(line) for line in lines] == [
        ("started",),
        ("proven", "run-a", 1, sha(1)),
        ("proven", "run-a", 2, sha(2)),
        ("activated", "run-a", 2, sha(2), 1),
        ("activated", "run-a", 1, sha(1), 3),
    ]
    assert not check(lines).violations


def test_after_a_restart_the_stored_versions_are_proven_before_the_active_one_is(
    recorded: Path, tmp_path: Path
) -> None:
    given = settings(adapters={"folder": tmp_path / "store"})

    async def scenario() -> None:
        async with serve_generator(given) as serving:
            await push_fakes(serving.adapters, "run-a", [1, 2])
            await activate(serving.adapters, "run-a", 2)
        before = len(read(recorded))
        async with serve_generator(given):
            pass
        again = read(recorded)[before:]
        assert [short(line) for line in again] == [
            ("started",),
            ("proven", "run-a", 1, sha(1)),
            ("proven", "run-a", 2, sha(2)),
            ("activated", "run-a", 2, sha(2)),
        ]

    run(scenario())
    assert not check(read(recorded)).violations


def test_what_was_active_and_is_missing_counts_as_active_once_it_is_pushed_again(
    recorded: Path, tmp_path: Path
) -> None:
    given = settings(adapters={"folder": tmp_path / "store"})

    async def scenario() -> None:
        async with serve_generator(given) as serving:
            await push_fakes(serving.adapters, "run-a", [1])
            await activate(serving.adapters, "run-a", 1)
        (folder,) = (tmp_path / "store/versions/run-a").iterdir()
        (folder / WEIGHTS_NAME).write_bytes(b"damaged")
        before = len(read(recorded))
        async with serve_generator(given) as serving:
            assert [short(line) for line in read(recorded)[before:]] == [("started",)]
            await push(serving.adapters, begin_request(fake_adapter(1), "run-a", 1, epoch=2), fake_adapter(1))
        assert [short(line) for line in read(recorded)[before:]] == [
            ("started",),
            ("proven", "run-a", 1, sha(1)),
            ("activated", "run-a", 1, sha(1), 2),
        ]

    run(scenario())
    assert not check(read(recorded)).violations


def test_nothing_is_recorded_unless_it_is_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(history, "_path", None)
    monkeypatch.chdir(tmp_path)

    async def scenario() -> None:
        async with serve_generator() as serving:
            await push_fakes(serving.adapters, "run-a", [1])

    run(scenario())
    assert not list(tmp_path.iterdir())
