"""Named points at which a process can be made to fail, for the reliability suite; off unless it is told otherwise.

`TETHER_FAULT_PLAN` names a JSON file that says for each role which of its processes fails where and how:

    {"worker": {"1": "checkpoint.renamed@2=kill", "2": "push.half@1=stop"}, "generator": {"1": "push.stored@3=enospc"}}

Worker 1 (the first attempt of a run) is killed when it comes to `checkpoint.renamed` for the second time. Several
entries of one process are separated by spaces; each happens once. Without the variable nothing is read and `reach` does
nothing.
"""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import threading
from collections import Counter
from pathlib import Path
from typing import Final

from tether.errors import InvalidArgumentError
from tether_services.runtime.history import record

__all__ = ["PLAN_VARIABLE", "POINTS", "arm", "reach"]

PLAN_VARIABLE: Final = "TETHER_FAULT_PLAN"
POINTS: Final = {
    "worker": (
        "lease.acquired",
        "step.begun",
        "rollout.first_group",
        "rollout.recorded",
        "update.first_optimiser_step",
        "update.done",
        "adapter.exported",
        "checkpoint.staged",
        "checkpoint.renamed",
        "checkpoint.durable",
        "commit.open",
        "commit.done",
        "push.begun",
        "push.half",
        "push.sent",
        "push.proven",
        "push.activated",
        "push.recorded",
        "retention.half",
        "run.steps_done",
        "run.reported",
    ),
    "generator": (
        "upload.chunk",
        "push.verified",
        "push.stored",
        "push.loaded",
        "push.proven",
        "activate.persisted",
        "retire.unloaded",
    ),
}
"""The points of each role in the order in which it comes to them."""
_ENTRY: Final = re.compile(r"(?P<point>[a-z_.]+)@(?P<occurrence>[1-9][0-9]*)=(?P<action>kill|stop|hang|enospc)")


class _Plan:
    """What is to happen in this process."""

    def __init__(self, role: str, index: int, entries: dict[tuple[str, int], str]) -> None:
        self._role, self._index = role, index
        self._entries = entries
        self._reached: Counter[str] = Counter()
        self._lock = threading.Lock()

    def reach(self, name: str) -> None:
        with self._lock:
            self._reached[name] += 1
            action = self._entries.get((name, self._reached[name]))
        if action is not None:
            record("fault", role=self._role, index=self._index, point=name, action=action)
        if action == "enospc":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)
        if action == "hang":
            threading.Event().wait()
        elif action is not None:
            os.kill(os.getpid(), signal.SIGKILL if action == "kill" else signal.SIGSTOP)


_armed: _Plan | None = None


def arm(role: str, index: int) -> None:
    """Take this process's part of the plan; nothing without a plan.

    Args:
        role: "worker" or "generator"; a further generator has a name with a number, such as "generator2".
        index: Epoch of a worker; for others how many of the role have been started, this one included.

    Raises:
        InvalidArgumentError: The plan cannot be read, or names a point or an action that does not exist.
    """
    global _armed
    _armed = None
    path = os.environ.get(PLAN_VARIABLE)
    if not path:
        return
    try:
        plan = json.loads(Path(path).read_text(encoding="utf-8"))
        entries = str(plan.get(role, {}).get(str(index), "")).split()
    except (OSError, ValueError, AttributeError) as error:
        raise InvalidArgumentError(f"{path} is not a fault plan: {error}", field=PLAN_VARIABLE) from error
    if entries:
        _armed = _Plan(role, index, dict(_parse(entry, role) for entry in entries))


def reach(name: str) -> None:
    """Come to a named point: all goes on, unless the plan says what fails here.

    The process is killed or stopped, this thread hangs for ever, or the disk is full.

    Raises:
        OSError: ENOSPC, where the plan says `enospc`.
    """
    if _armed is not None:
        _armed.reach(name)


def _parse(entry: str, role: str) -> tuple[tuple[str, int], str]:
    """Return ((point, occurrence), action) of an entry.

    Raises:
        InvalidArgumentError: There is no such point or action: such a plan would never do anything.
    """
    found = _ENTRY.fullmatch(entry)
    points = POINTS[role.rstrip("0123456789")]
    if found is None or found["point"] not in points:
        known = ", ".join(points)
        message = f"{entry!r} is not POINT@OCCURRENCE=kill|stop|hang|enospc; the points of {role} are {known}"
        raise InvalidArgumentError(message, field=PLAN_VARIABLE)
    return (found["point"], int(found["occurrence"])), found["action"]
