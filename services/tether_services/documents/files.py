"""Where the OpenAPI documents are kept, for those who serve them."""

from __future__ import annotations

from importlib import resources

__all__ = ["FOLDER", "read_openapi"]

FOLDER = "openapi"
"""Folder of the documents beside this file: one `<full name of a service>.json` each."""


def read_openapi(service: str) -> bytes:
    """Return the OpenAPI document of a service as JSON.

    Args:
        service: Full name, for example tether.v1.RewardService.

    Raises:
        FileNotFoundError: There is none.
    """
    return resources.files(__package__).joinpath(FOLDER, f"{service}.json").read_bytes()
