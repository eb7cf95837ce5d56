"""Data sets that the `datasets` library reads: hub names, folders of data files, Parquet files."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from tether.errors import InvalidArgumentError
from tether_services.runtime.model_folder import is_hub_name

__all__ = ["UNKNOWN_REVISION", "DataSetName", "find_revision", "parse_name", "read_dataset"]

FORMATS = ("json", "csv", "parquet", "arrow", "text")
"""Formats of plain rows. Others open archives, media or scientific containers, which no shape here can hold."""
COMMIT = re.compile(r"[0-9a-f]{40}")
UNKNOWN_REVISION = "unknown: the hub did not tell it"


@dataclass(frozen=True, slots=True)
class DataSetName:
    """What a user typed, taken apart."""

    path: str
    """Folder, file, or owner/name on a hub."""
    config: str | None
    """The part of the data set; None where it has only one."""
    split: str
    """For example `train`."""


def parse_name(source: str, *, field: str) -> DataSetName:
    """Return the parts of FOLDER[:SPLIT], ORG/NAME[:SPLIT] or ORG/NAME/CONFIG[:SPLIT]; the split is `train` otherwise.

    Raises:
        InvalidArgumentError: It is none of these.
    """
    if os.path.exists(source):
        return DataSetName(source, None, "train")
    path, split = source.rsplit(":", 1) if ":" in source else (source, "train")
    if os.path.isdir(path):
        return DataSetName(path, None, split)
    parts = path.split("/")
    name, config = "/".join(parts[:2]), parts[2] if len(parts) == 3 else None
    if len(parts) > 3 or not is_hub_name(name) or not split or config == "":
        raise InvalidArgumentError(
            f"{source!r} is no file, no folder, and no data set name (org/name, org/name:split, org/name/config:split)",
            field=field,
        )
    return DataSetName(name, config, split)


@cache
def _load_builder(path: str, config: str | None) -> Any:
    """Return the library's reader of a hub data set: one for the whole process, which then reads one revision."""
    from datasets import load_dataset_builder

    return load_dataset_builder(path, config)


def find_revision(source: str, *, load: Callable[[str, str | None], Any] = _load_builder) -> str:
    """Return the commit of a hub data set that this process reads, or `UNKNOWN_REVISION`.

    Args:
        source: As `parse_name` takes it.
        load: Returns the library's reader of a data set, whose `hash` is the commit where it comes from a hub.
    """
    try:
        name = parse_name(source, field="sources")
        commit = str(load(name.path, name.config).hash)
    except Exception:  # of many libraries; reading the data comes next and says what is wrong
        return UNKNOWN_REVISION
    return commit if COMMIT.fullmatch(commit) else UNKNOWN_REVISION


def read_dataset(source: str, *, field: str) -> Iterator[Mapping[str, object]]:
    """Yield the rows of a data set as they arrive. No code of the data set is ever run.

    Raises:
        InvalidArgumentError: It cannot be found or read, is in another format, or has no such split.
    """
    name = parse_name(source, field=field)
    try:
        yield from _stream(name, field=field)
    except InvalidArgumentError:
        raise
    except Exception as error:  # the library raises errors of many others: network, parsers, file systems
        raise InvalidArgumentError(
            f"cannot read the data set {source} ({type(error).__name__}: {str(error)[:300]}); "
            "name a local file or folder, or make the hub reachable",
            field=field,
        ) from error


def _stream(name: DataSetName, *, field: str) -> Iterator[Mapping[str, object]]:
    from datasets import load_dataset_builder

    if os.path.isfile(name.path):
        builder = load_dataset_builder("parquet", data_files=name.path)
    elif os.path.isdir(name.path):
        builder = load_dataset_builder(name.path)
    else:
        builder = _load_builder(name.path, name.config)
    kind = type(builder).__module__.split(".")
    # The format is the package of the library that holds the builder: datasets.packaged_modules.json.json
    if kind[:2] != ["datasets", "packaged_modules"] or kind[2] not in FORMATS:
        raise InvalidArgumentError(f"{name.path} is not in one of the formats {', '.join(FORMATS)}", field=field)
    splits = builder.as_streaming_dataset()
    if name.split not in splits:
        raise InvalidArgumentError(
            f"{name.path} has no split {name.split!r}; there are {', '.join(splits)}", field=field
        )
    yield from splits[name.split]
