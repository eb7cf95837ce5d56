"""Runs scenarios and controls as processes of their own, some at a time, and returns what each of them wrote down."""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from tests.reliability.processes import LOADED_VARIABLE, Process
from tests.reliability.scenario import Scenario
from tether_services.runtime.threads import thread_environment

__all__ = ["TRIAL_FOLDER", "Job", "Result", "order_jobs", "run_jobs", "write_result"]

MANY: Final = 4
"""Jobs for which it is worth while to load the libraries once for all."""
TRIAL_FOLDER: Final = "trial"
"""Of a job, below the folder of its result."""
END_SECONDS: Final = 10.0
"""For a job that is told to end, until it is killed."""
GRACE_SECONDS: Final = 60.0
"""Beyond its own limit, until a process that does not end by itself is killed."""


@dataclass(frozen=True, slots=True)
class Result:
    """What is printed of one run of a scenario or of its control."""

    name: str
    passed: bool | None
    """None: skipped."""
    seconds: float
    text: str
    """Figures, or what went wrong."""

    @property
    def word(self) -> str:
        """Return the result in a word."""
        return "SKIP" if self.passed is None else "PASS" if self.passed else "FAIL"


@dataclass(frozen=True, slots=True)
class Job:
    """A scenario, or its control, to be run."""

    scenario: Scenario
    control: bool = False

    @property
    def name(self) -> str:
        """Return what it is called in the table, and which chance it has."""
        return f"{self.scenario.name} control" if self.control else self.scenario.name


def order_jobs(jobs: Sequence[Job]) -> list[Job]:
    """Return the jobs in the order that ends soonest with several at a time: long ones first, controls last."""
    return sorted(jobs, key=lambda job: (job.control, -job.scenario.usual_seconds))


async def run_jobs(
    jobs: Sequence[Job],
    *,
    at_once: int,
    command: Sequence[str],
    limit: Callable[[Job], float],
    keep: Callable[[Path, str], None],
) -> list[Result]:
    """Return the results in the order of the jobs; what each prints comes out whole when it ends.

    Args:
        jobs: All of them are run, whatever the others do.
        at_once: Processes at a time, and one more of the light ones.
        command: Runs the suite with the seed and the form.
        limit: The seconds after which a job has ended by itself.
        keep: Keeps the histories of a job, by its name, that left no result.
    """
    places = {False: asyncio.Semaphore(at_once), True: asyncio.Semaphore(1)}
    found: dict[Job, Result] = {}

    async def run(job: Job) -> None:
        async with places[job.scenario.light]:
            found[job] = await _run_job(job, command, limit(job) + GRACE_SECONDS, keep)

    with _loaded_libraries() if len(jobs) >= MANY else nullcontext():
        async with asyncio.TaskGroup() as group:
            for job in order_jobs(jobs):
                group.create_task(run(job))
    return [found[job] for job in jobs]


@contextmanager
def _loaded_libraries() -> Iterator[None]:
    """Have the worlds of all jobs fork from a process that has loaded the libraries."""
    with tempfile.TemporaryDirectory(prefix="tether-reliability-loaded-") as folder:
        socket, log_file = f"{folder}/fork.socket", Path(folder) / "log"
        environment = {**thread_environment(1), "PYTHONFAULTHANDLER": "1"}
        loaded = Process("loaded", "tests.reliability.fork_server", (socket,), log_file, socket, environment)
        loaded.launch()
        os.environ[LOADED_VARIABLE] = socket
        try:
            yield
        finally:
            del os.environ[LOADED_VARIABLE]
            loaded.kill()


async def _run_job(job: Job, command: Sequence[str], seconds: float, keep: Callable[[Path, str], None]) -> Result:
    """Run one job in a process and print what it printed."""
    with tempfile.TemporaryDirectory(prefix="tether-reliability-job-", ignore_cleanup_errors=True) as folder:
        output, answer = Path(folder) / "output", Path(folder) / "result.json"
        chosen = ["--job", job.name, str(answer), "--parent-pid", str(os.getpid())]
        started = time.monotonic()
        with output.open("wb") as file:
            child = await asyncio.create_subprocess_exec(*command, *chosen, stdout=file, stderr=file)
            try:
                with suppress(TimeoutError):
                    await asyncio.wait_for(child.wait(), seconds)
            finally:  # also where the suite is interrupted
                await _end(child)
        print(output.read_text(encoding="utf-8", errors="replace"), end="", flush=True)
        if answer.exists():
            return Result(**json.loads(answer.read_text(encoding="utf-8")))
        if (trial := Path(folder) / TRIAL_FOLDER).exists():
            keep(trial, job.name)
    result = Result(job.name, False, time.monotonic() - started, f"its process ended with status {child.returncode}")
    print(f"{result.word} {result.name} ({result.seconds:.0f} s) {result.text}", flush=True)
    return result


async def _end(child: asyncio.subprocess.Process) -> None:
    """Have a job end its processes if it still runs, and kill it if it does not end."""
    if child.returncode is not None:
        return
    child.terminate()
    try:
        await asyncio.wait_for(child.wait(), END_SECONDS)
    except TimeoutError:
        child.kill()
        await child.wait()


def write_result(result: Result, path: Path) -> None:
    """Leave a result for the process that waits for it."""
    path.write_text(json.dumps(asdict(result)), encoding="utf-8")
