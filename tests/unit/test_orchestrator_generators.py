"""The settings of several generators, what is shown of them, and how they are called."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from pydantic import ValidationError

from tether.errors import InvalidArgumentError, UnavailableError
from tether_services.orchestrator.config import ENV_PREFIX, GeneratorAddress, OrchestratorSettings
from tether_services.orchestrator.metrics import OrchestratorMetrics
from tether_services.orchestrator.publishing import PushFigures
from tether_services.orchestrator.remote import (
    LAGGING_FILE,
    ONE_OF_SEVERAL_RETRIES,
    SERVICE_NAMES,
    BreakerStates,
    open_services,
)
from tether_services.orchestrator.run_files import RunFiles
from tether_services.orchestrator.session import show_lagging
from tether_services.orchestrator.worker_states import read_lagging
from tether_services.runtime.settings import describe_settings, load_settings

TOML = """
laggards = "leave_out"
[[generators]]
address = "a:1"
adapter_address = "a:2"
[[generators]]
address = "b:1"
adapter_address = "b:2"
"""
INLINE = '[{address = "a:1", adapter_address = "a:2"}, {address = "b:1", adapter_address = "b:2"}]'
TWO = (GeneratorAddress(address="a:1", adapter_address="a:2"), GeneratorAddress(address="b:1", adapter_address="b:2"))


def load(
    text: str = "", *, environ: dict[str, str] | None = None, folder: Path, **overrides: str
) -> OrchestratorSettings:
    config = folder / "orchestrator.toml"
    config.write_text(text)
    return load_settings(
        OrchestratorSettings,
        env_prefix=ENV_PREFIX,
        config=config,
        overrides=[f"{key}={value}" for key, value in overrides.items()],
        environ=environ or {},
    )


def test_several_generators_can_be_given_in_a_file_in_the_environment_and_on_the_command_line(tmp_path: Path) -> None:
    given = [
        load(TOML, folder=tmp_path),
        load(environ={f"{ENV_PREFIX}GENERATORS": INLINE}, folder=tmp_path),
        load(generators=INLINE, folder=tmp_path),
    ]
    assert all(settings.generators == settings.generator_addresses == TWO for settings in given)
    assert [settings.laggards for settings in given] == ["leave_out", "wait", "wait"]
    assert OrchestratorSettings.model_validate_json(given[0].model_dump_json()) == given[0], "as a worker gets them"


def test_one_generator_is_given_by_two_addresses() -> None:
    settings = OrchestratorSettings(generator_address="a:1", adapter_address="a:2")
    assert settings.generator_addresses == TWO[:1]


def test_the_help_names_the_settings_of_several_generators() -> None:
    text = describe_settings(OrchestratorSettings, env_prefix=ENV_PREFIX)
    assert "generators = []" in text and "{address, adapter_address}" in text
    assert 'laggards = "wait"' in text and "laggard_seconds = 900.0" in text


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"generators": TWO, "generator_address": "c:1"}, "generator_address has no effect"),
        ({"generators": TWO, "adapter_address": "c:2"}, "adapter_address has no effect"),
        ({"generators": (TWO[0], TWO[0])}, "an address is there twice"),
        ({"laggards": "leave_out"}, "laggards has no effect with one generator"),
        ({"generators": TWO[:1], "laggard_seconds": 1.0}, "laggard_seconds has no effect with one generator"),
        ({"generators": [{"address": "a:1"}]}, "generators.0.adapter_address"),
    ],
)
def test_what_would_be_ignored_or_is_incomplete_is_refused(changed: dict[str, object], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        OrchestratorSettings.model_validate(changed)


def test_an_incomplete_generator_is_named_with_its_place(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        load('[[generators]]\naddress = "a:1"\n', folder=tmp_path)
    assert [violation.field for violation in caught.value.violations] == ["generators.0.adapter_address"]


def test_the_breaker_of_the_generators_is_open_while_that_of_any_is_and_a_call_to_one_is_repeated_once() -> None:
    two = tuple(GeneratorAddress(address=f"127.0.0.1:{n}", adapter_address=f"127.0.0.1:{n + 2}") for n in (1, 2))
    settings = OrchestratorSettings(generators=two, max_retries=4, retry_backoff_seconds=0.01)
    seen: list[BreakerStates] = []

    async def main() -> None:
        async with open_services(settings, on_breaker=seen.append) as services:
            assert [ports.generator.client.target for ports in services.generators] == ["127.0.0.1:1", "127.0.0.1:2"]
            assert [ports.adapter.client.target for ports in services.generators] == ["127.0.0.1:3", "127.0.0.1:4"]
            assert services.reward.retries.max_retries == 4
            for _ in range(2):
                with pytest.raises(
                    UnavailableError, match=r"generator at 127\.0\.0\.1:2: UNAVAILABLE after 2 attempts"
                ):
                    await services.generators[1].generator.call(lambda client: client.get_generator())

    asyncio.run(main())
    assert ONE_OF_SEVERAL_RETRIES == 1
    closed = dict.fromkeys(SERVICE_NAMES, False)
    assert seen == [closed, {**closed, "generator": True}]


def test_lagging_generators_are_counted_as_the_worker_says_and_a_damaged_file_says_none(tmp_path: Path) -> None:
    assert read_lagging(tmp_path) == []
    files = RunFiles(tmp_path)
    show_lagging(files, ["a:1", "b:1"])
    assert read_lagging(tmp_path) == ["a:1", "b:1"]
    registry = CollectorRegistry()
    metrics = OrchestratorMetrics(registry)
    assert registry.get_sample_value("tether_lagging_generators") == 0
    metrics.show_lagging(read_lagging(tmp_path))
    assert registry.get_sample_value("tether_lagging_generators") == 2
    for damaged in ("", "[1]", '{"generators": 3}'):
        (tmp_path / LAGGING_FILE).write_text(damaged)
        assert read_lagging(tmp_path) == []


def test_the_figures_of_a_push_are_those_of_both_phases() -> None:
    pushed = PushFigures(0.0, transfer_seconds=1.0, verify_seconds=2.0, load_seconds=3.0, probe_mean_abs_dlogp=1e-6)
    both = pushed.then(PushFigures(0.5))
    assert both == PushFigures(0.5, 1.0, 2.0, 3.0, 1e-6)
    assert (both.seconds, PushFigures(0.25).seconds) == (6.5, 0.25)
