"""Settings of a service: TOML file < environment < `--set key=value`, unknown keys refused.

Keys are dotted paths (`model.path`). The environment form of `limits.max_items` of the reward service is
`TETHER_REWARD__LIMITS__MAX_ITEMS`: two underscores, so that variables which Kubernetes makes up for a Service named
`tether-reward` never look like settings.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tether.errors import FieldViolation, InvalidArgumentError

CONFIG_ERROR_EXIT_CODE = 42
"""Exit status for a bad configuration: a supervisor must not restart such a process."""

SettingsT = TypeVar("SettingsT", bound=BaseModel)


class Settings(BaseModel):
    """Base of everything a user types: frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class ServerSettings(Settings):
    """What the settings of all four services share."""

    address: str = "127.0.0.1:0"
    """host:port to serve on; port 0 takes a free one and logs it."""
    metrics_address: str = "127.0.0.1:0"
    """host:port of the Prometheus endpoint; port 0 takes a free one and logs it."""
    insecure: bool = False
    """Allow an address other than loopback without transport security. Only on a network that you trust."""
    reflection: bool = True
    """Serve gRPC reflection, so that generic tools can list the methods."""
    max_deadline_seconds: float = Field(default=600.0, gt=0, le=86400)
    """Calls must carry a deadline of at most this."""
    drain_seconds: float = Field(default=30.0, ge=0, le=3600)
    """After SIGTERM, calls in flight get this long to finish."""
    drain_notice_seconds: float = Field(default=0.0, ge=0, le=3600)
    """Before that, readiness fails for this long while calls are still taken, so that balancers notice in time."""
    max_connection_age_seconds: float = Field(default=1800.0, gt=0, le=86400)
    """A connection is closed, without loss, at about this age: clients then look for new replicas."""
    liveness_seconds: float = Field(default=5.0, gt=0, le=3600)
    """The engine answers a tiny request this often, or is seen to compute, within this time, or liveness fails."""
    threads: int = Field(default=1, ge=1, le=1024)
    """CPU threads for tensor work."""
    log_level: str = Field(default="INFO", pattern="^(DEBUG|INFO|WARNING|ERROR)$")
    """Least severe log level that is written."""


def load_settings(
    model: type[SettingsT],
    *,
    env_prefix: str,
    config: Path | None = None,
    overrides: Sequence[str] = (),
    environ: Mapping[str, str] | None = None,
) -> SettingsT:
    """Return the validated settings.

    Args:
        model: The settings class.
        env_prefix: For example `TETHER_REWARD__`.
        config: TOML file; None for defaults.
        overrides: `key=value` strings, strongest.
        environ: Environment to read; None for the process's own.

    Raises:
        InvalidArgumentError: Names every unknown or invalid key with its path.
    """
    merged = read_toml(config) if config else {}
    environ = os.environ if environ is None else environ
    for name, text in sorted(environ.items()):
        if name.startswith(env_prefix):
            _put(merged, name[len(env_prefix) :].lower().split("__"), _parse_value(text), origin=name)
    merge_overrides(merged, overrides)
    return validate(model, merged)


def merge_overrides(values: dict[str, Any], overrides: Sequence[str]) -> None:
    """Put `key=value` strings into a nested dictionary; keys are dotted paths, values TOML where they are, else text.

    Raises:
        InvalidArgumentError: An override has no `=`, or its path leads through a value.
    """
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator:
            raise InvalidArgumentError(f"--set takes key=value, got {override!r}.", field=override)
        _put(values, key.strip().split("."), _parse_value(text), origin="--set " + key)


def read_toml(path: Path) -> dict[str, Any]:
    """Return the parsed TOML file.

    Raises:
        InvalidArgumentError: The file cannot be read or is not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidArgumentError(f"Cannot read {path}: {error.strerror}.", field="--config") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidArgumentError(f"{path} is not valid TOML: {error}", field="--config") from error


def validate(model: type[SettingsT], values: Mapping[str, Any]) -> SettingsT:
    """Return the model built from plain values.

    Raises:
        InvalidArgumentError: Names every unknown or invalid key with its path.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise InvalidArgumentError(
            f"The configuration has {error.error_count()} invalid key(s).",
            reason="INVALID_CONFIG",
            violations=tuple(_violation(detail, model) for detail in error.errors()),
        ) from None


def _violation(detail: Any, model: type[BaseModel]) -> FieldViolation:
    path = ".".join(str(part) for part in detail["loc"]) or model.__name__
    if detail["type"] == "extra_forbidden":
        return FieldViolation(path, "unknown key; --help lists the known ones")
    return FieldViolation(path, f"{detail['msg']}, got {detail['input']!r}"[:300])


def _parse_value(text: str) -> Any:
    """Return the text as a TOML value where it is one, else as a string."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _put(target: dict[str, Any], path: Sequence[str], value: Any, *, origin: str) -> None:
    for part in path[:-1]:
        inner = target.setdefault(part, {})
        if not isinstance(inner, dict):
            raise InvalidArgumentError(f"{origin}: {part} is a value, not a table.", field=".".join(path))
        target = inner
    target[path[-1]] = value


def parse_arguments(model: type[SettingsT], *, program: str, env_prefix: str, arguments: Sequence[str]) -> SettingsT:
    """Return the settings that a command line asks for; `--help` and `--dry-run` print and exit.

    A bad configuration is printed to stderr, one line per key, and exits with CONFIG_ERROR_EXIT_CODE.
    """
    parser = argparse.ArgumentParser(
        prog=program,
        description=(model.__doc__ or "").strip().splitlines()[0],
        epilog=describe_settings(model, env_prefix=env_prefix),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_settings_arguments(parser)
    known = parser.parse_args(arguments)
    return settings_from_arguments(model, known, env_prefix=env_prefix)


def add_settings_arguments(
    parser: argparse.ArgumentParser, *, dry_run: str = "print the resolved settings and exit"
) -> None:
    """Add --config, --set and --dry-run, of which `dry_run` says what it does."""
    parser.add_argument("--config", type=Path, metavar="FILE", help="TOML file with settings")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help="override one setting"
    )
    parser.add_argument("--dry-run", action="store_true", help=dry_run)


def settings_from_arguments(model: type[SettingsT], known: argparse.Namespace, *, env_prefix: str) -> SettingsT:
    """Return the settings of parsed arguments; see `parse_arguments` for --dry-run and errors."""
    try:
        settings = load_settings(model, env_prefix=env_prefix, config=known.config, overrides=known.overrides)
    except InvalidArgumentError as error:
        exit_with_config_error(error)
    if known.dry_run:
        print(json.dumps(settings.model_dump(mode="json"), indent=2))
        raise SystemExit(0)
    return settings


def exit_with_config_error(error: InvalidArgumentError) -> Any:
    """Print the error with one line per field and exit with CONFIG_ERROR_EXIT_CODE."""
    print(f"error: {error.message}", file=sys.stderr)
    for violation in error.violations:
        print(f"  {violation.field}: {violation.description}", file=sys.stderr)
    raise SystemExit(CONFIG_ERROR_EXIT_CODE)


def describe_settings(model: type[BaseModel], *, env_prefix: str) -> str:
    """Return the settings with defaults and meaning, one line each, for --help."""
    lines = [f"settings (TOML key, or environment {env_prefix}KEY, or --set key=value):"]
    return "\n".join(lines + _describe(model, ""))


def _describe(model: type[BaseModel], prefix: str) -> list[str]:
    lines = []
    for name, field in model.model_fields.items():
        inner = _table(field.annotation)
        if inner is field.annotation and inner is not None:
            lines += _describe(inner, f"{prefix}{name}.")
            continue
        default = (
            "required" if field.is_required() else json.dumps(_plain(field.get_default(call_default_factory=True)))
        )
        description = " ".join((field.description or "").split())
        lines.append(f"  {prefix}{name} = {default}\n      {description}")
        if inner is not None:  # a table that may be left out
            lines += _describe(inner, f"{prefix}{name}.")
    return lines


def _table(annotation: Any) -> type[BaseModel] | None:
    """Return the class of nested settings, also of those that may be None; None for a plain value."""
    parts = get_args(annotation)
    options = parts if type(None) in parts else (annotation,)
    return next((option for option in options if isinstance(option, type) and issubclass(option, BaseModel)), None)


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    return value if isinstance(value, (str, int, float, bool, list, tuple, dict, type(None))) else str(value)
