"""A run's surroundings for tests: real services on a tiny random policy, a ledger, and sessions of runs."""

from __future__ import annotations

import functools
import inspect
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.rpc.run_services import (
    RunServices,
    run_services,
    small_run_toml,
    write_tiny_policy,
    write_word_prompts,
)
from tests.rpc.serving import run
from tether.adapter import AdapterClient
from tether_services.orchestrator.ledger import Ledger
from tether_services.orchestrator.loop import run_training
from tether_services.orchestrator.records import Attempt, RunState
from tether_services.orchestrator.run_config import parse_run_config
from tether_services.orchestrator.session import Session, open_session


@dataclass(frozen=True, slots=True)
class World:
    """Services, a ledger, and the files of runs."""

    services: RunServices
    ledger: Ledger
    model: Path
    prompts: Path

    def new_run(self, run_id: str = "demo", extra: str = "", *, ppo: str = "", trainer: str = "") -> Attempt:
        text = small_run_toml(self.model, self.prompts, extra, ppo=ppo, trainer=trainer)
        total = parse_run_config(text).total_steps
        return self.ledger.create_run(run_id, config_toml=text, total_steps=total)

    @asynccontextmanager
    async def session(self, attempt: Attempt, **changed: object) -> AsyncIterator[Session]:
        config = parse_run_config(self.ledger.get_run(attempt.run_id).config_toml)
        settings = self.services.settings.model_copy(update=changed)
        async with open_session(settings, config, self.ledger, attempt) as session:
            yield session

    @asynccontextmanager
    async def begin(self, run_id: str = "demo", extra: str = "", **tables: str) -> AsyncIterator[Session]:
        """Yield the session of a new run."""
        async with self.session(self.new_run(run_id, extra, **tables)) as session:
            yield session

    async def run_whole(self) -> Attempt:
        """Return a run that has come to its end without a fault."""
        async with self.begin("whole", "evaluation = false") as session:
            await run_training(session)
        self.ledger.finish(session.attempt, RunState.SUCCEEDED)
        return session.attempt

    def adapter_client(self) -> AdapterClient:
        return AdapterClient(self.services.settings.adapter_address)

    def weights(self, attempt: Attempt, version: int) -> bytes:
        return (attempt.directory / "adapters" / f"{version:06d}" / "adapter_model.safetensors").read_bytes()


@asynccontextmanager
async def world(folder: Path, *, one_by_one: bool = False) -> AsyncIterator[World]:
    model, prompts = write_tiny_policy(folder / "policy"), write_word_prompts(folder / "prompts.txt")
    async with run_services(model, folder / "runs", one_by_one=one_by_one) as services:
        yield World(services, Ledger(folder / "runs"), model, prompts)


def in_world(*, one_by_one: bool = False) -> Callable[[Callable[..., Coroutine[Any, Any, None]]], Callable[..., None]]:
    """Run a test in a world of its own, its first argument; it may ask for fixtures beside."""

    def decorate(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
        own = [p for name, p in inspect.signature(test).parameters.items() if name != "w"]
        has_folder = any(parameter.name == "tmp_path" for parameter in own)

        @functools.wraps(test)
        def call(tmp_path: Path, **given: Any) -> None:
            async def scenario() -> None:
                async with world(tmp_path, one_by_one=one_by_one) as w:
                    await test(w, **given | ({"tmp_path": tmp_path} if has_folder else {}))

            run(scenario(), timeout_seconds=120)

        folder = inspect.Parameter("tmp_path", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=Path)
        call.__signature__ = inspect.Signature([folder, *(p for p in own if p.name != "tmp_path")])  # type: ignore[attr-defined]
        return call

    return decorate


def names(attempt: Attempt, kind: str) -> list[str]:
    return sorted(path.name for path in (attempt.directory / kind).iterdir())
