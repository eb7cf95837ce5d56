"""The TOML document of a run, read from a file with keys overridden."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tomli_w

from tether_services.orchestrator.run_config import check_run_settings, parse_run_config
from tether_services.runtime.settings import merge_overrides, read_toml


def read_run_document(path: Path, overrides: Sequence[str]) -> str:
    """Return the document; without overrides it is the file as it is, comments included.

    Args:
        path: TOML file.
        overrides: `key=value`, keys as dotted paths.

    Raises:
        InvalidArgumentError: The file cannot be read or is not TOML, or an override is not key=value.
    """
    values: dict[str, Any] = read_toml(path)
    if not overrides:
        return path.read_text(encoding="utf-8")
    merge_overrides(values, overrides)
    return tomli_w.dumps(values)


def resolve_run_document(path: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """Return every setting of a run with its value, preset and defaults included.

    Files that it names are not looked for: they are on the orchestrator's machine.

    Args:
        path: TOML file.
        overrides: `key=value`, keys as dotted paths.

    Raises:
        InvalidArgumentError: The document is refused; one violation per bad key.
    """
    config = parse_run_config(read_run_document(path, overrides))
    check_run_settings(config)
    return config.model_dump(mode="json")
