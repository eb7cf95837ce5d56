"""Runs the `tether` command: `python -m tether_services`."""

from __future__ import annotations

import sys

from tether_services.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
