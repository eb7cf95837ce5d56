"""The folder that a stage writes: what it was given, what it measured, and with which versions."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from peft import get_peft_model_state_dict
from pydantic import BaseModel
from safetensors.torch import save_file

import tether_services
from tether_services.recipes.config import DataConfig, StageConfig
from tether_services.runtime.content_hash import hash_file, hash_model_folder
from tether_services.runtime.durable import write_text
from tether_services.runtime.model_folder import is_hub_name

__all__ = ["MANIFEST_NAME", "describe_parent", "describe_sources", "relative_base", "write_adapter", "write_manifest"]

MANIFEST_NAME = "manifest.json"
LIBRARIES = ("torch", "transformers", "tokenizers", "peft", "trl", "datasets", "safetensors")
"""Libraries whose version can change the result."""
UNORDERED = ("target_modules", "modules_to_save")
"""Entries of an adapter's configuration that the library keeps as sets."""


def write_manifest(
    stage: str, config: StageConfig, *, parent: Path | None, metrics: Mapping[str, Any], **more: object
) -> Path:
    """Write the manifest into the output folder, let every user read the folder's files, and return its path.

    Paths are reduced to their last part: the manifest travels with the weights and says nothing about the machine.

    Args:
        stage: Name of the stage.
        config: Its settings.
        parent: Folder of the model that it started from; None where it started from nothing.
        metrics: Figures, JSON.
        more: Further entries, JSON.
    """
    content = {
        "stage": stage,
        "tether_version": installed_version("tether"),
        "git_revision": git_revision(),
        "library_versions": {name: installed_version(name) for name in LIBRARIES},
        "config": portable(config),
        "parent": None if parent is None else describe_parent(parent),
        "data": describe_sources(config),
        "metrics": dict(metrics),
        **more,
    }
    path = config.output / MANIFEST_NAME
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")
    for file in config.output.rglob("*"):
        if file.is_file():
            file.chmod(file.stat().st_mode | 0o444)  # the weights library writes them for the owner alone
    return path


def write_adapter(model: Any, folder: Path, *, base: str) -> None:
    """Write PEFT's two files of the trained adapter, the same bytes for the same weights.

    The library's own writer would add a model card, keep the base's absolute path and write sets in changing order.

    Args:
        model: A PEFT model; its adapter `default` is written, saved modules such as a score head included.
        folder: Made where it is missing.
        base: How the adapter names its base; see `relative_base`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    settings = model.peft_config["default"].to_dict() | {"base_model_name_or_path": base, "inference_mode": True}
    lists = {name: sorted(set(settings[name])) for name in UNORDERED if settings[name] is not None}
    write_text(folder / "adapter_config.json", json.dumps(settings | lists, indent=2, sort_keys=True) + "\n")
    state = get_peft_model_state_dict(model, adapter_name="default", save_embedding_layers=False)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def relative_base(base: str, folder: Path) -> str:
    """Return how a file in `folder` names the base: a hub name as it is, else the relative path.

    Both folders can then be moved together. The path tells as much of this machine as lies between the two: put them
    beside each other.
    """
    if is_hub_name(base):
        return base
    return Path(os.path.relpath(Path(base).expanduser().resolve(), folder.resolve())).as_posix()


def installed_version(package: str) -> str:
    """Return the installed version of a package, or `not installed`."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def git_revision() -> str:
    """Return the commit of the checkout that this code runs from, with `-dirty` after local changes; else `unknown`."""
    folder = Path(tether_services.__file__).parent
    command = ["git", "-C", str(folder), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return answer.stdout.strip()


def describe_parent(folder: Path) -> dict[str, Any]:
    """Return name, stage and content hash of the model that a stage started from."""
    manifest = folder / MANIFEST_NAME
    stage = json.loads(manifest.read_text(encoding="utf-8")).get("stage") if manifest.is_file() else None
    return {"name": folder.name, "stage": stage, "sha256": hash_model_folder(folder)}


def describe_sources(config: StageConfig) -> list[dict[str, Any]]:
    """Return name, size and content hash of every file that the settings name as data, each once."""
    parts = [value for _, value in config if isinstance(value, DataConfig)]
    names = dict.fromkeys(name for part in parts for name in (*part.sources, *part.validation_sources))
    return [entry for name in names for entry in _describe_source(name)]


def _describe_source(name: str) -> Sequence[dict[str, Any]]:
    path = _local(name)
    if path.is_file():
        return [{"name": path.name, "sha256": hash_file(path), "size_bytes": path.stat().st_size}]
    if path.is_dir():
        return [entry for file in sorted(path.rglob("*")) if file.is_file() for entry in _describe_source(str(file))]
    return [{"name": name}]


def _local(name: str) -> Path:
    """Return the path of a source; of FOLDER:SPLIT the folder's, all of whose files are hashed."""
    path = Path(name).expanduser()
    folder = Path(name.rsplit(":", 1)[0]).expanduser()
    return folder if not path.exists() and folder.is_dir() else path


def portable(value: Any) -> Any:
    """Return settings or a report as JSON values, with every path and name of a file or folder reduced to its end."""
    if isinstance(value, BaseModel):
        return {name: portable(item) for name, item in value}
    if isinstance(value, Mapping):
        return {portable(name): portable(item) for name, item in value.items()}
    if isinstance(value, Path):
        return value.name
    if isinstance(value, str):
        is_path = value.startswith((".", "/", "~")) or ("/" in value and _local(value).exists())
        return Path(value).name if is_path else value
    return [portable(item) for item in value] if isinstance(value, tuple | list) else value
