"""Stands in for a worker process: `python -S fork_client.py SOCKET ARGUMENTS...`; see fork_server.py.

Imports nothing but the standard library's small modules: it is started for every attempt.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import sys

PR_SET_PDEATHSIG = 1


def main() -> int:
    """Have a worker forked, wait for its end, and end in the same way."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    path, *arguments = sys.argv[1:]
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(path)
        ours = {name: value for name, value in os.environ.items() if name.startswith("TETHER_")}
        request = json.dumps({"folder": os.getcwd(), "environment": ours, "arguments": arguments}).encode()
        socket.send_fds(server, [request], [1, 2])
        answer = server.recv(64)
    code = int(answer) if answer else 1
    if code < 0:
        os.kill(os.getpid(), -code)
    return code


if __name__ == "__main__":
    raise SystemExit(main())
