"""A record of what this process did, for a checker that knows nothing of the code; off unless it is told otherwise.

`TETHER_HISTORY` names a file to which all processes append JSON lines: `t` (monotonic seconds, the same clock for all
processes of a machine), `pid`, `kind` and the fields of that kind, which tests/reliability/checker.py describes. A line
is one write, so that lines of several processes never mix and a killed process leaves at most its last one unwritten.
Prompts and responses are never recorded.
"""

from __future__ import annotations

import json
import os
import time
from typing import Final

__all__ = ["HISTORY_VARIABLE", "record"]

HISTORY_VARIABLE: Final = "TETHER_HISTORY"
_FLAGS: Final = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC

_path = os.environ.get(HISTORY_VARIABLE)
_file: int | None = None


def record(kind: str, **fields: object) -> None:
    """Append a line to the history; nothing where none is kept. Call it after what it says has happened.

    Args:
        kind: What happened.
        fields: Plain JSON values.
    """
    if not _path:
        return
    global _file
    if _file is None:
        _file = os.open(_path, _FLAGS, 0o600)
    line = {"t": time.monotonic(), "pid": os.getpid(), "kind": kind, **fields}
    os.write(_file, (json.dumps(line) + "\n").encode())
