"""Forks workers and services from a process that has loaded the libraries: a restart then takes tenths of a second.

    python -m tests.reliability.launch --parent-pid PID tests.reliability.fork_server SOCKET [SABOTAGE ...]

The orchestrator starts fork_client.py in place of the worker; that asks here for a worker with its own arguments,
output and working folder, waits, and ends as the worker ended. If it is ended itself, its worker is killed.
The suite asks for services in the same way (processes.py) and is told their process id first. Where many scenarios run,
the fork server of each is forked from one of the runner, so that the libraries are loaded once.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import selectors
import signal
import socket
import sys
import threading
from dataclasses import dataclass
from typing import Any, Final

__all__ = ["main"]

POLL_SECONDS: Final = 0.01
OUT_OF_REACH: Final = "out of reach"
"""Trait of a worker that outlives the end of its client, as one on another machine would."""
MAX_REQUEST_BYTES: Final = 64 * 1024
LIBRARIES: Final = (
    "torch",
    "transformers",
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
    "peft",
    "safetensors.torch",
    "pydantic",
    "psutil",
    "matplotlib.pyplot",
    "google.protobuf.message",
)


@dataclass(slots=True)
class _Forked:
    """A forked process and the connection of who wants to know its end."""

    pid: int
    client: socket.socket


def main() -> int:
    """Serve until this process is killed."""
    _load()
    path, *sabotage = sys.argv[1:]
    workers: list[_Forked] = []
    lets_go = OUT_OF_REACH in sabotage
    sabotage = [name for name in sabotage if name != OUT_OF_REACH]
    with socket.socket(socket.AF_UNIX) as listener, selectors.DefaultSelector() as selector:
        listener.bind(f"{path}.new")
        listener.listen()
        os.rename(f"{path}.new", path)  # who finds it there can connect
        selector.register(listener, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select(POLL_SECONDS):
                if key.fileobj is listener:
                    forked = _accept(listener, sabotage)
                    workers.append(forked)
                    selector.register(forked.client, selectors.EVENT_READ)
                    continue
                selector.unregister(key.fileobj)
                if not lets_go:
                    _kill_of(key.fileobj, workers)
            for forked in [worker for worker in workers if _tell_end(worker)]:
                with contextlib.suppress(KeyError):  # its client is gone
                    selector.unregister(forked.client)
                forked.client.close()
                workers.remove(forked)


def _load() -> None:
    """Import the libraries that take long: none may start a thread, and gRPC is for the forked process alone.

    gRPC neither supports a fork once it is used nor says whether it is.
    """
    for name in LIBRARIES:
        importlib.import_module(name)
    assert "grpc" not in sys.modules, "gRPC is loaded: forking is not safe"
    threads = os.listdir("/proc/self/task")
    assert threading.active_count() == len(threads) == 1, f"{len(threads)} threads: forking is not safe any more"


def _accept(listener: socket.socket, sabotage: list[str]) -> _Forked:
    """Fork the process that a client asks for."""
    client, _ = listener.accept()
    request, handles, _, _ = socket.recv_fds(client, MAX_REQUEST_BYTES, 2)
    wanted = json.loads(request)
    pid = os.fork()
    if pid == 0:
        listener.close()
        client.close()
        os._exit(_become(wanted, handles, sabotage))
    for handle in handles:
        os.close(handle)
    if "service" in wanted:
        client.send(f"{pid}\n".encode())
    return _Forked(pid, client)


def _become(wanted: dict[str, Any], handles: list[int], sabotage: list[str]) -> int:
    """Be the worker or the service, and return its exit status."""
    os.chdir(wanted["folder"])
    os.environ.update(wanted.get("environment", {}))
    for handle, standard in zip(handles, (1, 2), strict=True):
        os.dup2(handle, standard)
        os.close(handle)
    arguments = wanted["arguments"]
    arguments[arguments.index("--parent-pid") + 1] = str(os.getppid())
    try:
        return _serve(arguments) if "service" in wanted else _work(arguments, sabotage)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # what the interpreter itself would do at the end of a process
        sys.excepthook(*sys.exc_info())
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _work(arguments: list[str], sabotage: list[str]) -> int:
    from tests.reliability.sabotage import take_out
    from tether_services.orchestrator.worker import main as work

    for name in sabotage:
        take_out(name)
    return work(arguments)


def _serve(arguments: list[str]) -> int:
    from tests.reliability.launch import main as launch

    launch(arguments)
    return 0


def _kill_of(client: object, workers: list[_Forked]) -> None:
    """Kill the process of a client that is gone."""
    for worker in workers:
        if worker.client is client:
            os.kill(worker.pid, signal.SIGKILL)


def _tell_end(worker: _Forked) -> bool:
    """Return whether a process has ended, after telling its client how."""
    pid, status = os.waitpid(worker.pid, os.WNOHANG)
    if pid == 0:
        return False
    with contextlib.suppress(OSError):  # the client was killed
        worker.client.send(f"{os.waitstatus_to_exitcode(status)}\n".encode())
    return True


if __name__ == "__main__":
    raise SystemExit(main())
