"""What docs/clients.md shows works as it stands there."""

from __future__ import annotations

import re
import shlex
import textwrap
from pathlib import Path

import pytest

from tests.rpc.scripted_server import in_thread
from tests.rpc.test_cli_score_file import reward_service
from tether.channel import MAX_PUSHBACKS, PUSHBACK_JITTER
from tether.credentials import VARIABLES
from tether.score_stream import CALL_BYTES, CONCURRENCY
from tether_services.cli.main import build_parser

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "clients.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)
PROGRAMS = [content for language, content in BLOCKS if language == "python"]


@pytest.mark.parametrize("program", [p for p in PROGRAMS if "with " in p], ids=lambda p: p.split("\n")[0])
def test_the_programs_run(program: str, capsys: pytest.CaptureFixture[str]) -> None:
    with in_thread(reward_service) as target:
        assert "127.0.0.1:50052" in program
        exec(compile(program.replace("127.0.0.1:50052", target), "clients.md", "exec"), {"__name__": "example"})
    assert capsys.readouterr().out


def test_the_other_programs_are_python() -> None:
    assert len(PROGRAMS) == 4
    for program in PROGRAMS:
        compile(textwrap.dedent(program), "clients.md", "exec")


def test_the_commands_are_accepted() -> None:
    lines = [line for _, block in BLOCKS for line in block.splitlines() if line.startswith("tether ")]
    assert len(lines) >= 6
    for line in lines:
        build_parser().parse_args(shlex.split(line.split(" > ")[0])[1:])


def test_the_variables_and_figures_are_those_of_the_code() -> None:
    assert set(re.findall(r"^\| `(TETHER_\w+)`", TEXT, re.MULTILINE)) == VARIABLES
    assert f"at most {MAX_PUSHBACKS} times" in TEXT and PUSHBACK_JITTER == 0.5
    assert f"{CALL_BYTES // 1024} KiB" in TEXT and f"({CONCURRENCY} + 2 unless" in TEXT
