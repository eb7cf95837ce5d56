"""How versions of reward models are named: `name@version`."""

from __future__ import annotations

from dataclasses import dataclass

from tether.errors import InvalidArgumentError
from tether_services.runtime.checks import check_name

MAX_SHOWN_CHARS = 80
"""Of what a caller sent, in an error."""


@dataclass(frozen=True, slots=True)
class ModelId:
    """One version of one reward model."""

    name: str
    """Matches NAME_PATTERN."""
    version: str
    """Not empty."""

    def __str__(self) -> str:
        return f"{self.name}@{self.version}"


def read_selector(model: str, version: str) -> tuple[str, str]:
    """Return (name, version) of a call that scores; either may be empty, which selects a default.

    Args:
        model: "name", "name@version" or empty.
        version: A version or empty.

    Raises:
        InvalidArgumentError: The two contradict each other, or a part beside "@" is empty.
    """
    name, separator, pinned = model.partition("@")
    if not separator:
        return name, version
    if not name or not pinned:
        raise InvalidArgumentError(
            f"{model[:MAX_SHOWN_CHARS]!r} is not name@version; leave the @ out to select a default.", field="model"
        )
    if version not in ("", pinned):
        raise InvalidArgumentError(
            f"model names version {pinned[:MAX_SHOWN_CHARS]!r} and version {version[:MAX_SHOWN_CHARS]!r}; give one.",
            field="version",
            reason="VERSION_CONTRADICTS",
        )
    return name, pinned


def read_label(text: str, *, field: str) -> ModelId:
    """Return what "name@version" names.

    Raises:
        InvalidArgumentError: It is not of that form.
    """
    name, _, version = text.partition("@")
    if not name or not version:
        raise InvalidArgumentError(f"{text[:MAX_SHOWN_CHARS]!r} is not name@version.", field=field)
    return ModelId(name, version)


def check_stored_name(wanted: ModelId) -> None:
    """Refuse a name or version that could not be a folder of the store; paths never pass.

    Raises:
        InvalidArgumentError: Names the field.
    """
    check_name(wanted.name, field="name")
    check_name(wanted.version, field="version")
