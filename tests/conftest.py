"""How tests in several processes (pytest-xdist) share a machine: one thread each, and some have it for themselves."""

from __future__ import annotations

import gc
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import HealthCheck, settings

from tests.room import room
from tether_services.runtime.threads import thread_environment

GPU: Final = Path("/dev/nvidiactl")
ROOM_FOLDER: Final = "room_folder"
folder_of_session: Final = pytest.StashKey[str]()

# Before a tensor library is loaded. Each process would take all cores, and two that do are far slower than one.
for _name, _value in thread_environment(1).items():
    os.environ.setdefault(_name, _value)

# An example that waits for a core is no slow one.
settings.register_profile("tether", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tether")


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Tell a process of the session where the room is."""
    stash = node.config.stash
    if folder_of_session not in stash:
        stash[folder_of_session] = tempfile.mkdtemp(prefix="tether-tests-")
    node.workerinput[ROOM_FOLDER] = stash[folder_of_session]


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove the room with the session, and let the interpreter end as it always does."""
    gc.unfreeze()
    if folder_of_session in config.stash:
        shutil.rmtree(config.stash[folder_of_session], ignore_errors=True)


@pytest.hookimpl(wrapper=True, tryfirst=True)  # outermost: waiting for the room counts against no time limit
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Run a test in the room of the session, if there is one."""
    folder: str | None = getattr(item.config, "workerinput", {}).get(ROOM_FOLDER)
    if folder is None:
        return (yield)
    with room(Path(folder), alone=wants_to_be_alone(item)):
        return (yield)


def wants_to_be_alone(item: pytest.Item) -> bool:
    """Return whether nothing may run beside a test: vLLM fails if others free memory of its GPU while it starts."""
    return bool(item.get_closest_marker("alone")) or bool(item.get_closest_marker("vllm") and GPU.exists())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put files with tests that want to be alone last, where none of them has to wait for a test of minutes to end."""
    last = {item.path for item in items if wants_to_be_alone(item)}
    items.sort(key=lambda item: item.path in last)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Take what the imports have made out of the collector's sight: libraries that train ask it to look often."""
    if session.items:
        gc.collect()
        gc.freeze()
