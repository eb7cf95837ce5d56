from __future__ import annotations

import os

import pytest

from tether_services.runtime.threads import LIBRARY_VARIABLES, prepare_process, thread_environment


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
