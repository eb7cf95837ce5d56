"""Writes the policy and the prompts of a world into a folder: `... tests.reliability.launch ... FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.rpc.run_services import write_tiny_policy, write_word_prompts


def main() -> int:
    """Write into the folder that the command line names."""
    folder = Path(sys.argv[1])
    write_word_prompts(folder / "prompts.txt")
    write_tiny_policy(folder / "policy")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
