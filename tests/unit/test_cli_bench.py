"""`tether bench score`: its arguments."""

from __future__ import annotations

from pathlib import Path

import pytest

from tether_services.bench.plan import CallerPlan
from tether_services.cli.bench_commands import read_caller, read_plan, read_range
from tether_services.cli.main import build_parser, main

BASE = ["bench", "score", "--address", "127.0.0.1:1"]


def test_the_arguments_become_the_plan(tmp_path: Path) -> None:
    token = tmp_path / "busy.token"
    arguments = ["--caller", "polite=20", "--caller", f"busy=0:{token}", "--concurrency", "5", "--duration", "3"]
    arguments += ["--arrivals", "poisson", "--tokens", "9:11", "--form", "text", "--items-per-call", "2"]
    plan = read_plan(build_parser().parse_args([*BASE, *arguments]))
    assert plan.callers == (CallerPlan("polite", 20.0), CallerPlan("busy", 0.0, token))
    assert (plan.target, plan.concurrency, plan.duration_seconds, plan.arrivals) == ("127.0.0.1:1", 5, 3.0, "poisson")
    assert (plan.items.min_tokens, plan.items.max_tokens, plan.items.form, plan.items.per_call) == (9, 11, "text", 2)


def test_closed_and_rate_0_are_the_same() -> None:
    plans = [read_plan(build_parser().parse_args([*BASE, *more])) for more in (["--closed"], ["--rate", "0"])]
    assert plans[0] == plans[1] and plans[0].callers[0].rate == 0


@pytest.mark.parametrize(
    "arguments",
    [["bench", "score", "--rate", "1"], [*BASE], [*BASE, "--rate", "1", "--closed"], [*BASE, "--rate", "many"]],
)
def test_a_target_and_one_kind_of_rate_are_needed(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "usage:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (["--caller", "a"], "--caller"),
        (["--caller", "a=fast"], "--caller"),
        (["--caller", "a=1", "--token-file", "x"], "--token-file"),
        (["--rate", "1", "--tokens", "few"], "--tokens"),
        (["--rate", "1", "--report", "picture.pdf"], "--report"),
        (["--rate", "1", "--report", "/no/such/folder/picture.svg"], "--report"),
        (["--rate", "1", "--items", "/no/such/file"], "items"),
        (["--rate", "-1"], "callers.caller.rate"),
        (["--rate", "1", "--repeat-share", "1.5"], "items.repeat_share"),
    ],
)
def test_a_bad_argument_is_named_before_anything_is_sent(
    arguments: list[str], field: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*BASE, *arguments]) == 42
    shown = capsys.readouterr().err
    assert field in shown and "Traceback" not in shown


def test_small_forms_are_read() -> None:
    assert (read_range("8:9"), read_range("12")) == ((8, 9), (12, 12))
    assert read_caller("a=2.5") == CallerPlan("a", 2.5)


@pytest.mark.parametrize("content", [None, b"", b"two words", b"\xff\xfe"])
@pytest.mark.parametrize("form", ["--rate", "--caller"])
def test_a_file_without_a_token_is_refused_and_not_shown(
    form: str, content: bytes | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "token"
    if content is not None:
        path.write_bytes(content)
    given = ["--rate", "1", "--token-file", str(path)] if form == "--rate" else ["--caller", f"a=1:{path}"]
    assert main([*BASE, *given]) == 1
    shown = capsys.readouterr().err
    assert str(path) in shown and "words" not in shown and "Traceback" not in shown
    assert ("CREDENTIALS_UNREADABLE" if content is None else "BAD_TOKEN") in shown
