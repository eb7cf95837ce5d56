"""Runs the reward service: `python -m tether_services.reward --config FILE --set key=value`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from tether_services.reward.config import ENV_PREFIX, PROGRAM, RewardSettings
from tether_services.runtime.settings import parse_arguments


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until a signal arrives and return the exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    settings = parse_arguments(RewardSettings, program=PROGRAM, env_prefix=ENV_PREFIX, arguments=given)

    from tether_services.reward.service import RewardService
    from tether_services.runtime.server import run_service

    return run_service(settings, lambda registry: RewardService(settings, registry))


if __name__ == "__main__":
    raise SystemExit(main())
