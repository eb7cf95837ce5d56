"""Runs the orchestrator: `python -m tether_services.orchestrator --config FILE --set key=value`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from tether_services.orchestrator.config import ENV_PREFIX, PROGRAM, OrchestratorSettings
from tether_services.runtime.settings import parse_arguments


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until a signal arrives and return the exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    settings = parse_arguments(OrchestratorSettings, program=PROGRAM, env_prefix=ENV_PREFIX, arguments=given)

    from tether_services.orchestrator.service import OrchestratorService
    from tether_services.runtime.server import run_service

    return run_service(settings, lambda registry: OrchestratorService(settings, registry))


if __name__ == "__main__":
    raise SystemExit(main())
