"""The shipped deployment files agree with the code and with each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tether.errors import InvalidArgumentError
from tether_services.generator.config import GeneratorSettings
from tether_services.orchestrator.config import OrchestratorSettings
from tether_services.reference.config import ReferenceSettings
from tether_services.reward.config import RewardSettings
from tether_services.runtime.auth import split_address
from tether_services.runtime.settings import ServerSettings, load_settings

ROOT = Path(__file__).parents[2]
SETTINGS: dict[str, type[ServerSettings]] = {
    "generator": GeneratorSettings,
    "reward": RewardSettings,
    "reference": ReferenceSettings,
    "orchestrator": OrchestratorSettings,
}


def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    return loaded


def settings_of(service: str) -> Any:
    config = ROOT / "deploy/config/compose" / f"{service}.toml"
    return load_settings(SETTINGS[service], env_prefix="NONE__", config=config, environ={})


@pytest.mark.parametrize("service", SETTINGS)
def test_the_settings_of_a_container_are_valid_and_its_ports_are_published_on_loopback_only(service: str) -> None:
    settings = settings_of(service)
    ports = compose()["services"][service]["ports"]
    inside = {int(port.rsplit(":", 1)[1]) for port in ports}
    assert {split_address(a, field="")[1] for a in (settings.address, settings.metrics_address)} == inside
    assert all(port.startswith("127.0.0.1:") for port in ports)


@pytest.mark.parametrize("service", SETTINGS)
def test_the_addresses_of_a_container_do_not_stop_its_start(service: str) -> None:
    settings = settings_of(service)
    settings.check_addresses()
    with pytest.raises(InvalidArgumentError, match="INSECURE_ADDRESS"):
        settings.model_copy(update={"insecure": False}).check_addresses()


@pytest.mark.parametrize("service", SETTINGS)
def test_a_container_drains_before_it_is_killed(service: str) -> None:
    grace = compose()["services"][service]["stop_grace_period"]
    assert settings_of(service).drain_seconds < int(grace.removesuffix("s"))


def test_the_orchestrator_of_compose_finds_the_other_services() -> None:
    settings = settings_of("orchestrator")
    for field, service, own in (
        ("generator_address", "generator", "address"),
        ("adapter_address", "generator", "admin_address"),
        ("reward_address", "reward", "address"),
        ("reference_address", "reference", "address"),
    ):
        host, port = split_address(getattr(settings, field), field=field)
        assert host == service
        assert port == split_address(getattr(settings_of(service), own), field=own)[1]


@pytest.mark.parametrize("service", SETTINGS)
def test_every_service_has_a_build_target_and_a_health_check_of_its_own_name(service: str) -> None:
    entry = compose()["services"][service]
    dockerfile = (ROOT / "deploy/docker/Dockerfile").read_text()
    assert f" AS {entry['build']['target']}\n" in dockerfile
    assert entry["healthcheck"]["test"][-1] == f"tether.v1.{service.capitalize()}Service"


def test_prometheus_scrapes_every_service_where_it_listens() -> None:
    config = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())
    targets = {t for group in config["scrape_configs"][0]["static_configs"] for t in group["targets"]}
    expected = {f"{s}:{split_address(settings_of(s).metrics_address, field='')[1]}" for s in SETTINGS}
    assert targets == expected
