"""Checks of adapter files that come from elsewhere. Nothing here runs or unpickles what it reads.

Every check raises FailedPreconditionError whose reason names it.
"""

from __future__ import annotations

import json
import math
import struct
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tether.errors import FailedPreconditionError
from tether_services.runtime.content_hash import hash_file

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
MANIFEST_NAME = "manifest.json"
"""Ours, beside the two in a stored version."""
MAX_CONFIG_BYTES = 64 * 1024
MAX_HEADER_BYTES = 8 * 1024 * 1024
"""A header entry takes about 150 bytes: room for 50,000 tensors."""
ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
"""Numeric types that an adapter may have."""
EXPONENT_MASKS = {"F32": 0x7F800000, "F16": 0x7C00, "BF16": 0x7F80}
"""Bits that are all set exactly in infinities and NaNs."""
FINITE_CHUNK_ITEMS = 1 << 22

# Keys of adapter_config.json that do not change what the adapter computes at inference. They are dropped.
_IGNORED_KEYS = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "inference_mode",
        "loftq_config",
        "lora_dropout",
        "lora_ga_config",
        "megatron_config",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "task_type",
    }
)
# Initialisations that leave the base weights alone.
_HARMLESS_INITS = (True, False, None, "gaussian", "orthogonal", "eva")


@dataclass(frozen=True, slots=True)
class AdapterShape:
    """What an adapter declares about itself."""

    rank: int
    """Rank of its matrices."""
    target_modules: frozenset[str]
    """Last path components of the layers it changes."""


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a safetensors header."""

    dtype: str
    """A key of ITEM_BYTES."""
    shape: tuple[int, ...]
    """Its dimensions."""
    begin: int
    """First byte in the file."""
    end: int
    """Byte after its last in the file."""


def refuse(message: str, *, reason: str, field: str = "files") -> FailedPreconditionError:
    """Return the error of a failed check."""
    return FailedPreconditionError(f"The adapter is refused: {message}", reason=reason, field=field)


def check_hash(path: Path, sha256: str) -> None:
    """Refuse a file whose content is not what the manifest says."""
    if hash_file(path) != sha256:
        raise refuse(f"the bytes of {path.name} do not have the declared SHA-256.", reason="HASH_MISMATCH")


def normalise_adapter_config(raw: bytes, declared: AdapterShape) -> dict[str, Any]:
    """Return the configuration that is stored: only what this service understands, in its own words.

    Args:
        raw: Content of adapter_config.json.
        declared: What BeginPush said.
    """
    config = _parse_json_object(raw, name=CONFIG_NAME)
    rank, alpha, targets = config.pop("r", None), config.pop("lora_alpha", None), config.pop("target_modules", None)
    rslora = config.pop("use_rslora", False)
    if config.pop("peft_type", None) != "LORA":
        raise _bad_config("peft_type must be LORA")
    if type(rank) is not int or rank != declared.rank:
        raise _bad_config(f"r must be the declared rank {declared.rank}")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha <= sys.float_info.max:
        raise _bad_config("lora_alpha must be a finite number above 0")
    if not _is_set_of_names(targets, declared.target_modules):
        raise _bad_config("target_modules must be the declared list of names")
    if not isinstance(rslora, bool):
        raise _bad_config("use_rslora must be true or false")
    _check_neutral(config)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": alpha,
        "use_rslora": rslora,
        "target_modules": sorted(declared.target_modules),
        "bias": "none",
        "lora_dropout": 0.0,
        "inference_mode": True,
    }


def _is_set_of_names(value: object, names: frozenset[str]) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value) and set(value) == names


def _check_neutral(config: Mapping[str, Any]) -> None:
    """Refuse every remaining key that asks for something that the engines would not do."""
    for key, value in config.items():
        if key == "bias" and value == "none":
            continue
        if key == "init_lora_weights" and value in _HARMLESS_INITS:
            continue
        if key not in _IGNORED_KEYS and value not in (None, False, [], {}):
            raise _bad_config(f"{key[:64]!r} is set, which is not supported")


def _bad_config(problem: str) -> FailedPreconditionError:
    return refuse(f"{CONFIG_NAME}: {problem}.", reason="BAD_ADAPTER_CONFIG")


def _parse_json_object(raw: bytes, *, name: str) -> dict[str, Any]:
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise refuse(f"{name} is not JSON.", reason="BAD_ADAPTER_CONFIG") from error
    if not isinstance(value, dict):
        raise refuse(f"{name} is not a JSON object.", reason="BAD_ADAPTER_CONFIG")
    return value


def read_safetensors_header(path: Path) -> dict[str, TensorEntry]:
    """Return the tensors of a safetensors file, reading its header only.

    The tensors must fill the file without gap or overlap, and have a type of ITEM_BYTES.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
            raise _not_safetensors("the header length is wrong")
        raw = file.read(length)
    header = _parse_header(raw)
    entries = {name: _parse_entry(name, entry, 8 + length) for name, entry in header.items()}
    _check_layout(entries, 8 + length, size)
    return entries


def _parse_header(raw: bytes) -> dict[str, Any]:
    """Return the header without its metadata, as strict as the library that will load the file."""
    try:
        header = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise _not_safetensors("the header is not JSON") from error
    if not isinstance(header, dict) or not raw.startswith(b"{"):
        raise _not_safetensors("the header is not a JSON object")
    metadata = header.pop("__metadata__", None)
    if metadata is not None and not (
        isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    ):
        raise _not_safetensors("its metadata are not texts")
    return header


def _parse_entry(name: str, entry: object, start: int) -> TensorEntry:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _not_safetensors(f"the entry of {name[:200]!r} is malformed")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise refuse(
            f"tensor {name[:200]!r} has type {str(dtype)[:16]!r}, not one of {sorted(ITEM_BYTES)}.", reason="BAD_DTYPE"
        )
    if not _are_counts(shape) or not _are_counts(offsets) or len(offsets) != 2:
        raise _not_safetensors(f"shape or offsets of {name[:200]!r} are malformed")
    if offsets[1] - offsets[0] != ITEM_BYTES[dtype] * math.prod(shape):
        raise _not_safetensors(f"offsets of {name[:200]!r} do not fit its shape")
    return TensorEntry(dtype, tuple(shape), start + offsets[0], start + offsets[1])


def _are_counts(value: object) -> bool:
    return (
        isinstance(value, list) and len(value) <= 8 and all(type(item) is int and 0 <= item < 2**40 for item in value)
    )


def _check_layout(entries: Mapping[str, TensorEntry], start: int, size: int) -> None:
    position = start
    for entry in sorted(entries.values(), key=lambda entry: (entry.begin, entry.end)):
        if entry.begin != position:
            raise _not_safetensors("the tensors overlap or leave gaps")
        position = entry.end
    if position != size:
        raise _not_safetensors("the file is longer or shorter than its tensors")


def _not_safetensors(problem: str) -> FailedPreconditionError:
    return refuse(f"{WEIGHTS_NAME} is not a valid safetensors file: {problem}.", reason="NOT_SAFETENSORS")


def expected_tensors(linear_shapes: Mapping[str, tuple[int, int]], shape: AdapterShape) -> dict[str, tuple[int, int]]:
    """Return the shape of every tensor that the adapter must have on this base model, by name."""
    expected: dict[str, tuple[int, int]] = {}
    for path, (inputs, outputs) in linear_shapes.items():
        if path.rpartition(".")[2] in shape.target_modules:
            expected[f"base_model.model.{path}.lora_A.weight"] = (shape.rank, inputs)
            expected[f"base_model.model.{path}.lora_B.weight"] = (outputs, shape.rank)
    return expected


def check_tensors(entries: Mapping[str, TensorEntry], expected: Mapping[str, tuple[int, int]]) -> None:
    """Refuse tensors that are missing, unknown or of another shape.

    Engines match names by suffix only: an unknown prefix would load and then silently change nothing.
    """
    for name in sorted(set(entries) - set(expected)):
        raise refuse(f"tensor {name[:200]!r} does not belong to this base and these targets.", reason="UNKNOWN_TENSOR")
    for name in sorted(expected):
        if name not in entries:
            raise refuse(f"tensor {name!r} is missing.", reason="MISSING_TENSOR")
        if entries[name].shape != expected[name]:
            shapes = f"{list(entries[name].shape)}, not {list(expected[name])}"
            raise refuse(f"tensor {name!r} has shape {shapes}.", reason="WRONG_SHAPE")


def check_finite(path: Path, entries: Mapping[str, TensorEntry]) -> None:
    """Refuse infinities and NaNs, by their bit patterns."""
    import numpy as np

    for name, entry in entries.items():
        mask = EXPONENT_MASKS[entry.dtype]
        kind = np.dtype("<u4" if entry.dtype == "F32" else "<u2")
        count = (entry.end - entry.begin) // kind.itemsize
        for first in range(0, count, FINITE_CHUNK_ITEMS):
            items = min(FINITE_CHUNK_ITEMS, count - first)
            bits = np.fromfile(path, dtype=kind, count=items, offset=entry.begin + first * kind.itemsize)
            if np.any((bits & mask) == mask):
                raise refuse(f"tensor {name!r} holds infinities or NaNs.", reason="NOT_FINITE")


def check_targets(linear_shapes: Mapping[str, tuple[int, int]], target_modules: Sequence[str]) -> None:
    """Refuse a target that is not a linear layer of the base model."""
    known = {path.rpartition(".")[2] for path in linear_shapes}
    for index, name in enumerate(target_modules):
        if name not in known:
            raise refuse(
                f"the base model has no linear layer named {name[:64]!r}; it has {sorted(known)}.",
                reason="UNKNOWN_TARGET_MODULE",
                field=f"target_modules[{index}]",
            )
