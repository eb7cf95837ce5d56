"""Ports for processes that start at the same time: no two of them are given the same one."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tether.errors import FailedPreconditionError
from tether_services.local import ports
from tether_services.local.ports import PORTS, SLICE_PORTS, free_ports

PROGRAM = """
import sys
from tether_services.local.ports import free_ports
print(*free_ports(150), flush=True)
sys.stdin.read()  # as a process whose services have not begun to listen
"""


def test_free_ports_are_different_and_nobody_listens_on_them() -> None:
    found = free_ports(20)
    assert len(set(found)) == 20 and set(found) <= set(PORTS)
    for port in found:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", port))


def test_a_port_is_not_given_again_before_all_others_had_their_turn() -> None:
    found = [port for _ in range(SLICE_PORTS // 20) for port in free_ports(10)]
    assert len(set(found)) == len(found)


def test_a_port_that_somebody_listens_on_is_passed_over() -> None:
    with socket.socket() as listening:
        [port] = free_ports(1)
        listening.bind(("127.0.0.1", port))
        listening.listen()
        assert port not in free_ports(SLICE_PORTS - 20)


def test_more_ports_than_a_process_may_have_are_refused() -> None:
    with pytest.raises(FailedPreconditionError, match="no 12001 free ports"):
        free_ports(len(PORTS) + 1)


def test_processes_at_the_same_time_get_different_ports() -> None:
    started = [
        subprocess.Popen([sys.executable, "-c", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    try:
        found = [port for process in started if process.stdout for port in process.stdout.readline().split()]
    finally:
        for process in started:
            process.communicate()
    assert len(found) == 4 * 150
    assert len(set(found)) == len(found)


def test_a_forked_process_does_not_go_on_with_the_ports_of_its_parent() -> None:
    program = """
import os
from tether_services.local.ports import free_ports
free_ports(1)
if os.fork() == 0:
    print(*free_ports(150), flush=True)
    os._exit(0)
os.wait()
print(*free_ports(150))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    child, parent = (set(line.split()) for line in done.stdout.splitlines())
    assert len(child) == len(parent) == 150 and not child & parent


def test_where_files_cannot_be_locked_there_are_ports_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path / "absent"))
    monkeypatch.setattr(ports, "_slices", [])
    assert len(set(free_ports(SLICE_PORTS + 1))) == SLICE_PORTS + 1
