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
from typing import Any, Final, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from tether.errors import FieldViolation, InvalidArgumentError
from tether_services.runtime.auth import PROTECTIONS, check_bind_address, is_loopback, split_address
from tether_services.runtime.callers import OWN_NAMES, Caller, Lane
from tether_services.runtime.checks import NAME_PATTERN
from tether_services.runtime.scopes import SCOPES

CONFIG_ERROR_EXIT_CODE = 42
"""Exit status for a bad configuration: a supervisor must not restart such a process."""

LISTENING: Final = ("address", "admin_address", "http_address", "metrics_address")
"""Settings of ports that only a protected service may open to other machines, where a service has them."""
WITH_PORT: Final = ("http_address", "metrics_address")
"""Of these, those whose servers know no Unix sockets."""

SettingsT = TypeVar("SettingsT", bound=BaseModel)


class Settings(BaseModel):
    """Base of everything a user types: frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class CallerSettings(Settings):
    """A caller, and what it may use. Tokens and identities of one name are one caller and share its limits."""

    name: str = Field(pattern=NAME_PATTERN.pattern)
    """Name of the caller in logs and metrics."""
    scopes: frozenset[str] = Field(min_length=1)
    """Groups of methods that it may call; docs/security.md lists them."""
    weight: float = Field(default=1.0, gt=0, le=1000)
    """Its share of the engine beside other callers that wait, relative to theirs."""
    lane: Lane = "shared"
    """`training` has a reserved share of the engine and of the places for calls; for training runs."""
    requests_per_second: float | None = Field(default=None, gt=0, le=1e6)
    """Calls it may begin, averaged, with a burst of one second's worth; unset: no limit."""
    tokens_per_second: float | None = Field(default=None, gt=0, le=1e9)
    """Tokens it may have computed, averaged, with a burst of one second's worth; unset: no limit."""
    max_concurrency: int | None = Field(default=None, ge=1, le=1_000_000)
    """Calls it may have in flight; unset: no limit."""

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        if name in OWN_NAMES:
            raise ValueError(f"{name!r} is a caller of the services themselves; choose another name")
        return name

    @field_validator("scopes")
    @classmethod
    def _check_scopes(cls, scopes: frozenset[str]) -> frozenset[str]:
        unknown = sorted(scopes - set(SCOPES))
        if unknown:
            raise ValueError(f"there is no scope {unknown[0]!r}; there are {', '.join(SCOPES)}")
        return scopes

    def caller(self) -> Caller:
        """Return the caller as the pipeline knows it."""
        return Caller(self.name, self.scopes, *self.limits())

    def limits(self) -> tuple[float, Lane, float | None, float | None, int | None]:
        """Return what all tokens and identities of one name must agree on."""
        return (self.weight, self.lane, self.requests_per_second, self.tokens_per_second, self.max_concurrency)


class IdentitySettings(CallerSettings):
    """A caller that proves itself by the certificate it shows."""

    spiffe: str = Field(default="", pattern=r"^(spiffe://[a-z0-9._-]+/[A-Za-z0-9._/-]*)?$")
    """SPIFFE id of the certificate, for example spiffe://prod/trainer; one that ends in / stands for all below it."""
    common_name: str = Field(default="", max_length=64)
    """Common name of a certificate without a SPIFFE id."""

    @model_validator(mode="after")
    def _check_one(self) -> IdentitySettings:
        if bool(self.spiffe) == bool(self.common_name):
            raise ValueError("give exactly one of spiffe and common_name")
        return self


class TlsSettings(Settings):
    """Transport security. The files are read again whenever they change."""

    certificate_file: Path
    """PEM file with the certificate of the service and those between it and the root."""
    key_file: Path
    """PEM file with its private key, without a pass phrase."""
    client_ca_file: Path | None = None
    """PEM file with the roots of the callers' certificates. Set: every caller must show one (mutual TLS)."""


class ServerSettings(Settings):
    """What the settings of all four services share."""

    address: str = "127.0.0.1:0"
    """host:port to serve on; port 0 takes a free one and logs it."""
    metrics_address: str = "127.0.0.1:0"
    """host:port of the Prometheus endpoint; port 0 takes a free one and logs it."""
    http_address: str = ""
    """host:port of the same methods as JSON over HTTP; port 0 takes a free one and logs it; empty: not served."""
    http_timeout_seconds: float = Field(default=30.0, gt=0, le=86400)
    """Deadline of a call over HTTP that does not say one; never more than max_deadline_seconds."""
    health_address: str = ""
    """host:port without transport security that answers grpc.health.v1 and nothing else, for probes; empty: none."""
    insecure: bool = False
    """Allow an address other than loopback without authentication and transport security. Only on a network that you
    trust."""
    tokens_file: Path | None = None
    """File of `tether token`: callers must send one of its tokens, or show a certificate of `identities`. Read again
    within a second of a change. Unset, and no identities: everybody may call."""
    token_leeway_seconds: float = Field(default=60.0, ge=0, le=3600)
    """A token is accepted for this long after it has expired, because clocks differ."""
    identities: tuple[IdentitySettings, ...] = Field(default=(), max_length=1000)
    """Callers by their certificates; needs tls.client_ca_file."""
    tls: TlsSettings | None = None
    """Transport security of all ports but those of metrics and health; unset: none."""
    max_calls: int = Field(default=1024, ge=1, le=1_000_000)
    """Calls in flight at most, on all ports together; more are refused before any work."""
    reserved_calls: int = Field(default=128, ge=0, le=1_000_000)
    """Of max_calls, those that only callers of the training lane may take."""
    max_message_bytes: int = Field(default=8 * 1024 * 1024, ge=1024, le=256 * 1024 * 1024)
    """Largest request accepted on the data port."""
    max_metadata_bytes: int = Field(default=16 * 1024, ge=1024, le=1024 * 1024)
    """Largest metadata of a call accepted, its token included."""
    reflection: bool | None = None
    """Serve gRPC reflection, so that generic tools can list the methods; unset: on loopback addresses only."""
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

    @model_validator(mode="after")
    def _check_security(self) -> ServerSettings:
        """Refuse settings that would be ignored or that nobody could call with."""
        mutual = self.tls is not None and self.tls.client_ca_file is not None
        if self.identities and not mutual:
            raise ValueError("identities would be ignored without tls.client_ca_file: set it, or remove them")
        if mutual and not self.identities and self.tokens_file is None:
            raise ValueError("tls.client_ca_file alone lets nobody call: add identities or tokens_file")
        if self.reserved_calls >= self.max_calls:
            raise ValueError("reserved_calls must be below max_calls, or only the training lane could call")
        check_one_caller_per_name(self.identities, field="identities")
        return self

    @property
    def is_authenticated(self) -> bool:
        """Return whether callers must prove who they are."""
        return self.tokens_file is not None or bool(self.identities)

    @property
    def lacking_protections(self) -> tuple[str, ...]:
        """Return which of PROTECTIONS the service does not have."""
        has = (self.is_authenticated, self.tls is not None)
        return tuple(name for name, there in zip(PROTECTIONS, has, strict=True) if not there)

    def listening_addresses(self) -> dict[str, str]:
        """Return the addresses of LISTENING by the names of their settings, without those that may be left empty."""
        defaults = {name: field.default for name, field in type(self).model_fields.items() if name in LISTENING}
        found = {name: getattr(self, name) for name in defaults}
        return {name: address for name, address in found.items() if address or defaults[name]}

    def check_addresses(self) -> None:
        """Refuse an address that is malformed, or that other machines can reach without protection.

        Raises:
            InvalidArgumentError: Names the setting.
        """
        for name, address in self.listening_addresses().items():
            check_bind_address(address, insecure=self.insecure, field=name, lacking=self.lacking_protections)
            if name in WITH_PORT:
                split_address(address, field=name)
        if self.health_address:  # tells nothing that needs protection, and probes have no credentials
            is_loopback(self.health_address, field="health_address")


def check_one_caller_per_name(callers: Sequence[CallerSettings], *, field: str) -> None:
    """Refuse two entries of one name whose limits differ: which of them would hold could not be told."""
    first: dict[str, CallerSettings] = {}
    for index, caller in enumerate(callers):
        if first.setdefault(caller.name, caller).limits() != caller.limits():
            raise ValueError(
                f"{field}[{index}] and another entry are named {caller.name!r} and differ in weight, lane or limits:"
                " one name is one caller"
            )


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
        if isinstance(settings, ServerSettings):
            settings.check_addresses()
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
