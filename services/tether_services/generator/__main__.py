"""Runs the generator: `python -m tether_services.generator --config file.toml`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from tether_services.generator.config import ENV_PREFIX, PROGRAM, GeneratorSettings
from tether_services.runtime.settings import parse_arguments


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until a signal arrives and return the exit status."""
    settings = parse_arguments(
        GeneratorSettings,
        program=PROGRAM,
        env_prefix=ENV_PREFIX,
        arguments=sys.argv[1:] if arguments is None else arguments,
    )
    # After the settings: --help must answer before anything heavy is loaded.
    from tether_services.generator.service import GeneratorService
    from tether_services.runtime.server import run_service

    return run_service(settings, lambda registry: GeneratorService(settings, registry))


if __name__ == "__main__":
    raise SystemExit(main())
