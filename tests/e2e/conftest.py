"""What the tests of one process share: workers that are forked where the libraries are loaded already."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FORK_CLIENT = ROOT / "tests" / "reliability" / "fork_client.py"
LOADED_SECONDS = 120.0


@pytest.fixture(scope="session")
def forked_worker() -> Iterator[tuple[str, ...]]:
    """Yield the command of a real worker that saves itself the seconds of its imports, for tests that start many."""
    with tempfile.TemporaryDirectory(prefix="tether-fork-") as folder:  # the path of a socket is short
        path = Path(folder, "socket")
        launch = [sys.executable, "-m", "tests.reliability.launch", "--parent-pid", str(os.getpid())]
        server = subprocess.Popen([*launch, "tests.reliability.fork_server", str(path)], cwd=ROOT)
        try:
            until = time.monotonic() + LOADED_SECONDS
            while not path.exists():
                assert server.poll() is None and time.monotonic() < until, "the fork server does not listen"
                time.sleep(0.05)
            yield (sys.executable, "-S", str(FORK_CLIENT), str(path))
        finally:
            server.kill()
            server.wait()
