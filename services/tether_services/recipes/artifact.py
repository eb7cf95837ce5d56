"""The folder that a stage writes: what it was given, what it measured, and with which versions."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from peft import get_peft_model_state_dict
from pydantic import BaseModel
from safetensors.torch import save_file

import tether_services
from tether_services.recipes.config import DataConfig, PretrainConfig, StageConfig
from tether_services.recipes.data.hub import find_revision
from tether_services.recipes.data.rows import is_file_name
from tether_services.runtime.content_hash import hash_file, hash_model_folder, hash_tokenizer
from tether_services.runtime.durable import write_text
from tether_services.runtime.model_folder import is_hub_name

__all__ = [
    "MANIFEST_NAME",
    "describe_beginning",
    "describe_parent",
    "describe_sources",
    "relative_base",
    "write_adapter",
    "write_manifest",
]

MANIFEST_NAME = "manifest.json"
LIBRARIES = ("torch", "transformers", "tokenizers", "peft", "trl", "datasets", "safetensors")
"""Libraries whose version can change the result."""
UNORDERED = ("target_modules", "modules_to_save")
"""Entries of an adapter's configuration that the library keeps as sets."""


def describe_beginning(stage: str, config: StageConfig, *, parent: Path | None) -> dict[str, Any]:
    """Return what a stage starts from, JSON: its name, its settings, and data and model by their content.

    Paths are reduced to their last part: the manifest travels with the weights and says nothing about the machine.

    Args:
        stage: Name of the stage.
        config: Its settings.
        parent: Folder of the model that it starts from; None where it starts from nothing.

    Raises:
        InvalidArgumentError: The parent is no model folder.
    """
    reused = config.tokenizer if isinstance(config, PretrainConfig) else None
    return {
        "stage": stage,
        "config": portable(config),
        "parent": None if parent is None else describe_parent(parent),
        "data": describe_sources(config),
        **({"tokenizer_sha256": hash_tokenizer(reused)} if reused else {}),
    }


def write_manifest(folder: Path, beginning: Mapping[str, Any], *, metrics: Mapping[str, Any], **more: object) -> Path:
    """Write the manifest into a stage's folder, let every user read the folder's files, and return its path.

    Args:
        folder: The stage's output.
        beginning: See `describe_beginning`; as it was before the first step, whatever became of the files since.
        metrics: Figures, JSON.
        more: Further entries, JSON.
    """
    content = {
        **beginning,
        "tether_version": installed_version("tether"),
        "git_revision": git_revision(),
        "library_versions": {name: installed_version(name) for name in LIBRARIES},
        "metrics": dict(metrics),
        **more,
    }
    path = folder / MANIFEST_NAME
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")
    for file in folder.rglob("*"):
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
    beside each other. Two folders that share nothing but the root are not moved together: the path is absolute then.
    """
    if is_hub_name(base):
        return base
    there, here = Path(base).expanduser().resolve(), folder.resolve()
    is_far = os.path.commonpath((there, here)) == here.anchor
    return there.as_posix() if is_far else Path(os.path.relpath(there, here)).as_posix()


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
    """Return name, stage and content hashes, of the weights and of the tokenizer, of the model a stage starts from."""
    manifest = folder / MANIFEST_NAME
    stage = json.loads(manifest.read_text(encoding="utf-8")).get("stage") if manifest.is_file() else None
    return {
        "name": folder.name,
        "stage": stage,
        "sha256": hash_model_folder(folder),
        "tokenizer_sha256": hash_tokenizer(folder),
    }


def describe_sources(config: StageConfig, *, revision_of: Callable[[str], str] = find_revision) -> list[dict[str, Any]]:
    """Return what the settings name as data, each once: files with size and content hash, data sets with revision.

    Args:
        config: The stage.
        revision_of: Returns the revision of a hub data set.
    """
    parts = [value for _, value in config if isinstance(value, DataConfig)]
    names = dict.fromkeys(name for part in parts for name in (*part.sources, *part.validation_sources))
    return [entry for name in names for entry in _describe_source(name, revision_of)]


def _describe_source(name: str, revision_of: Callable[[str], str]) -> Sequence[dict[str, Any]]:
    path = _local(name)
    if path.is_file():
        return [{"name": path.name, "sha256": hash_file(path), "size_bytes": path.stat().st_size}]
    if path.is_dir():
        files = (str(file) for file in sorted(path.rglob("*")) if file.is_file())
        return [entry for file in files for entry in _describe_source(file, revision_of)]
    return [{"name": name} if is_file_name(name) else {"name": name, "revision": revision_of(name)}]


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
