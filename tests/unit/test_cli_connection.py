"""The options of commands about tokens and TLS."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from tether.credentials import TLS_VARIABLES, TlsFiles
from tether_services.cli.connection import add_credentials, credential_options


def options(*arguments: str) -> object:
    parser = argparse.ArgumentParser()
    add_credentials(parser)
    return credential_options(parser.parse_args(arguments))["tls"]


def test_what_no_option_gives_comes_from_the_environment_each_on_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert options() is None, "the client looks into the environment itself"
    monkeypatch.setenv("TETHER_CERTIFICATE_FILE", "own.pem")
    monkeypatch.setenv("TETHER_KEY_FILE", "own.key")
    monkeypatch.setenv("TETHER_CA_FILE", "other.pem")
    assert options() is None
    assert options("--ca-file", "ca.pem") == TlsFiles(Path("ca.pem"), "own.pem", "own.key")
    assert options("--server-name", "reward") == TlsFiles("other.pem", "own.pem", "own.key", "reward")


def test_a_certificate_for_another_name_needs_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in TLS_VARIABLES.values():
        monkeypatch.delenv(variable, raising=False)
    assert options("--server-name", "reward") == TlsFiles(server_name="reward")
