"""Runs each attempt in a process of its own, so that training never shares memory or an event loop with the service."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
from asyncio.subprocess import Process
from collections.abc import Sequence
from pathlib import Path

from tether_services.orchestrator.config import OrchestratorSettings
from tether_services.orchestrator.engine import WorkerExit
from tether_services.orchestrator.records import Attempt
from tether_services.runtime.logging import log_event

__all__ = ["WORKER_COMMAND", "ProcessEngine"]

log = logging.getLogger(__name__)

WORKER_COMMAND = (sys.executable, "-m", "tether_services.orchestrator.worker")
_GRACE_SECONDS = 5.0
"""Between SIGTERM and SIGKILL."""
_TAIL_BYTES = 64 * 1024
_LINE_CHARS = 500


class ProcessEngine:
    """Spawns a worker per attempt; its log goes to worker.log in the folder of the run."""

    def __init__(self, settings: OrchestratorSettings, *, command: Sequence[str] = WORKER_COMMAND) -> None:
        """Remember what to start.

        Args:
            settings: Passed on to the worker.
            command: Program and first arguments; tests pass a small one that keeps the same promises.
        """
        self._settings = settings
        self._command = tuple(command)
        self._processes: set[Process] = set()
        self._closed = False

    async def run(self, attempt: Attempt) -> WorkerExit:
        """Start the worker, wait for it, and return how it ended."""
        attempt.directory.mkdir(parents=True, exist_ok=True)
        log_file = attempt.directory / "worker.log"
        process = await self._spawn(attempt, log_file)
        log_event(log, "worker started", run_id=attempt.run_id, epoch=attempt.epoch, pid=process.pid)
        self._processes.add(process)
        try:
            if self._closed:  # while the process was being started
                await _end(process)
            code = await process.wait()
        finally:
            await _end(process)
            self._processes.discard(process)
        log_event(log, "worker ended", run_id=attempt.run_id, epoch=attempt.epoch, code=code)
        return WorkerExit(code, await asyncio.to_thread(read_last_line, log_file))

    async def close(self) -> None:
        """End all workers, with SIGKILL where SIGTERM is not enough."""
        self._closed = True
        await asyncio.gather(*(_end(process) for process in set(self._processes)))

    async def _spawn(self, attempt: Attempt, log_file: Path) -> Process:
        with log_file.open("ab") as output:
            return await asyncio.create_subprocess_exec(
                *self._command,
                *("--settings", self._settings.model_dump_json()),
                *("--run-id", attempt.run_id),
                *("--epoch", str(attempt.epoch)),
                *("--parent-pid", str(os.getpid())),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )


async def _end(process: Process) -> None:
    """Stop a process that is still running: SIGTERM, then SIGKILL."""
    if process.returncode is not None:
        return
    process.terminate()
    try:
        await asyncio.wait_for(process.wait(), _GRACE_SECONDS)
    except TimeoutError:
        process.kill()
        await process.wait()


def read_last_line(path: Path) -> str:
    """Return the last line of a log, shortened; of a JSON line its event and error."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
        lines = file.read().decode("utf-8", "replace").strip().splitlines()
    return _shorten(lines[-1] if lines else "")


def _shorten(line: str) -> str:
    """Return the event and error of one of our log lines, any other line as it is."""
    try:
        fields = json.loads(line)
    except ValueError:
        fields = None
    if isinstance(fields, dict) and "event" in fields:
        line = ": ".join(str(fields[key]) for key in ("event", "error") if fields.get(key))
    return line[:_LINE_CHARS]
