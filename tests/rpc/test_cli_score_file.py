"""`tether score FILE` against real services: rows in and out, resuming, and every way in which it may end too early."""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import io
import json
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.rpc.many_items import Rewards
from tests.rpc.scripted_server import in_thread, serving_in_thread
from tests.rpc.serving import LOCAL, serving
from tests.unit.small_disk import run_on_disk
from tether import InternalError, NotFoundError
from tether_services.cli.main import main
from tether_services.reward.config import RewardSettings
from tether_services.reward.engines.fake import fake_text_score
from tether_services.reward.service import RewardService

SCORE_TO_DISK = """
import contextlib, io, sys
from tether_services.cli.main import main
with contextlib.redirect_stderr(io.StringIO()) as shown:
    status = main(["score", *sys.argv[2:], "--output", sys.argv[1] + "/out"])
print(status)
print(shown.getvalue())
"""


@asynccontextmanager
async def reward_service() -> AsyncIterator[str]:
    settings = RewardSettings.model_validate({**LOCAL, "engine": "fake"})
    async with serving(settings, lambda registry: RewardService(settings, registry)) as served:
        yield served.target


@pytest.fixture
def target() -> Iterator[str]:
    with in_thread(reward_service) as address:
        yield address


def write_rows(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pairs(count: int) -> list[dict[str, Any]]:
    return [{"prompt": "Once", "response": "x" * (1 + index % 50), "id": f"row {index}"} for index in range(count)]


def read(text: str | bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def score(*arguments: object, target: str) -> int:
    return main(["score", *map(str, arguments), "--address", target, "--timeout", "20"])


def test_a_row_is_written_per_row_with_its_other_keys(
    target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = pairs(150)
    assert score(write_rows(tmp_path / "rows.jsonl", rows), target=target) == 0
    shown = capsys.readouterr()
    written = read(shown.out)
    assert [row["id"] for row in written] == [row["id"] for row in rows]
    assert [row["index"] for row in written] == list(range(150))
    assert [row["score"] for row in written] == [fake_text_score("Once", row["response"]) for row in rows]
    assert set(written[0]) == {"id", "index", "score", "raw_score", "error", "model", "version", "row_sha256"}
    assert written[0]["row_sha256"] == hashlib.sha256(json.dumps(rows[0]).encode()).hexdigest()[:16]
    version = written[0]["version"]
    assert f"150 rows, 0 could not be scored; model default version {version}" in shown.err
    assert "score 150/150" in shown.err, "a plain line where there is no terminal"


def test_on_a_terminal_there_is_a_bar(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    rows = write_rows(tmp_path / "rows.jsonl", pairs(70))
    assert score(rows, "--output", tmp_path / "out", target=target) == 0
    shown = capsys.readouterr()
    assert "70/70" in shown.err and "elapsed" not in shown.err and not shown.out


def test_rows_may_have_any_form_and_come_from_stdin(
    target: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"prompt": "Once", "response": " upon", "score": 7, "note": {"a": [1]}},
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
        {"prompt_token_ids": [72, 105], "response_token_ids": [72]},
    ]
    lines = "\n".join(json.dumps(row) for row in rows) + "\n\n   \n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
    assert score("-", target=target) == 0
    shown = capsys.readouterr()
    first, *others = read(shown.out)
    assert first["score"] == fake_text_score("Once", " upon")
    assert first["input_score"] == 7 and first["note"] == {"a": [1]}
    assert len(others) == 2 and all(isinstance(row["score"], float) for row in others)
    assert "score 3  " in shown.err, "the total is not known"


def test_the_old_form_and_wrong_combinations_are_told_apart(
    target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert score("Once", " upon", target=target) == 0
    assert float(capsys.readouterr().out) == pytest.approx(fake_text_score("Once", " upon"), abs=1e-4)
    rows = write_rows(tmp_path / "rows.jsonl", pairs(1))
    cases = [
        (("Once", "a", "--output", tmp_path / "out"), "--output and --resume are for a FILE"),
        ((rows, "--json"), "leave --json away"),
        ((rows, "--resume"), "--output OUT --resume"),
        (("Once upon a time",), "or a prompt with responses"),
        ((tmp_path,), "Is a directory"),
        ((rows, "--output", tmp_path / "no" / "out"), "Cannot write"),
    ]
    for arguments, expected in cases:
        assert score(*arguments, target=target) == 1
        assert expected in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_row_that_cannot_be_scored_is_written_with_its_error_and_changes_the_status(
    target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [*pairs(70), {"prompt": "Once", "response": ""}, *pairs(3)]
    rows[72] = {"prompt_token_ids": [2**40], "response_token_ids": [1]}
    assert score(write_rows(tmp_path / "rows.jsonl", rows), target=target) == 1
    shown = capsys.readouterr()
    written = read(shown.out)
    assert [row["index"] for row in written if row["error"]] == [70, 72]
    assert written[70]["score"] is None and written[70]["raw_score"] is None
    assert written[70]["error"]["reason"] == "EMPTY" and written[70]["error"]["message"]
    assert "74 rows, 2 could not be scored" in shown.err


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("{", "not JSON"),
        ("[1]", "not an object"),
        ('"text"', "not an object"),
        ('{"prompt": "a"}', "response is missing"),
        ('{"text": "a"}', "no form of an item"),
        ('{"prompt": "a", "response": "b", "messages": []}', "several forms"),
        ('{"prompt": 1, "response": "b"}', "prompt is not a text"),
        ('{"messages": {"role": "user"}}', "messages is not a list"),
        ('{"messages": [{"role": "user"}]}', "messages[0].content is not a text"),
        ('{"prompt_token_ids": [1], "response_token_ids": [1.5]}', "response_token_ids is not a list of whole"),
        ('{"prompt_token_ids": [true], "response_token_ids": [1]}', "prompt_token_ids is not a list of whole"),
        ('{"prompt": "a", "response": "b", "weight": NaN}', "NaN is no JSON"),
        ('{"prompt": "a", "response": "b", "weight": 1e999}', "a number is too large"),
        ('{"prompt": "a", "response": "b", "prompt": "c"}', "'prompt' is there twice"),
        ('{"prompt": "a", "response": "b", "meta": {"n": 1, "n": 2}}', "'n' is there twice"),
        ('{"prompt": "a", "response": "b", "score": 1, "input_score": 2}', "rename one"),
        ("[" * 100_000, "nested too deep"),
        (b"\xff\xfe", "not UTF-8"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_malformed_row_is_named_with_its_line_before_anything_is_scored(
    line: str | bytes, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.jsonl"
    good = json.dumps(pairs(1)[0]).encode()
    path.write_bytes(b"\n".join([good, b"", line if isinstance(line, bytes) else line.encode(), good]))
    assert score(path, "--output", tmp_path / "out", target="127.0.0.1:1") == 1
    shown = capsys.readouterr().err
    assert f"{path}, line 3" in shown and expected in shown and "MALFORMED_ROW" in shown


def test_an_existing_file_is_neither_overwritten_nor_written_by_two(
    target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, out = write_rows(tmp_path / "rows.jsonl", pairs(3)), tmp_path / "out.jsonl"
    assert score(rows, "--output", out, target=target) == 0
    before = out.read_bytes()
    assert score(rows, "--output", out, target=target) == 1
    assert "OUTPUT_EXISTS" in capsys.readouterr().err
    with out.open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert score(rows, "--output", out, "--resume", target=target) == 1
    assert "OUTPUT_IN_USE" in capsys.readouterr().err
    assert out.read_bytes() == before


@pytest.mark.parametrize(
    "cut", ["after a row", "within a row", "before the first", "after the last", "torn after all", "no file"]
)
def test_resuming_makes_the_same_file_as_one_go(cut: str, tmp_path: Path) -> None:
    rows, whole, out = write_rows(tmp_path / "rows.jsonl", pairs(95)), tmp_path / "whole", tmp_path / "out"
    servicer = Rewards()
    with serving_in_thread(servicer.add) as target:
        assert score(rows, "--output", whole, target=target) == 0
        lines = whole.read_bytes().splitlines(keepends=True)
        begun = {
            "after a row": b"".join(lines[:41]),
            "within a row": b"".join(lines[:41]) + lines[41][:30],
            "before the first": lines[0][:5],
            "after the last": b"".join(lines),
            "torn after all": b"".join(lines) + b'{"id": "row',
        }
        if cut in begun:
            out.write_bytes(begun[cut])
        kept = {"before the first": 0, "no file": 0, "after the last": 95, "torn after all": 95}.get(cut, 41)
        servicer.sizes.clear()
        assert score(rows, "--output", out, "--resume", target=target) == 0
    assert out.read_bytes() == whole.read_bytes()
    assert sum(count for count, _ in servicer.sizes) == 95 - kept, "no row is scored twice"


@pytest.mark.parametrize("num_kept", [0, 1, 30, 66, 90, 94])
def test_rows_that_cannot_be_sent_are_the_same_after_resuming(num_kept: int, target: str, tmp_path: Path) -> None:
    """Neither the message nor the model of such a row depends on the call that it would have been in."""
    rows = pairs(95)
    for index in (*range(70), 80, 93, 94):  # a whole call of them first, and nothing else in the end
        rows[index] = {"prompt": "half", "response": "\ud800"}
    given, whole, out = write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "whole", tmp_path / "out"
    assert score(given, "--output", whole, target=target) == 1
    out.write_bytes(b"".join(whole.read_bytes().splitlines(keepends=True)[:num_kept]))
    assert score(given, "--output", out, "--resume", target=target) == 1
    assert out.read_bytes() == whole.read_bytes()


def test_resuming_reads_past_the_rows_that_are_done_on_stdin_too(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, whole, out = write_rows(tmp_path / "rows.jsonl", pairs(20)), tmp_path / "whole", tmp_path / "out"
    assert score(rows, "--output", whole, target=target) == 0
    out.write_bytes(b"".join(whole.read_bytes().splitlines(keepends=True)[:7]))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(rows.read_bytes())))
    assert score("-", "--output", out, "--resume", target=target) == 0
    assert out.read_bytes() == whole.read_bytes()


def test_other_rows_or_files_of_others_are_not_continued(
    target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, out = write_rows(tmp_path / "rows.jsonl", pairs(10)), tmp_path / "out"
    assert score(rows, "--output", out, target=target) == 0
    good = out.read_bytes()
    changed = pairs(10)
    changed[4]["prompt"] = "Twice"
    cases: list[tuple[Path, bytes, str]] = [
        (write_rows(tmp_path / "changed", changed), good, "line 5: the file has another row there"),
        (write_rows(tmp_path / "fewer", pairs(6)), good, "line 7: the file has no such row"),
        (write_rows(tmp_path / "more", [pairs(1)[0], *pairs(10)]), good, "line 2: the file has another row"),
        (rows, rows.read_bytes(), "line 1 was not written by this command"),
        (rows, good.splitlines(keepends=True)[1], "index is not 0"),
        (rows, b"garbage\n" + good, "line 1 was not written by this command"),
    ]
    for path, begun, expected in cases:
        out.write_bytes(begun)
        assert score(path, "--output", out, "--resume", target=target) == 1
        shown = capsys.readouterr().err
        assert expected in shown and "OUTPUT_DIFFERS" in shown
        assert out.read_bytes() == begun


def test_another_version_of_the_model_does_not_continue_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Strict(Rewards):
        async def Score(self, request: Any, context: Any) -> Any:
            if request.version not in ("", self.version):
                raise NotFoundError(f"Model length is loaded in version {self.version}.", reason="VERSION_NOT_FOUND")
            return await super().Score(request, context)

    servicer, out = Strict(), tmp_path / "out"
    rows = write_rows(tmp_path / "rows.jsonl", pairs(30))
    with serving_in_thread(servicer.add) as target:
        assert score(write_rows(tmp_path / "fewer", pairs(20)), "--output", out, target=target) == 0
        begun = out.read_bytes()
        assert score(rows, "--output", out, "--resume", "--model-version", "9", target=target) == 1
        shown = capsys.readouterr().err
        assert "MODEL_CHANGED" in shown and "scored by model length version 1" in shown
        servicer.version = "2"
        assert score(rows, "--output", out, "--resume", target=target) == 1
        shown = capsys.readouterr().err
        assert "MODEL_CHANGED" in shown and "begun with model length version 1" in shown and ".." not in shown
        assert out.read_bytes() == begun
        servicer.version = "1"
        assert score(rows, "--output", out, "--resume", target=target) == 0
    assert len(read(out.read_bytes())) == 30


def test_nothing_to_go_on_with_is_not_told_to_be_gone_on_with(
    target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, out = write_rows(tmp_path / "rows.jsonl", pairs(3)), tmp_path / "out"
    assert score(rows, "--concurrency", "0", target=target) == 1
    assert "--resume" not in capsys.readouterr().err
    assert score(rows, "--concurrency", "0", "--output", out, target=target) == 1
    assert f"--output {out} --resume" in capsys.readouterr().err, "the file is there now"
    assert score(write_rows(tmp_path / "empty", []), target=target) == 0
    assert capsys.readouterr().err.splitlines()[-1] == "0 rows, 0 could not be scored"


def test_a_failed_call_leaves_what_was_scored_and_says_how_to_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def behaviour(call: int) -> None:
        if call == 4:
            raise InternalError("Broken.")

    rows, out = write_rows(tmp_path / "rows.jsonl", pairs(100)), tmp_path / "out"
    with serving_in_thread(Rewards(behaviour).add) as target:
        assert score(rows, "--output", out, target=target) == 1
        assert len(read(out.read_bytes())) == 30
        shown = capsys.readouterr().err
        assert f"30 rows are written; go on after them with --output {out} --resume" in shown and "INTERNAL" in shown
        assert score(rows, "--output", out, "--resume", target=target) == 0
    assert [row["index"] for row in read(out.read_bytes())] == list(range(100))


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL], ids=["interrupted", "killed"])
def test_a_command_that_is_ended_in_the_middle_is_resumed(sent: signal.Signals, tmp_path: Path) -> None:
    async def slow_after_some(call: int) -> None:
        await asyncio.sleep(0.0 if call <= 8 or stopped else 0.2)

    stopped: list[bool] = []
    rows, out = write_rows(tmp_path / "rows.jsonl", pairs(1000)), tmp_path / "out"
    with serving_in_thread(Rewards(slow_after_some).add) as target:
        words = ["score", str(rows), "--output", str(out), "--address", target]
        process = subprocess.Popen([sys.executable, "-m", "tether_services", *words], stderr=subprocess.PIPE, text=True)
        assert process.stderr is not None
        while not (out.exists() and out.read_bytes().count(b"\n") >= 50) and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(sent)
        _, shown = process.communicate(timeout=30)
        stopped.append(True)
        assert 50 <= out.read_bytes().count(b"\n") < 1000
        if sent == signal.SIGINT:
            assert process.returncode == 130 and f"--output {out} --resume" in shown and "Traceback" not in shown
        assert score(rows, "--output", out, "--resume", target=target) == 0
    written = read(out.read_bytes())
    assert [row["index"] for row in written] == list(range(1000))
    assert [row["score"] for row in written] == [float(1 + index % 50) for index in range(1000)]


def test_a_reader_that_has_enough_ends_it_quietly(target: str, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", pairs(5000))
    tether = f"{sys.executable} -m tether_services score {rows} --address {target}"
    done = subprocess.run(f"{tether} | head -n 1", shell=True, capture_output=True, text=True, timeout=60)
    assert len(read(done.stdout)) == 1 and "Traceback" not in done.stderr and "rror" not in done.stderr


def test_a_full_disk_is_an_error_that_says_so(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", pairs(2000))
    with serving_in_thread(Rewards().add) as target:
        words = (str(rows), "--address", target)
        shown = run_on_disk(tmp_path / "disk", SCORE_TO_DISK, *words, options="size=64k")
    status, _, message = shown.partition("\n")
    assert status == "1" and "STORAGE_FULL" in message and "Traceback" not in message
