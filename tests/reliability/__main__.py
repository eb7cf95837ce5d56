"""`python -m tests.reliability`: see runner.py."""

from __future__ import annotations

import os

os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # else a line for each connection that is refused as it should be

from tests.reliability.runner import main

if __name__ == "__main__":
    raise SystemExit(main())
