"""Real services as child processes that can be killed, stopped and started again, and that never outlive this one."""

from __future__ import annotations

import asyncio
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

__all__ = ["LOADED_VARIABLE", "Process", "is_stopped", "poll_until", "wait_for_socket"]

LOADED_VARIABLE: Final = "TETHER_RELIABILITY_LOADED"
"""Names the socket of a fork server that the fork servers of all worlds are forked from; unset: there is none."""
POLL_SECONDS: Final = 0.05
LOG_TAIL_BYTES: Final = 4000


async def poll_until(done: Callable[[], Awaitable[bool]], *, seconds: float, what: str) -> float:
    """Wait until something is so and return the seconds that took.

    Raises:
        AssertionError: It is not so in time.
    """
    started = time.monotonic()
    while not await done():
        if time.monotonic() - started > seconds:
            raise AssertionError(f"after {seconds:g} s still not: {what}")
        await asyncio.sleep(POLL_SECONDS)
    return time.monotonic() - started


async def wait_for_socket(path: str) -> None:
    """Wait until a fork server listens there; nothing to wait for if the path is empty."""

    async def there() -> bool:
        return not path or Path(path).exists()

    await poll_until(there, seconds=120, what=f"a fork server listens at {path}")


class _Forked:
    """A child of the fork server, with what a scenario needs of Popen."""

    def __init__(self, path: str, arguments: Sequence[str], environment: Mapping[str, str], log: int) -> None:
        """Have it forked.

        Args:
            path: The fork server's socket.
            arguments: Of launch.py.
            environment: Further variables.
            log: Handle of the file that takes its output.
        """
        self._status: int | None = None
        self._server = socket.socket(socket.AF_UNIX)
        self._server.connect(path)
        wanted = {"service": True, "folder": os.getcwd(), "environment": environment, "arguments": arguments}
        socket.send_fds(self._server, [json.dumps(wanted).encode()], [log, log])
        self._answers = self._server.makefile("r")
        self.pid = int(self._answers.readline())

    def poll(self) -> int | None:
        """Return the exit status; None while it runs."""
        ended, _, _ = select.select([self._server], [], [], 0) if self._status is None else ([], [], [])
        return self.wait() if ended else self._status

    def wait(self) -> int:
        """Return the exit status once it has ended."""
        if self._status is None:
            self._status = int(self._answers.readline() or -signal.SIGKILL)  # no answer: the server was killed with it
            self._answers.close()
            self._server.close()
        return self._status

    def kill(self) -> None:
        """Kill -9."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


@dataclass(slots=True)
class Process:
    """One service of the product at a fixed address."""

    name: str
    module: str
    arguments: Sequence[str]
    log_file: Path
    address: str
    environment: Mapping[str, str] = field(default_factory=dict)
    launch_options: Sequence[str] = ()
    """Further options of launch.py."""
    fork_socket: str = ""
    """Where the fork server listens that it is forked from; empty: it is started anew."""
    starts: int = 0
    """How often it was started."""
    _child: subprocess.Popen[bytes] | _Forked | None = None

    @property
    def pid(self) -> int:
        """Return the process id.

        Raises:
            AssertionError: It is not running.
        """
        assert self._child is not None and self._child.poll() is None, f"{self.name} does not run:\n{self.log_tail()}"
        return self._child.pid

    async def start(self, *, seconds: float = 120.0) -> float:
        """Start it, wait until it serves, and return the seconds that took."""
        self.launch()
        return await self.wait_until_serving(seconds=seconds)

    async def run(self, *, seconds: float) -> int:
        """Start it, wait until it has ended by itself, and return its exit status."""
        self.launch()

        async def ended() -> bool:
            return not self.alive

        await poll_until(ended, seconds=seconds, what=f"{self.name} has ended")
        assert self._child is not None
        return self._child.wait()

    def launch(self) -> None:
        """Start it without waiting."""
        assert self._child is None or self._child.poll() is not None, f"{self.name} runs already"
        self.starts += 1
        options = ["--parent-pid", str(os.getpid()), "--role", self.name, "--index", str(self.starts)]
        arguments = [*options, *self.launch_options, self.module, *self.arguments]
        with self.log_file.open("ab") as log:
            if self.fork_socket:
                self._child = _Forked(self.fork_socket, arguments, self.environment, log.fileno())
                return
            self._child = subprocess.Popen(
                [sys.executable, "-m", "tests.reliability.launch", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **self.environment},
            )

    async def wait_until_serving(self, *, seconds: float = 120.0) -> float:
        """Wait until its health says that it serves, and return the seconds that took."""

        async def serving() -> bool:
            assert self.pid
            return await is_serving(self.address)

        return await poll_until(serving, seconds=seconds, what=f"{self.name} serves at {self.address}")

    def kill(self) -> None:
        """Kill -9, and wait for the end; nothing if it has ended."""
        if self._child is not None:
            self._child.kill()
            self._child.wait()

    def stop(self) -> None:
        """Freeze it: connections stay, nothing answers."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on after `stop`."""
        os.kill(self.pid, signal.SIGCONT)

    @property
    def alive(self) -> bool:
        """Return whether it runs, frozen or not."""
        return self._child is not None and self._child.poll() is None

    @property
    def exit_code(self) -> int | None:
        """Return how it ended; None while it runs."""
        return self._child.poll() if self._child is not None else None

    def children(self) -> list[int]:
        """Return the ids of its own children, ended ones that it has not noticed included."""
        listed = Path(f"/proc/{self.pid}/task/{self.pid}/children")
        return [int(word) for word in listed.read_text().split()]

    def log_tail(self) -> str:
        """Return the end of its log."""
        if not self.log_file.exists():
            return "(no log)"
        return self.log_file.read_bytes()[-LOG_TAIL_BYTES:].decode("utf-8", "replace")


def is_stopped(pid: int) -> bool:
    """Return whether a process was stopped by a signal; one that has ended was not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except OSError:
        return False


async def is_serving(address: str) -> bool:
    """Return whether the service at an address says that it serves; of a socket's path whether it is there."""
    if address.startswith("/"):
        return Path(address).exists()
    async with grpc.aio.insecure_channel(address, options=[("grpc.enable_retries", 0)]) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        try:
            answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=2)  # type: ignore[attr-defined]
        except grpc.aio.AioRpcError:
            return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)
