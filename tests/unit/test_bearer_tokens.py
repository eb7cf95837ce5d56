"""Tokens: how they look, what is kept of them, and the file."""

from __future__ import annotations

import json
import re
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.rpc.token_inputs import add_token
from tether.errors import InvalidArgumentError, UnauthenticatedError
from tether_services.cli.main import main
from tether_services.reward.shadow import SHADOW_CALLER
from tether_services.runtime.access import read_bearer_token
from tether_services.runtime.bearer_tokens import (
    TOKEN_PATTERN,
    TokenRecord,
    TokenVerifier,
    changing_tokens,
    new_token,
    read_tokens,
)
from tether_services.runtime.callers import ANONYMOUS, OWN_NAMES
from tether_services.runtime.settings import CallerSettings

NOW = datetime(2026, 1, 1, tzinfo=UTC)
CALLER = CallerSettings(name="team-a", scopes=frozenset({"score"}))


def verifier(*records: TokenRecord, leeway_seconds: float = 60.0) -> TokenVerifier:
    return TokenVerifier({record.id: record for record in records}, timedelta(seconds=leeway_seconds))


def reason(verify: TokenVerifier, token: str, *, now: datetime = NOW) -> str:
    with pytest.raises(UnauthenticatedError) as caught:
        verify.verify(token, now=now)
    assert not token or token not in str(caught.value)
    return caught.value.reason


def test_a_token_has_a_prefix_an_id_and_32_random_bytes_and_none_is_like_another() -> None:
    made = [new_token(CALLER, now=NOW, lifetime=None)[0] for _ in range(50)]
    assert all(TOKEN_PATTERN.fullmatch(token) for token in made)
    assert len({token[:23] for token in made}) == len({token[24:] for token in made}) == 50


def test_nothing_that_is_kept_holds_the_secret() -> None:
    token, record = new_token(CALLER, now=NOW, lifetime=None)
    assert token[24:] not in repr(record) + record.model_dump_json()


def test_the_right_token_is_its_caller() -> None:
    token, record = new_token(CALLER, now=NOW, lifetime=timedelta(days=1))
    assert verifier(record).verify(token, now=NOW) is record
    assert record.caller().scopes == {"score"}


def test_a_wrong_secret_and_an_unknown_id_cannot_be_told_apart() -> None:
    (token, record), (other, _) = new_token(CALLER, now=NOW, lifetime=None), new_token(CALLER, now=NOW, lifetime=None)
    for wrong in (other, token[:23] + other[23:], token[:-1], token + "a", "", "tether_", token.upper(), token + "\n"):
        assert reason(verifier(record), wrong) == "TOKEN_UNKNOWN"


def test_only_the_owner_of_a_token_is_told_that_it_was_revoked_or_has_expired() -> None:
    token, record = new_token(CALLER, now=NOW, lifetime=timedelta(hours=1))
    later = NOW + timedelta(days=1)
    revoked = record.model_copy(update={"revoked": NOW})
    assert reason(verifier(record), token, now=later) == "TOKEN_EXPIRED"
    assert reason(verifier(revoked), token) == "TOKEN_REVOKED"
    for wrong in (record, revoked):
        assert reason(verifier(wrong), token[:-1] + ("A" if token[-1] != "A" else "B"), now=later) == "TOKEN_UNKNOWN"


@pytest.mark.parametrize(
    ("late_seconds", "accepted"), [(-1, True), (0, True), (59, True), (60, False), (86_400, False)]
)
def test_expiry_leaves_room_for_clocks_that_differ_and_no_more(late_seconds: float, accepted: bool) -> None:
    token, record = new_token(CALLER, now=NOW, lifetime=timedelta(hours=1))
    now = NOW + timedelta(hours=1, seconds=late_seconds)
    if accepted:
        assert verifier(record).verify(token, now=now) is record
    else:
        assert reason(verifier(record), token, now=now) == "TOKEN_EXPIRED"


def test_a_clock_that_is_a_day_behind_accepts_a_new_token() -> None:
    token, record = new_token(CALLER, now=NOW, lifetime=timedelta(hours=1))
    assert verifier(record).verify(token, now=NOW - timedelta(days=1)) is record


@settings(max_examples=50)
@given(st.one_of(st.text(), st.binary(), st.from_regex(TOKEN_PATTERN)))
def test_whatever_is_sent_is_nobody(sent: str | bytes) -> None:
    value = "Bearer " + sent if isinstance(sent, str) else b"Bearer " + sent
    token = read_bearer_token([("authorization", value)])
    _, record = new_token(CALLER, now=NOW, lifetime=None)
    with pytest.raises(UnauthenticatedError):
        verifier(record).verify(token or "", now=NOW)


def test_the_file_is_for_its_owner_alone_and_reads_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "tokens.toml"
    token, record = new_token(CALLER, now=NOW, lifetime=timedelta(days=1))
    with changing_tokens(path) as tokens:
        tokens.append(record)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert read_tokens(path).tokens == (record,)
    assert token[24:] not in path.read_text()


def test_an_interrupted_change_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "tokens.toml"
    add_token(path)
    before = path.read_bytes()
    with pytest.raises(ZeroDivisionError), changing_tokens(path) as tokens:
        tokens.clear()
        raise ZeroDivisionError
    assert path.read_bytes() == before


def test_tokens_that_are_made_at_the_same_time_are_all_there(tmp_path: Path) -> None:
    path = tmp_path / "tokens.toml"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda index: add_token(path, name=f"team-{index}"), range(16)))
    assert {token.name for token in read_tokens(path).tokens} == {f"team-{index}" for index in range(16)}


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "version"),
        ("tokens = [", "TOML"),
        ("version = 2", "version"),
        ("vresion = 1", "vresion"),
        ("[[tokens]]\nname = 'canary-value'", "tokens.0.scopes"),
        ("[[tokens]]\nscope = 'canary-value'", "tokens.0.scope"),
        ("[[tokens]]\nsha256 = 'canary-value'", "tokens.0.sha256"),
        ("a = " + "[" * 5000 + "]" * 5000, ""),
    ],
)
def test_a_file_that_is_none_is_refused_without_a_word_of_what_it_holds(tmp_path: Path, text: str, named: str) -> None:
    path = tmp_path / "tokens.toml"
    path.write_text(text)
    with pytest.raises(InvalidArgumentError) as caught:
        read_tokens(path)
    assert named in caught.value.message and str(path) in caught.value.message
    assert "canary" not in str(caught.value) + repr(caught.value.violations)


def test_two_tokens_of_one_name_with_other_limits_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokens.toml"
    add_token(path, requests_per_second=1.0)
    add_token(path, requests_per_second=1.0, scopes=["run.read"])
    with pytest.raises(InvalidArgumentError) as caught:
        add_token(path, requests_per_second=2.0)
    assert "one name is one caller" in caught.value.violations[0].description
    add_token(path, name="other", requests_per_second=2.0)


def test_the_command_makes_lists_and_revokes_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(tmp_path / "tokens.toml")
    create = ["token", "create", "team-a", "--file", path, "--scopes"]
    assert main([*create, "score,run.read", "--expires", "30d", "--weight", "2", "--concurrency", "4"]) == 0
    token = capsys.readouterr().out.strip()
    assert TOKEN_PATTERN.fullmatch(token)
    (record,) = read_tokens(Path(path)).tokens
    assert (sorted(record.scopes), record.weight, record.max_concurrency) == (["run.read", "score"], 2.0, 4)
    assert record.expires == record.created + timedelta(days=30)
    assert main(["token", "list", "--file", path, "--json"]) == 0
    text = capsys.readouterr().out
    assert json.loads(text)[0]["state"] == "valid" and "sha256" not in text
    assert main([*create, "score"]) == 1
    assert "LIMITS_DIFFER" in capsys.readouterr().err
    assert main(["token", "revoke", record.id, "--file", path]) == 0
    assert main(["token", "list", "--file", path]) == 0
    assert re.search(rf"{record.id}  revoked", capsys.readouterr().out)
    assert main(["token", "revoke", "nobody", "--file", path]) == 1
    assert main([*create, "everything"]) == 42
    assert main([*create, "score", "--expires", "soon"]) == 42


def test_the_token_is_printed_once_and_nothing_else_is(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "tether_services", "token", "create", "a", "--scopes", "score", "--file"]
    done = subprocess.run([*words, str(tmp_path / "t.toml")], capture_output=True, text=True, timeout=60)
    assert TOKEN_PATTERN.fullmatch(done.stdout.strip()) and done.stderr == ""


def test_names_of_the_services_own_callers_are_not_given_to_others() -> None:
    for own in (ANONYMOUS, SHADOW_CALLER):
        assert own.name in OWN_NAMES
        with pytest.raises(ValueError, match="choose another name"):
            CallerSettings(name=own.name, scopes=frozenset({"score"}))
