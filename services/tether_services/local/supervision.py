"""One service as a supervised child process: started, watched, restarted, stopped."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from asyncio.subprocess import Process
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2

from tether.credentials import VARIABLES
from tether.errors import FailedPreconditionError, InvalidArgumentError, TetherError, UnavailableError
from tether_services.runtime.health import LIVENESS
from tether_services.runtime.settings import CONFIG_ERROR_EXIT_CODE

Report = Callable[[str], None]
"""Takes one line of text per event."""

FIRST_BACKOFF_SECONDS: Final = 0.5
LAST_BACKOFF_SECONDS: Final = 30.0
"""Longest pause before a restart; the pauses double."""
STEADY_SECONDS: Final = 60.0
"""A child that has lived this long starts its next series of restarts at the first pause."""
POLL_SECONDS: Final = 0.1
PROBE_SECONDS: Final = 5.0
"""Pause before each liveness check of a child that serves, and how long its answer may take."""
HUNG_PROBES: Final = 3
"""A child is taken to hang after this many failed liveness checks in a row at least."""
HUNG_SECONDS: Final = 60.0
"""A child that has not passed one for this long is killed and started again: longer than a slow answer takes."""
LOG_TAIL_LINES: Final = 12
LOG_TAIL_CHARS: Final = 400
"""Of a log line, in an error message."""


@dataclass(frozen=True, slots=True)
class ChildSpec:
    """What to run and how to tell that it serves."""

    name: str
    """Name of the service."""
    module: str
    """Python module to run."""
    arguments: tuple[str, ...]
    """Its command line."""
    environment: Mapping[str, str]
    """Added to this process's own."""
    address: str
    """host:port whose health is asked."""
    log_file: Path
    """Where its output is appended."""


class Child:
    """A supervised child process."""

    def __init__(
        self,
        spec: ChildSpec,
        *,
        report: Report,
        probe_seconds: float = PROBE_SECONDS,
        hung_seconds: float = HUNG_SECONDS,
    ) -> None:
        """Prepare; `start` does the work.

        Args:
            spec: What to run.
            report: Called with one line per event.
            probe_seconds: See PROBE_SECONDS.
            hung_seconds: See HUNG_SECONDS.
        """
        self.spec = spec
        self._probe_seconds = probe_seconds
        self._hung_seconds = hung_seconds
        self.num_restarts = 0
        """How often it has died and been started again."""
        self.given_up: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        """Completed with the reason once restarting it cannot help."""
        self._report = report
        self._process: Process | None = None
        self._started = 0.0
        self._supervision: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        """The id of the process; None while there is none."""
        return self._process.pid if self._process is not None and self._process.returncode is None else None

    async def start(self, *, timeout_seconds: float) -> None:
        """Start the process, wait until it serves, and restart it from then on whenever it dies or hangs.

        Raises:
            FailedPreconditionError: It ended before it served; the message holds its last log lines.
            InvalidArgumentError: It did so because of its configuration.
            UnavailableError: It did not serve in time.
        """
        await self._spawn()
        await self._wait_until_serving(timeout_seconds)
        self._supervision = asyncio.create_task(self._supervise(timeout_seconds))

    async def stop(self, *, grace_seconds: float) -> None:
        """End the process and everything it started: SIGTERM, then SIGKILL after the grace. A repeat does nothing."""
        if self._supervision is not None:
            self._supervision.cancel()
            await asyncio.gather(self._supervision, return_exceptions=True)
        process, self._process = self._process, None
        if process is None:
            return
        try:
            if process.returncode is None:
                process.terminate()
                await asyncio.wait_for(process.wait(), grace_seconds)
        except TimeoutError:
            self._report(f"{self.spec.name} did not stop within {grace_seconds:g} s and is killed")
        finally:
            _kill_group(process.pid)
        await process.wait()
        self._report(f"{self.spec.name} stopped")

    async def _spawn(self) -> None:
        self.spec.log_file.parent.mkdir(parents=True, exist_ok=True)
        with self.spec.log_file.open("ab") as output:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "tether_services.runtime.child", str(os.getpid()), self.spec.module),
                *self.spec.arguments,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**without_credentials(os.environ), **self.spec.environment},
                start_new_session=True,  # Ctrl-C reaches this process alone, which then stops the children in order
            )
        self._started = time.monotonic()
        self._report(f"{self.spec.name} starting (pid {self._process.pid}, log {self.spec.log_file})")

    async def _wait_until_serving(self, timeout_seconds: float) -> None:
        process = self._process
        assert process is not None
        deadline = time.monotonic() + timeout_seconds
        async with grpc.aio.insecure_channel(self.spec.address) as channel:
            while not await _is_serving(channel, timeout_seconds=PROBE_SECONDS):
                if process.returncode is not None:
                    raise self._ended_early(process.returncode)
                if time.monotonic() > deadline:
                    raise UnavailableError(
                        f"{self.spec.name} did not serve within {timeout_seconds:g} s. {self._last_lines()}"
                    )
                await asyncio.sleep(POLL_SECONDS)
        seconds = time.monotonic() - self._started
        self._report(f"{self.spec.name} serving on {self.spec.address} after {seconds:.1f} s")

    def _ended_early(self, code: int) -> TetherError:
        message = f"{self.spec.name} {_describe_exit(code)} before it served. {self._last_lines()}"
        if code == CONFIG_ERROR_EXIT_CODE:
            return InvalidArgumentError(message, reason="INVALID_CONFIG")
        return FailedPreconditionError(message, reason="SERVICE_FAILED")

    async def _supervise(self, timeout_seconds: float) -> None:
        """Restart the process whenever it dies, until `stop` or until it cannot help."""
        pause = FIRST_BACKOFF_SECONDS
        while True:
            assert self._process is not None
            code = await self._wait_for_end(self._process)
            _kill_group(self._process.pid)
            died = f"{self.spec.name} {_describe_exit(code)}"
            if code == CONFIG_ERROR_EXIT_CODE:
                self.given_up.set_result(f"{died}. {self._last_lines()}")
                return
            if time.monotonic() - self._started > STEADY_SECONDS:
                pause = FIRST_BACKOFF_SECONDS
            self._report(f"{died}; restarting in {pause:g} s (log {self.spec.log_file})")
            await asyncio.sleep(pause)
            pause = min(2 * pause, LAST_BACKOFF_SECONDS)
            self.num_restarts += 1
            await self._spawn()
            await self._serve_again(timeout_seconds)

    async def _wait_for_end(self, process: Process) -> int:
        """Return the exit status of a process that serves; one that hangs is killed first."""
        watching = asyncio.create_task(self._kill_if_hung(process))
        try:
            return await process.wait()
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)

    async def _kill_if_hung(self, process: Process) -> None:
        """Kill the process once it has failed all liveness checks for long: stopped, deadlocked, or its engine dead."""
        failures, alive_at = 0, time.monotonic()
        async with grpc.aio.insecure_channel(self.spec.address) as channel:
            while failures < HUNG_PROBES or time.monotonic() - alive_at < self._hung_seconds:
                await asyncio.sleep(self._probe_seconds)
                if await _is_serving(channel, LIVENESS, timeout_seconds=self._probe_seconds):
                    failures, alive_at = 0, time.monotonic()
                else:
                    failures += 1
        if process.returncode is None:
            self._report(f"{self.spec.name} has failed all liveness checks for {self._hung_seconds:g} s and is killed")
            process.kill()

    async def _serve_again(self, timeout_seconds: float) -> None:
        """Wait until a restarted process serves, and kill it if it does not: the next round starts another one."""
        try:
            await self._wait_until_serving(timeout_seconds)
        except UnavailableError as error:
            self._report(error.message)
            if self._process is not None:
                self._process.kill()
        except (FailedPreconditionError, InvalidArgumentError):
            return  # it died: the next round reports that

    def _last_lines(self) -> str:
        """Return where the log is and how it ends."""
        try:
            with self.spec.log_file.open(encoding="utf-8", errors="replace") as file:
                lines = [line.rstrip()[:LOG_TAIL_CHARS] for line in deque(file, LOG_TAIL_LINES)]
        except OSError:
            lines = []
        tail = "".join(f"\n  | {line}" for line in lines)
        return f"Its log {self.spec.log_file} ends with:{tail or ' nothing'}"


async def _is_serving(channel: grpc.aio.Channel, name: str = "", *, timeout_seconds: float) -> bool:
    check = channel.unary_unary(
        "/grpc.health.v1.Health/Check",
        request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
        response_deserializer=health_pb2.HealthCheckResponse.FromString,
    )
    try:
        response = await check(health_pb2.HealthCheckRequest(service=name), timeout=timeout_seconds)
    except grpc.aio.AioRpcError:
        return False  # not listening yet, or silent
    return bool(response.status == health_pb2.HealthCheckResponse.SERVING)


def _describe_exit(code: int) -> str:
    if code < 0:
        return f"was ended by {signal.Signals(-code).name}"
    return f"ended with status {code}"


def _kill_group(pid: int) -> None:
    """Kill what the process has left behind in its group, such as the engine process of vLLM."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def without_credentials(environ: Mapping[str, str]) -> dict[str, str]:
    """Return an environment without the defaults of clients: they are meant for services elsewhere, not on loopback."""
    return {name: value for name, value in environ.items() if name not in VARIABLES}
