"""The process engine: starts workers, keeps their log, ends them, and says how they ended."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from tether_services.orchestrator.config import OrchestratorSettings
from tether_services.orchestrator.engine import WorkerExit
from tether_services.orchestrator.engines.process import ProcessEngine, read_last_line
from tether_services.orchestrator.records import Attempt
from tether_services.orchestrator.supervisor import describe_exit


def engine(code: str) -> ProcessEngine:
    return ProcessEngine(OrchestratorSettings(state_dir="somewhere"), command=(sys.executable, "-c", code))


def run(code: str, folder: Path) -> WorkerExit:
    return asyncio.run(engine(code).run(Attempt("demo", 2, folder)))


def test_a_worker_is_told_its_run_epoch_parent_and_settings(tmp_path: Path) -> None:
    run("import sys; print(sys.argv[1:])", tmp_path)
    said = (tmp_path / "worker.log").read_text()
    for part in ("'--run-id', 'demo'", "'--epoch', '2'", f"'--parent-pid', '{os.getpid()}'", '"state_dir":"somewhere"'):
        assert part in said


def test_the_end_of_a_worker_is_its_status_and_last_line(tmp_path: Path) -> None:
    code = "import sys; print('first'); print('MemoryError: no more', file=sys.stderr); sys.exit(7)"
    ended = run(code, tmp_path)
    assert ended == WorkerExit(7, "MemoryError: no more")
    assert describe_exit(ended) == (
        "the worker exited with status 7 without finishing the run; its log ends with: MemoryError: no more"
    )


def test_a_killed_worker_is_reported_with_its_signal(tmp_path: Path) -> None:
    ended = run("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", tmp_path)
    assert ended.code == -signal.SIGKILL
    assert "killed by signal 9" in describe_exit(ended)
    assert "(nothing)" in describe_exit(ended)


def test_the_log_of_an_earlier_attempt_is_kept(tmp_path: Path) -> None:
    run("print('attempt one')", tmp_path)
    run("print('attempt two')", tmp_path)
    assert (tmp_path / "worker.log").read_text().split("\n")[:2] == ["attempt one", "attempt two"]


def test_a_worker_that_cannot_be_started_is_an_error(tmp_path: Path) -> None:
    missing = ProcessEngine(OrchestratorSettings(), command=("/no/such/program",))
    with pytest.raises(OSError, match="No such file"):
        asyncio.run(missing.run(Attempt("demo", 1, tmp_path)))


def test_close_ends_a_worker_that_is_busy(tmp_path: Path) -> None:
    async def main() -> tuple[WorkerExit, float]:
        busy = engine("import time; print('working', flush=True); time.sleep(60)")
        running = asyncio.create_task(busy.run(Attempt("demo", 1, tmp_path)))
        while not (tmp_path / "worker.log").exists() or "working" not in (tmp_path / "worker.log").read_text():
            await asyncio.sleep(0.01)
        started = time.monotonic()
        await busy.close()
        return await running, time.monotonic() - started

    ended, seconds = asyncio.run(main())
    assert ended.code == -signal.SIGTERM
    assert seconds < 5


def test_cancelling_ends_the_worker(tmp_path: Path) -> None:
    async def main() -> int:
        busy = engine("import os, time; print(os.getpid(), flush=True); time.sleep(60)")
        running = asyncio.create_task(busy.run(Attempt("demo", 1, tmp_path)))
        while not (tmp_path / "worker.log").exists() or "\n" not in (tmp_path / "worker.log").read_text():
            await asyncio.sleep(0.01)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        return int((tmp_path / "worker.log").read_text())

    pid = asyncio.run(main())
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.parametrize(
    ("log", "last"),
    [
        ("", ""),
        ("one\ntwo\n\n", "two"),
        ('{"event": "run failed", "error": "reward at x: gone", "level": "ERROR"}\n', "run failed: reward at x: gone"),
        ('{"event": "step committed"}\n', "step committed"),
        ("[1, 2]\n", "[1, 2]"),
        ("x" * 200_000, "x" * 500),
        ("caf\xe9 \N{SNOWMAN}\n", "caf\xe9 \N{SNOWMAN}"),
    ],
)
def test_the_last_line_of_a_log_is_shortened_and_unpacked(tmp_path: Path, log: str, last: str) -> None:
    (tmp_path / "worker.log").write_text(log, encoding="utf-8")
    assert read_last_line(tmp_path / "worker.log") == last
