"""Writes docs/errors.md and the OpenAPI documents; scripts/generate_documents.sh calls it."""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.descriptor_pb2 import FileDescriptorSet

import tether.v1
from tether_services.documents.comments import read_comments
from tether_services.documents.error_page import error_page
from tether_services.documents.files import FOLDER
from tether_services.documents.openapi import build_document

PAGE: Final = Path("docs/errors.md")
OPENAPI: Final = Path("services/tether_services/documents") / FOLDER


def main() -> None:
    """Write everything below a folder that stands for the repository."""
    parser = argparse.ArgumentParser(description="Write the documents that are made from the code and the contract.")
    parser.add_argument("--descriptors", type=Path, required=True, metavar="FILE", help="descriptor set of protoc")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="root of the repository")
    known = parser.parse_args()
    comments = read_comments(FileDescriptorSet.FromString(known.descriptors.read_bytes()))
    for path, text in render(comments).items():
        (known.output / path).parent.mkdir(parents=True, exist_ok=True)
        (known.output / path).write_text(text, encoding="utf-8")


def render(comments: dict[str, str]) -> dict[Path, str]:
    """Return the content of every document by its path in the repository.

    Args:
        comments: Of the contract, by full name.
    """
    documents = {
        OPENAPI / f"{service.full_name}.json": json.dumps(build_document(service, comments), indent=2) + "\n"
        for service in services()
    }
    return {PAGE: error_page(), **documents}


def services() -> Iterator[ServiceDescriptor]:
    """Yield the services of the contract, in the order of their files."""
    for name in sorted(module.name for module in pkgutil.iter_modules(tether.v1.__path__)):
        if name.endswith("_pb2"):
            yield from importlib.import_module(f"tether.v1.{name}").DESCRIPTOR.services_by_name.values()


if __name__ == "__main__":
    main()
