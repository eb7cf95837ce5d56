from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tether_services.runtime.threads import (
    ALLOCATOR_VARIABLES,
    LIBRARY_VARIABLES,
    prepare_process,
    thread_environment,
)

COUNT_FAULTS = """
import resource
from tether_services.runtime.threads import prepare_process

prepare_process(1)

def allocate():
    for _ in range(10):
        held = [bytearray(3 << 20) for _ in range(16)]
        del held

def count():
    allocate()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    allocate()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

count()
"""
"""Prints the page faults of 10 rounds of large blocks, all freed, after 10 others.

They are held together, as in a forward pass: of single blocks glibc keeps the largest one by itself.
"""


def test_every_library_gets_the_same_budget_and_idle_threads_sleep() -> None:
    environment = thread_environment(3)
    assert {environment[name] for name in LIBRARY_VARIABLES} == {"3"}
    assert environment["OMP_WAIT_POLICY"] == "PASSIVE"


@pytest.mark.parametrize(("set_before", "expected"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_a_process_keeps_the_wait_policy_of_its_user(
    monkeypatch: pytest.MonkeyPatch, set_before: str | None, expected: str
) -> None:
    for name in thread_environment(1):
        monkeypatch.setenv(name, "before")
    if set_before is None:
        monkeypatch.delenv("OMP_WAIT_POLICY")
    else:
        monkeypatch.setenv("OMP_WAIT_POLICY", set_before)
    prepare_process(2)
    assert (os.environ["OMP_NUM_THREADS"], os.environ["OMP_WAIT_POLICY"]) == ("2", expected)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the allocator is glibc's on Linux")
@pytest.mark.parametrize(
    ("environment", "keeps"),
    [
        ({}, True),
        ({"MALLOC_TRIM_THRESHOLD_": "131072"}, False),
        ({"MALLOC_MMAP_THRESHOLD_": "131072"}, False),
        ({"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=131072"}, False),
        ({"GLIBC_TUNABLES": "glibc.pthread.rseq=0"}, True),
    ],
)
def test_freed_memory_is_kept_for_the_next_pass_unless_the_user_says_otherwise(
    environment: dict[str, str], keeps: bool
) -> None:
    ours = {*ALLOCATOR_VARIABLES, "GLIBC_TUNABLES"}
    inherited = {name: value for name, value in os.environ.items() if name not in ours}
    found = subprocess.run(
        [sys.executable, "-c", COUNT_FAULTS], env=inherited | environment, capture_output=True, text=True, check=True
    )
    assert (int(found.stdout) < 1000) is keeps, found.stdout
