"""A real reward service with a model store on loopback ports, in the process of the test."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from tests.rpc.serving import LOCAL, Served, serving
from tether.reward import RewardClient
from tether.reward_models import RewardModelClient
from tether_services.reward.config import RewardSettings
from tether_services.reward.service import RewardService


@dataclass(frozen=True)
class ServedRewards:
    """A running reward service and its clients; neither repeats a call that failed."""

    reward: RewardClient
    models: RewardModelClient
    service: RewardService
    served: Served
    admin_target: str

    async def states(self) -> dict[str, str]:
        """Return the state of everything that is held by "name@version", the default model first."""
        held = await self.models.list_loaded()
        return {f"{model.name}@{model.version}": model.state for model in held.models}

    async def default(self) -> str:
        """Return what an empty name selects."""
        return next(f"{m.name}@{m.version}" for m in (await self.models.list_loaded()).models if m.default_model)


def fake_model(name: str, version: str, **changes: Any) -> dict[str, Any]:
    """Return the settings of a model whose answers are those of `fake_score` with its version as salt."""
    component = {"name": "f", "engine": "fake", "salt": version} | changes
    return {"name": name, "version": version, "components": [component]}


def store_model(store: Path, model: str, label: str, /, **content: Any) -> Path:
    """Write a version into a store, by default a fake one with its version as salt, and return its folder."""
    folder = store / model / label
    folder.mkdir(parents=True)
    described = {"components": fake_model(model, label)["components"]} | content
    (folder / "model.toml").write_text(tomli_w.dumps(described), encoding="utf-8")
    return folder


def reward_settings(**values: Any) -> RewardSettings:
    """Settings of a reward service for a test: the fake model m@1 on free ports unless changed."""
    models = {} if {"engine", "model"} & set(values) else {"models": [fake_model("m", "1")]}
    return RewardSettings.model_validate({**LOCAL, "admin_address": "127.0.0.1:0", **models, **values})


@asynccontextmanager
async def serve_rewards(**values: Any) -> AsyncIterator[ServedRewards]:
    """Serve until the block ends."""
    settings = reward_settings(**values)
    services: list[RewardService] = []

    def build(registry: Any) -> RewardService:
        services.append(RewardService(settings, registry))
        return services[0]

    async with serving(settings, build) as served:
        admin_target = f"127.0.0.1:{served.runner.bound_ports[1]}"
        async with (
            RewardClient(served.target, timeout_seconds=20, retries=False) as reward,
            RewardModelClient(admin_target, timeout_seconds=20, retries=False) as models,
        ):
            yield ServedRewards(reward, models, services[0], served, admin_target)
