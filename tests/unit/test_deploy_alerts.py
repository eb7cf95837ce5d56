"""The Prometheus alerts: they are wired, they speak of metrics that exist, and they fire when they should."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry, generate_latest

from tests.rpc.certificates import service_files
from tests.rpc.token_inputs import add_token
from tether_services.generator.metrics import GeneratorMetrics
from tether_services.orchestrator.metrics import OrchestratorMetrics
from tether_services.reference.metrics import ReferenceMetrics
from tether_services.reward.metrics import RewardMetrics
from tether_services.runtime.access import Access
from tether_services.runtime.settings import ServerSettings

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "deploy/prometheus"
PROMTOOL = shutil.which("promtool")
needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed (Prometheus)")


def rules() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load((FOLDER / "alerts.yml").read_text())["groups"]
    found: list[dict[str, Any]] = group["rules"]
    return found


def promtool(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    assert PROMTOOL is not None
    return subprocess.run([PROMTOOL, *words], cwd=folder, capture_output=True, text=True, timeout=60)


def exported(folder: Path) -> str:
    registries = [CollectorRegistry() for _ in range(5)]
    OrchestratorMetrics(registries[0])
    GeneratorMetrics(registries[1], queue_limit=1)
    add_token(folder / "tokens.toml")
    given = {"tls": service_files(folder).settings(), "tokens_file": str(folder / "tokens.toml")}
    Access(ServerSettings.model_validate(given), "reward", registries[2])
    RewardMetrics(registries[3], queue_limit=1)
    ReferenceMetrics(registries[4], queue_limit=1)
    return "".join(generate_latest(registry).decode() for registry in registries)


def test_prometheus_loads_the_alerts_and_the_compose_file_mounts_them() -> None:
    config = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    assert config["rule_files"] == ["alerts.yml"]
    volumes = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]["prometheus"]["volumes"]
    assert "./deploy/prometheus/alerts.yml:/etc/prometheus/alerts.yml:ro" in volumes


def test_every_metric_and_label_value_of_an_alert_exists_from_the_start(tmp_path: Path) -> None:
    text = exported(tmp_path)
    for rule in rules():
        for name, labels in re.findall(r"(tether_\w+)(?:\{([^}]*)\})?", rule["expr"]):
            assert f"\n{name}" in text, f"{rule['alert']}: {name} is not exported"
            for label, value in re.findall(r'(\w+)="(\w+)"', labels):
                if label != "service":  # Prometheus adds it to what it scrapes
                    assert re.search(rf'{name}{{[^}}]*{label}="{value}"', text), f"{name} has no {label} {value}"


def test_every_alert_says_what_happened_and_what_to_do() -> None:
    for rule in rules():
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert set(rule["annotations"]) == {"summary", "action"}
        assert all(text.endswith(".") for text in rule["annotations"].values())


@needs_promtool
def test_every_alert_fires_when_it_should_and_is_silent_while_all_is_well() -> None:
    done = promtool(FOLDER, "test", "rules", "alerts_test.yml")
    assert done.returncode == 0, done.stdout + done.stderr
    tested = {
        case["alertname"]
        for test in yaml.safe_load((FOLDER / "alerts_test.yml").read_text())["tests"]
        for case in test["alert_rule_test"]
        if case.get("exp_alerts")
    }
    assert tested == {rule["alert"] for rule in rules()}


@needs_promtool
@pytest.mark.parametrize("alert", ["TetherAdapterRefused", "TetherRunRolledBack", "TetherItemsRejected"])
def test_an_alert_that_does_not_fire_is_noticed(tmp_path: Path, alert: str) -> None:
    """The control: the same tests against rules one of which can never fire."""
    content = yaml.safe_load((FOLDER / "alerts.yml").read_text())
    for rule in content["groups"][0]["rules"]:
        if rule["alert"] == alert:
            rule["expr"] = "vector(0) > 1"
    (tmp_path / "alerts.yml").write_text(yaml.safe_dump(content))
    shutil.copy(FOLDER / "alerts_test.yml", tmp_path)
    done = promtool(tmp_path, "test", "rules", "alerts_test.yml")
    assert done.returncode != 0 and alert in done.stdout + done.stderr


@needs_promtool
def test_prometheus_accepts_its_configuration() -> None:
    done = promtool(FOLDER, "check", "config", "prometheus.yml")
    assert done.returncode == 0, done.stdout + done.stderr
