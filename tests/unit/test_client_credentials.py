"""Tokens and TLS files of the client: where they come from, what is refused, and that nothing shows the token."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.rpc.certificates import Authority, client_files
from tether import AdapterClient, Client, InvalidArgumentError, RewardClient, TlsFiles
from tether.channel import open_channel
from tether.credentials import Credentials, Tls, Token, is_loopback
from tether_services.local.supervision import without_credentials

SECRET = "tth_canary.0123456789"
LOOPBACK = "127.0.0.1:50052"


def shown(credentials: Credentials) -> list[tuple[str, str]]:
    return list(credentials.metadata())


def bearer(token: str) -> list[tuple[str, str]]:
    return [("authorization", f"Bearer {token}")]


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("127.0.0.1:50052", True),
        ("127.9.9.9", True),
        ("localhost:1", True),
        ("[::1]:1", True),
        ("::1", True),
        ("dns:///localhost:1", True),
        ("dns:localhost:1", True),
        ("ipv4:127.0.0.1:1,127.0.0.2:1", True),
        ("ipv6:[::1]:1", True),
        ("unix:/run/tether.socket", True),
        ("unix-abstract:tether", True),
        ("ipv4:127.0.0.1:1,10.0.0.1:1", False),
        ("10.0.0.1:1", False),
        ("0.0.0.0:1", False),
        ("reward:50052", False),
        ("localhost.example.org:1", False),
        ("127.0.0.1.example.org:1", False),
        ("dns://10.0.0.1/localhost:1", False),
        ("dns:///reward:1", False),
        ("xds:///localhost:1", False),
        ("passthrough:///127.0.0.1:1", False),
        ("[::1].example.org:1", False),
        ("", False),
    ],
)
def test_only_what_surely_stays_on_this_machine_is_loopback(target: str, expected: bool) -> None:
    assert is_loopback(target) is expected


def test_a_token_may_be_given_read_from_a_file_or_come_from_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(f"{SECRET}\n")
    empty: dict[str, str] = {}
    for token, environ in (
        (SECRET, empty),
        (file, empty),
        (None, {"TETHER_TOKEN": SECRET}),
        (None, {"TETHER_TOKEN_FILE": str(file)}),
        (SECRET, {"TETHER_TOKEN": "another"}),
    ):
        assert shown(Credentials(LOOPBACK, token=token, environ=environ)) == bearer(SECRET)
    assert not shown(Credentials(LOOPBACK, environ=empty))
    assert Credentials(LOOPBACK, token="", environ={"TETHER_TOKEN": SECRET}).is_empty


def test_both_variables_of_the_token_at_once_are_refused() -> None:
    environ = {"TETHER_TOKEN": SECRET, "TETHER_TOKEN_FILE": "token"}
    with pytest.raises(InvalidArgumentError, match="unset one"):
        Credentials(LOOPBACK, environ=environ)


def test_tls_may_be_given_come_from_the_environment_or_be_off(tmp_path: Path) -> None:
    authority = Authority()
    given = client_files(tmp_path, authority, authority.sign("client"))
    environ = {
        "TETHER_CA_FILE": str(given.ca_file),
        "TETHER_CERTIFICATE_FILE": str(given.certificate_file),
        "TETHER_KEY_FILE": str(given.key_file),
    }
    for tls, named in ((given, {}), (None, environ), (TlsFiles(), {})):
        assert Credentials(LOOPBACK, tls=tls, environ=named).for_channel() is not None
    assert Credentials(LOOPBACK, tls=False, environ=environ).for_channel() is None
    with pytest.raises(InvalidArgumentError, match="given together"):
        Credentials(LOOPBACK, environ={"TETHER_KEY_FILE": str(given.key_file)})


@pytest.mark.parametrize("target", ["reward:50052", "10.1.2.3:50052", "dns:///reward:50052"])
def test_a_token_that_others_could_read_is_refused(target: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match=target) as caught:
        RewardClient(target, token=SECRET)
    assert caught.value.reason == "PLAINTEXT_TOKEN" and caught.value.violations[0].field == "token"
    assert SECRET not in str(caught.value)
    for refused in (lambda: Client(reward=target, token=SECRET), lambda: open_channel(target, token=SECRET)):
        with pytest.raises(InvalidArgumentError, match="PLAINTEXT_TOKEN"):
            refused()
    RewardClient(target, token=SECRET, allow_plaintext_token=True)
    RewardClient(target, token=SECRET, tls=client_files(tmp_path, Authority()))
    RewardClient(target)


@pytest.mark.parametrize("token", ["two words", "two\nlines", "caf\u00e9", "\x00", "semi;colon"])
def test_a_token_that_cannot_be_sent_is_refused_and_not_shown(token: str, tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(token, encoding="utf-8")
    for given in (token, file):
        with pytest.raises(InvalidArgumentError, match="BAD_TOKEN") as caught:
            Credentials(LOOPBACK, token=given)
        assert token not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "field"), [({"token": b"hush"}, "token"), ({"tls": {"ca_file": "hush"}}, "tls"), ({"tls": True}, "tls")]
)
def test_credentials_of_another_kind_are_refused_with_those_that_are_accepted(given: Any, field: str) -> None:
    with pytest.raises(InvalidArgumentError, match="accepted") as caught:
        Credentials(LOOPBACK, **given)
    assert caught.value.violations[0].field == field and "hush" not in str(caught.value)


def test_an_empty_token_file_is_no_token(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("\n")
    with pytest.raises(InvalidArgumentError, match="is empty"):
        Credentials(LOOPBACK, token=tmp_path / "token")


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    missing = tmp_path / "nothing"
    cases: list[tuple[Token, Tls, str]] = [
        (missing, None, "token"),
        (None, TlsFiles(ca_file=missing), "tls.ca_file"),
        (None, TlsFiles(certificate_file=missing, key_file=missing), "tls.certificate_file"),
    ]
    for token, tls, field in cases:
        with pytest.raises(InvalidArgumentError, match="nothing") as caught:
            RewardClient(LOOPBACK, token=token, tls=tls)
        assert caught.value.violations[0].field == field


def test_files_that_are_no_pem_or_do_not_belong_together_are_refused_at_once(tmp_path: Path) -> None:
    authority = Authority()
    good = client_files(tmp_path, authority, authority.sign("client"))
    (tmp_path / "garbage").write_text("garbage")
    (tmp_path / "other.key").write_bytes(authority.sign("other").key)
    for tls, field in (
        (TlsFiles(ca_file=tmp_path / "garbage"), "tls.ca_file"),
        (TlsFiles(good.ca_file, tmp_path / "garbage", good.key_file), "tls.certificate_file"),
        (TlsFiles(good.ca_file, good.certificate_file, tmp_path / "other.key"), "tls.certificate_file"),
        (TlsFiles(certificate_file=good.certificate_file), "tls.key_file"),
        (TlsFiles(key_file=good.key_file), "tls.certificate_file"),
    ):
        with pytest.raises(InvalidArgumentError, match="BAD_TLS_FILES") as caught:
            RewardClient(LOOPBACK, tls=tls)
        assert caught.value.violations[0].field == field


def test_a_token_file_is_read_again_when_it_changes(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("first")
    credentials = Credentials(LOOPBACK, token=file)
    assert shown(credentials) == bearer("first")
    file.write_text("the-second")
    assert shown(credentials) == bearer("the-second")
    replacement = tmp_path / "new"
    replacement.write_text("thirdthird")
    replacement.replace(file)
    assert shown(credentials) == bearer("thirdthird")


def test_a_token_file_that_vanishes_leaves_the_former_token_in_use_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "token"
    file.write_text(SECRET)
    credentials = Credentials(LOOPBACK, token=file)
    file.unlink()
    with caplog.at_level(logging.WARNING):
        assert shown(credentials) == shown(credentials) == bearer(SECRET)
    assert len(caplog.messages) == 1 and str(file) in caplog.text and SECRET not in caplog.text
    file.write_text("another")
    assert shown(credentials) == bearer("another")


def test_half_a_replaced_pair_of_certificate_and_key_is_waited_out(tmp_path: Path) -> None:
    authority = Authority()
    first, second = authority.sign("first"), authority.sign("second")
    files = client_files(tmp_path, authority, first)
    credentials = Credentials(LOOPBACK, tls=files)
    assert not credentials.tls_changed()
    (tmp_path / "client.pem").write_bytes(second.chain)
    assert not credentials.tls_changed(), "the key is still the former one"
    (tmp_path / "client.key").write_bytes(second.key)
    assert credentials.tls_changed()
    assert not credentials.tls_changed()
    os.utime(tmp_path / "client.key")
    assert not credentials.tls_changed(), "nothing but the time is another"


def test_nothing_shows_the_token(tmp_path: Path) -> None:
    (tmp_path / "token").write_text(SECRET)
    clients = [RewardClient(LOOPBACK, token=SECRET), AdapterClient(LOOPBACK, token=tmp_path / "token")]
    for client in clients:
        assert SECRET not in repr(client) + repr(client._credentials) + str(client._credentials)
    assert repr(clients[0]._credentials) == "Credentials(token=set, tls=off)"
    authority = Authority()
    files = client_files(tmp_path, authority, authority.sign("client"))
    held = Credentials(LOOPBACK, tls=files)._tls
    assert held is not None and "PRIVATE" not in repr(held.value)


def test_the_environment_reaches_a_client_that_is_given_nothing() -> None:
    code = "import tether; print(tether.RewardClient('127.0.0.1:1')._credentials)"
    environ = {**os.environ, "TETHER_TOKEN": SECRET}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environ, timeout=60)
    assert done.stdout.strip() == "Credentials(token=set, tls=off)", done.stderr


def test_services_started_here_do_not_take_over_the_credentials_of_the_environment() -> None:
    variables = ("TETHER_TOKEN", "TETHER_TOKEN_FILE", "TETHER_CA_FILE", "TETHER_CERTIFICATE_FILE", "TETHER_KEY_FILE")
    kept = {"PATH": "/bin", "TETHER_REWARD__CREDENTIALS": "x"}
    assert without_credentials({**dict.fromkeys(variables, "x"), **kept}) == kept
