"""`tether bench score` against a service on a loopback port."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.rpc.certificates import authority, service_files
from tests.rpc.scripted_server import in_thread
from tests.rpc.serving import LOCAL, serving
from tests.rpc.token_inputs import add_token
from tether_services.cli.main import main
from tether_services.reward.config import RewardSettings
from tether_services.reward.engines import fake
from tether_services.reward.service import RewardService


@asynccontextmanager
async def reward_service() -> AsyncIterator[str]:
    settings = RewardSettings.model_validate(LOCAL | {"admin_address": "127.0.0.1:0"} | {"engine": "fake"})
    async with serving(settings, lambda registry: RewardService(settings, registry)) as served:
        yield served.target


@pytest.fixture(scope="module")
def target() -> Iterator[str]:
    with in_thread(reward_service) as address:
        yield address


@asynccontextmanager
async def secured_service(folder: Path) -> AsyncIterator[str]:
    """Serve with TLS, and the tokens of two callers in polite.token and busy.token; busy may call twice a second."""
    files = service_files(folder)
    (folder / "ca.pem").write_bytes(authority().root)
    for name, rate in (("polite", None), ("busy", 2.0)):
        token = add_token(folder / "tokens.toml", name=name, requests_per_second=rate)
        (folder / f"{name}.token").write_text(f"{token}\n")
    secured = {"tls": files.settings(), "tokens_file": str(folder / "tokens.toml")}
    settings = RewardSettings.model_validate(LOCAL | secured | {"engine": "fake"})
    async with serving(settings, lambda registry: RewardService(settings, registry)) as served:
        yield served.target


def bench(target: str, *arguments: str) -> int:
    return main(["bench", "score", "--address", target, "--duration", "0.3", *arguments])


def test_a_load_prints_tables_and_its_own_honesty(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(target, "--caller", "polite=20", "--caller", "busy=100", "--arrivals", "poisson") == 0
    shown = capsys.readouterr().out
    for words in ("polite", "busy", "total", "p99.9", "OK, since due", "OK, since sent", "this generator: sent late by",
                  "scores by the oracle", "share"):  # fmt: skip
        assert words in shown
    assert max(map(len, shown.splitlines())) < 200


def test_a_secured_service_is_loaded_with_the_credentials_of_every_caller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    token, ca = str(tmp_path / "polite.token"), str(tmp_path / "ca.pem")
    with in_thread(lambda: secured_service(tmp_path)) as secured:
        callers = ["--caller", f"polite=50:{token}", "--caller", f"busy=50:{tmp_path / 'busy.token'}"]
        assert bench(secured, *callers, "--ca-file", ca, "--json") == 0
        polite, busy = json.loads(capsys.readouterr().out)["callers"]
        assert (polite["num_ok"], polite["num_rejected"]) == (15, 0), "nobody else's quota is its own"
        assert busy["num_rejected"] >= 10 and {each["reason"] for each in busy["rejections"]} == {"QUOTA_REQUESTS"}
        assert bench(secured, "--rate", "50", "--token-file", token, "--ca-file", ca) == 0
        assert bench(secured, "--rate", "50", "--ca-file", ca) == 1
        assert "TOKEN_MISSING" in capsys.readouterr().out
        monkeypatch.setenv("TETHER_TOKEN_FILE", token)
        monkeypatch.setenv("TETHER_CA_FILE", ca)
        assert bench(secured, "--rate", "50") == 0


def test_a_token_does_not_leave_the_machine_unencrypted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "token").write_text("hush")
    assert bench("192.0.2.1:1", "--rate", "1", "--token-file", str(tmp_path / "token")) == 1
    shown = capsys.readouterr().err
    assert "PLAINTEXT_TOKEN" in shown and "hush" not in shown


def test_json_is_the_document_alone(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(target, "--rate", "100", "--json") == 0
    shown = capsys.readouterr()
    document: dict[str, Any] = json.loads(shown.out)
    assert shown.err == ""
    assert (document["passed"], document["report_version"], document["total"]["num_ok"]) == (True, 1, 30)
    assert document["callers"][0]["name"] == "caller" and document["callers"][0]["rejected_latency"] is None


def test_a_wrong_answer_is_exit_status_1(
    target: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fake, "fake_score", lambda prompt, response, *, salt: 0.5)
    assert bench(target, "--rate", "50") == 1
    assert "answers were wrong" in capsys.readouterr().out


@pytest.mark.parametrize("ending", ["svg", "png"])
def test_a_picture_is_drawn(target: str, tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"picture.{ending}"
    assert bench(target, "--closed", "--concurrency", "2", "--report", str(path)) == 0
    assert path.read_bytes().startswith(b"<?xml" if ending == "svg" else b"\x89PNG")


def test_items_of_a_file_are_sent(target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "items.jsonl"
    path.write_text('{"prompt": "p", "response": "r"}\n{"response": "canary"}\n')
    assert bench(target, "--rate", "50", "--items", str(path), "--items-per-call", "2", "--json") == 0
    shown = capsys.readouterr().out
    document = json.loads(shown)
    assert document["checks"]["num_by_oracle"] == 30
    assert document["generator"]["num_repeated_items"] == 28
    assert "canary" not in shown


def test_ctrl_c_ends_the_load_with_the_report_so_far(target: str) -> None:
    arguments = ["bench", "score", "--address", target, "--rate", "100", "--duration", "60", "--json"]
    code = f"import sys; sys.argv[1:] = {arguments!r}; " + TELL_START
    command = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert command.stderr is not None
        assert "under way" in command.stderr.readline()
        command.send_signal(signal.SIGINT)
        shown, errors = command.communicate(timeout=30)
    finally:
        command.kill()
    assert command.returncode == 130, errors
    document = json.loads(shown)
    assert document["interrupted"] and document["total"]["num_ok"] > 0
    assert "Traceback" not in errors


TELL_START = """
from tether_services.bench import run
from tether_services.cli.main import main
told = run._Load._tell
def tell(self, on_progress):
    def say(progress):
        if progress.num_ok:
            print("under way", file=sys.stderr, flush=True)
    return told(self, say)
run._Load._tell = tell
sys.exit(main())
"""
