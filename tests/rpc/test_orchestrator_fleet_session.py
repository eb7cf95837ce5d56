"""A run over two real generators: opened, checked, and with the same weights as a run over one."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.rpc.run_services import (
    generator_settings,
    run_services,
    small_run_toml,
    write_tiny_policy,
    write_word_prompts,
)
from tests.rpc.serving import Served, run, serving
from tether.errors import FailedPreconditionError
from tether_services.generator.service import GeneratorService
from tether_services.orchestrator.config import GeneratorAddress, OrchestratorSettings
from tether_services.orchestrator.ledger import Ledger
from tether_services.orchestrator.loop import run_training
from tether_services.orchestrator.records import RunState
from tether_services.orchestrator.run_config import parse_run_config
from tether_services.orchestrator.session import open_session


def address(served: Served) -> GeneratorAddress:
    return GeneratorAddress(address=served.target, adapter_address=f"127.0.0.1:{served.runner.bound_ports[1]}")


@asynccontextmanager
async def two_generators(folder: Path, second: Path) -> AsyncIterator[tuple[OrchestratorSettings, list[Served]]]:
    """Yield settings of a run over two generators, of which the second has a model of its own, and the generators."""
    given = generator_settings(second, batch={"mix_calls": False})
    async with (
        run_services(folder / "policy", folder / "runs", one_by_one=True) as services,
        serving(given, lambda registry: GeneratorService(given, registry)) as other,
    ):
        both = (address(services.generator), address(other))
        defaults = OrchestratorSettings()
        alone = {"generator_address": defaults.generator_address, "adapter_address": defaults.adapter_address}
        yield services.settings.model_copy(update={"generators": both, **alone}), [services.generator, other]


async def train(settings: OrchestratorSettings, folder: Path, run_id: str) -> bytes:
    """Train two steps and return the weights."""
    ledger = Ledger(folder / "runs")
    text = small_run_toml(folder / "policy", folder / "prompts.txt", "evaluation = false\n")
    text = text.replace("total_steps = 3", "total_steps = 2")
    attempt = ledger.create_run(run_id, config_toml=text, total_steps=2)
    async with open_session(settings, parse_run_config(text), ledger, attempt) as session:
        await run_training(session)
    ledger.finish(attempt, RunState.SUCCEEDED, error="")
    return (attempt.directory / "adapters" / "000002" / "adapter_model.safetensors").read_bytes()


def test_a_run_over_two_generators_has_the_weights_of_a_run_over_one(tmp_path: Path) -> None:
    write_word_prompts(tmp_path / "prompts.txt")
    policy = write_tiny_policy(tmp_path / "policy")

    async def scenario() -> None:
        async with two_generators(tmp_path, policy) as (settings, generators):
            shared = await train(settings, tmp_path, "shared")
            counts = [
                served.value("tether_generator_completions_total", finish_reason="stop")
                + served.value("tether_generator_completions_total", finish_reason="length")
                for served in generators
            ]
            assert counts == [8, 8]
            told = json.loads((tmp_path / "runs" / "shared" / "services.json").read_text())
            assert list(told["generators"]) == [served.target for served in generators]
            steps = Ledger(tmp_path / "runs").list_steps("shared")
            assert all(step.metrics["push_transfer_seconds"] > 0 for step in steps)
            first = settings.generators[0]
            alone = {"generator_address": first.address, "adapter_address": first.adapter_address, "generators": ()}
            assert await train(settings.model_copy(update=alone), tmp_path, "alone") == shared

    run(scenario(), timeout_seconds=120)


def test_each_generator_must_serve_the_base_of_the_trainer_and_the_error_names_the_one_that_does_not(
    tmp_path: Path,
) -> None:
    write_word_prompts(tmp_path / "prompts.txt")
    write_tiny_policy(tmp_path / "policy")
    other = write_tiny_policy(tmp_path / "other", seed=1)

    async def scenario() -> None:
        async with two_generators(tmp_path, other) as (settings, generators):
            with pytest.raises(FailedPreconditionError, match=f"generator at {generators[1].target}") as caught:
                await train(settings, tmp_path, "demo")
            assert caught.value.reason == "BASE_MISMATCH"

    run(scenario(), timeout_seconds=120)
