"""How tests that run side by side share a machine: one thread each, and tests marked `alone` with nothing beside them.

Several processes (pytest-xdist) take turns through two locks in a folder of the session. Every test holds the room
lock, most of them together with others, an `alone` one for itself. Whoever wants the room waits at the gate for it, so
that tests which come later cannot pass a waiting `alone` one.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import pytest

from tether_services.runtime.threads import thread_environment

GPU: Final = Path("/dev/nvidiactl")
ROOM_FOLDER: Final = "room_folder"
folder_of_session: Final = pytest.StashKey[str]()

# Before a tensor library is loaded: two processes with as many threads as cores each were ten times slower than one.
for _name, _value in thread_environment(1).items():
    os.environ.setdefault(_name, _value)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Tell a process of the session where the locks are."""
    stash = node.config.stash
    if folder_of_session not in stash:
        stash[folder_of_session] = tempfile.mkdtemp(prefix="tether-tests-")
    node.workerinput[ROOM_FOLDER] = stash[folder_of_session]


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove the locks with the session."""
    if folder_of_session in config.stash:
        shutil.rmtree(config.stash[folder_of_session], ignore_errors=True)


@pytest.hookimpl(wrapper=True, tryfirst=True)  # outermost: waiting counts against no time limit
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    folder: str | None = getattr(item.config, "workerinput", {}).get(ROOM_FOLDER)
    if folder is None:
        return (yield)
    with room(Path(folder), alone=wants_to_be_alone(item)):
        return (yield)


def wants_to_be_alone(item: pytest.Item) -> bool:
    """Return whether a test gets the machine for itself: vLLM takes memory that others free on its GPU for a fault."""
    return bool(item.get_closest_marker("alone")) or bool(item.get_closest_marker("vllm") and GPU.exists())


@contextmanager
def room(folder: Path, *, alone: bool) -> Iterator[None]:
    """Hold the room together with others or alone."""
    with (folder / "gate").open("a") as gate, (folder / "room").open("a") as place:
        fcntl.flock(gate, fcntl.LOCK_EX)
        fcntl.flock(place, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(gate, fcntl.LOCK_UN)
        try:
            yield
        finally:
            fcntl.flock(place, fcntl.LOCK_UN)  # closing is not enough while a forked child has the file too
