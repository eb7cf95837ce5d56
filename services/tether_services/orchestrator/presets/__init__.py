"""Presets: named settings of published recipes, as TOML files beside this one, that lie under those of a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tether_services.runtime.settings import read_toml

__all__ = ["lay_over", "preset_names", "read_preset"]

FOLDER = Path(__file__).parent


def preset_names() -> list[str]:
    """Return the names of all presets in alphabetical order."""
    return sorted(file.stem for file in FOLDER.glob("*.toml"))


def read_preset(name: object) -> dict[str, Any]:
    """Return the settings of a preset; none for a name that is not one, which the validation of the run refuses."""
    return read_toml(FOLDER / f"{name}.toml") if name in preset_names() else {}


def lay_over(weaker: Mapping[str, Any], stronger: Mapping[str, Any]) -> dict[str, Any]:
    """Return both settings as new ones; where both have a key the stronger one's counts, table by table."""
    merged = {key: dict(value) if isinstance(value, dict) else value for key, value in weaker.items()}
    for key, value in stronger.items():
        under = merged.get(key)
        merged[key] = {**under, **value} if isinstance(under, dict) and isinstance(value, dict) else value
    return merged
