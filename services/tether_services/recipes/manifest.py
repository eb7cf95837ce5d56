"""`manifest.json`: what a stage was given, what it measured, and with which versions."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tether_services.recipes.config import StageConfig
from tether_services.runtime.content_hash import hash_file

MANIFEST_NAME = "manifest.json"
LIBRARIES = ("torch", "transformers", "tokenizers", "peft", "safetensors")
"""Libraries whose version can change the result."""


def installed_version(package: str) -> str:
    """Return the installed version of a package, or `not installed`."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def write_manifest(
    stage: str,
    config: StageConfig,
    *,
    inputs: Sequence[Path],
    metrics: Mapping[str, Any],
    wall_seconds: float,
) -> Path:
    """Write the manifest into the output folder, let every user read the folder's files, and return the path.

    Paths are reduced to file names: the manifest travels with the weights and says nothing about the machine.
    """
    content = {
        "stage": stage,
        "tether_version": installed_version("tether"),
        "library_versions": {name: installed_version(name) for name in LIBRARIES},
        "config": portable_config(config),
        "inputs": [_describe_file(path) for path in inputs],
        "metrics": dict(metrics),
        "wall_seconds": round(wall_seconds, 1),
    }
    path = config.output / MANIFEST_NAME
    path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    for file in config.output.iterdir():
        file.chmod(file.stat().st_mode | 0o444)  # the weights library writes them for the owner alone
    return path


def _describe_file(path: Path) -> dict[str, Any]:
    return {"name": path.name, "sha256": hash_file(path), "size_bytes": path.stat().st_size}


def portable_config(config: StageConfig) -> dict[str, Any]:
    """Return the settings as JSON values, with every path reduced to its last part."""

    def portable(value: Any) -> Any:
        if isinstance(value, Path):
            return value.name
        return [portable(item) for item in value] if isinstance(value, tuple) else value

    return {name: portable(value) for name, value in config.model_dump().items()}
