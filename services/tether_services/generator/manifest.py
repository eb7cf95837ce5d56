"""What is stored beside an adapter, so that a restarted generator can check, load and prove it again."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Any

from tether_services.generator.uploads import Declaration, DeclaredFile, Probe


@dataclass(frozen=True, slots=True)
class Manifest:
    """A stored version."""

    upload_id: str
    """The upload that brought it."""
    base_model_sha256: str
    """Of the base model it was proven on."""
    config_sha256: str
    """Of the stored configuration, which is not the uploaded one."""
    created: float
    """Unix time of the commit."""
    declaration: Declaration
    """As it was announced, with the proofs."""


def write_manifest(manifest: Manifest) -> bytes:
    """Return the manifest as a file that notices damage to itself."""
    body = dataclasses.asdict(manifest)
    body["declaration"]["target_modules"] = sorted(manifest.declaration.target_modules)
    return json.dumps({"body": body, "sha256": _digest(body)}, indent=1).encode()


def read_manifest(raw: bytes) -> Manifest:
    """Return what `write_manifest` wrote.

    Raises:
        ValueError: It is damaged.
    """
    try:
        content = json.loads(raw)
        body = content["body"]
        if content["sha256"] != _digest(body):
            raise ValueError("the manifest does not have its own SHA-256")
        return Manifest(**(body | {"declaration": _read_declaration(body["declaration"])}))
    except (KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"the manifest is malformed: {error}") from error


def _read_declaration(body: dict[str, Any]) -> Declaration:
    probes = [Probe(**{name: tuple(values) for name, values in probe.items()}) for probe in body["probes"]]
    return Declaration(
        **body
        | {
            "target_modules": frozenset(body["target_modules"]),
            "files": tuple(DeclaredFile(**file) for file in body["files"]),
            "probes": tuple(probes),
        }
    )


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
