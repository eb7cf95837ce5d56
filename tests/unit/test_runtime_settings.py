from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import Field

from tether.errors import InvalidArgumentError
from tether_services.runtime.settings import (
    CONFIG_ERROR_EXIT_CODE,
    ServerSettings,
    Settings,
    load_settings,
    parse_arguments,
)


class Limits(Settings):
    """Limits."""

    max_items: int = Field(default=8, ge=1)
    """Items at most."""


class ToySettings(ServerSettings):
    """Settings of a toy service."""

    model: str = "none"
    """Model folder."""
    limits: Limits = Limits()
    """Limits."""


PREFIX = "TETHER_TOY__"


def load(config: Path | None = None, overrides: tuple[str, ...] = (), **environ: str) -> ToySettings:
    return load_settings(ToySettings, env_prefix=PREFIX, config=config, overrides=overrides, environ=environ)


def test_each_source_overrides_the_one_before(tmp_path: Path) -> None:
    config = tmp_path / "toy.toml"
    config.write_text('model = "from-file"\ndrain_seconds = 5\n[limits]\nmax_items = 16\n')
    assert load(config).model == "from-file"
    assert load(config, TETHER_TOY__MODEL="from-env").model == "from-env"
    settings = load(
        config, ("model=from-set", "limits.max_items=4"), TETHER_TOY__MODEL="x", TETHER_TOY__LIMITS__MAX_ITEMS="9"
    )
    assert (settings.model, settings.limits.max_items, settings.drain_seconds) == ("from-set", 4, 5)


def test_every_bad_key_is_named_with_its_path(tmp_path: Path) -> None:
    config = tmp_path / "toy.toml"
    config.write_text('colour = "red"\n[limits]\nmax_items = 0\nmin_items = 3\n')
    with pytest.raises(InvalidArgumentError) as caught:
        load(config, ("drain_seconds=nan",))
    fields = {violation.field for violation in caught.value.violations}
    assert fields == {"colour", "limits.max_items", "limits.min_items", "drain_seconds"}
    assert caught.value.reason == "INVALID_CONFIG"


def test_an_unknown_environment_variable_of_the_service_is_refused() -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        load(TETHER_TOY__COLOUR="red")
    assert caught.value.violations[0].field == "colour"


def test_variables_that_kubernetes_makes_up_are_not_settings() -> None:
    assert load(TETHER_TOY_PORT="tcp://10.0.0.1:50051", TETHER_TOY_SERVICE_HOST="10.0.0.1").model == "none"


@pytest.mark.parametrize("override", ["model", "address.port=3"])
def test_a_malformed_override_is_refused(override: str) -> None:
    with pytest.raises(InvalidArgumentError):
        load(overrides=("address=127.0.0.1:1", override))


def test_a_missing_file_and_broken_toml_are_clear_errors(tmp_path: Path) -> None:
    broken = tmp_path / "broken.toml"
    broken.write_text("model = ")
    for path in (tmp_path / "absent.toml", broken):
        with pytest.raises(InvalidArgumentError) as caught:
            load(path)
        assert caught.value.violations[0].field == "--config"


def test_dry_run_prints_the_resolved_settings(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_arguments(ToySettings, program="toy", env_prefix=PREFIX, arguments=["--dry-run", "--set", "model=m"])
    assert caught.value.code == 0
    assert json.loads(capsys.readouterr().out)["model"] == "m"


def test_a_bad_configuration_exits_with_its_own_status(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_arguments(ToySettings, program="toy", env_prefix=PREFIX, arguments=["--set", "limits.max_items=0"])
    assert caught.value.code == CONFIG_ERROR_EXIT_CODE
    assert "limits.max_items" in capsys.readouterr().err


def test_help_names_every_setting_with_default_and_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_arguments(ToySettings, program="toy", env_prefix=PREFIX, arguments=["--help"])
    text = capsys.readouterr().out
    assert "limits.max_items = 8" in text
    assert "Items at most." in text
    assert 'model = "none"' in text


def test_settings_load_no_heavy_library() -> None:
    code = (
        "import sys, tether_services.runtime.settings;"
        "print([m for m in ('torch', 'transformers', 'vllm') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
