"""`python -m tests.reliability`: see runner.py."""

from __future__ import annotations

from tests.reliability.runner import main

if __name__ == "__main__":
    raise SystemExit(main())
