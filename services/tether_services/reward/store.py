"""The model store: a folder NAME/VERSION for each reward model that may be loaded while the service runs.

A version is either a reward model of transformers (a whole one, or an adapter with its head and `tether_reward.json`),
or a `model.toml` that describes a sum of components as the configuration does. Callers name versions, never paths.
Whatever a version reads is inside the store, by real path; its rules are functions of modules that the configuration
allows.
"""

from __future__ import annotations

import tomllib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from tether.errors import FailedPreconditionError, InvalidArgumentError, NotFoundError
from tether_services.reward.config import ComponentSettings, ModelSettings, RewardSettings
from tether_services.reward.names import ModelId, check_stored_name
from tether_services.runtime.settings import validate

__all__ = ["MODEL_FILE", "ModelStore", "allowed_modules"]

MODEL_FILE = "model.toml"
MAX_MODEL_FILE_BYTES = 64 * 1024
MAX_FILES = 1000
"""Files and folders of a version at most: enough for any model, and few enough to look at each."""


class ModelStore:
    """Finds versions. Everything in it reads the disk: call it in a thread."""

    def __init__(self, folder: str, *, rule_modules: Collection[str]) -> None:
        """Remember where the store is.

        Args:
            folder: Of the store; empty: there is none.
            rule_modules: Modules whose functions a `model.toml` may name.
        """
        self._folder = folder
        self._rule_modules = frozenset(rule_modules)

    def find(self, wanted: ModelId) -> ModelSettings:
        """Return the settings of a version; nothing of it is loaded.

        Raises:
            InvalidArgumentError: Name or version cannot be in a store, or a file of the version is not valid.
            NotFoundError: The store has no such version.
            FailedPreconditionError: There is no store, or the version reads what is not in it.
        """
        check_stored_name(wanted)
        if not self._folder:
            raise FailedPreconditionError(
                "The service has no model store; set model_store to a folder.", field="name", reason="NO_MODEL_STORE"
            )
        store = Path(self._folder).expanduser().resolve()
        folder = store / wanted.name / wanted.version
        if not folder.is_dir():
            raise NotFoundError(f"The store has no {wanted}.", field="version", reason="VERSION_NOT_FOUND")
        if folder.resolve() != folder:
            raise _outside(wanted, "its folder is a link")
        check_contained(folder, wanted)
        if (folder / MODEL_FILE).is_file():
            return self._read_description(folder, store, wanted)
        check_base(folder, store, wanted)
        component = ComponentSettings(name="score", engine="transformers", path=str(folder))
        return ModelSettings(name=wanted.name, version=wanted.version, components=(component,))

    def _read_description(self, folder: Path, store: Path, wanted: ModelId) -> ModelSettings:
        """Return what a `model.toml` describes, its paths made absolute."""
        values = _parse(folder / MODEL_FILE)
        for key, own in (("name", wanted.name), ("version", wanted.version)):
            if values.setdefault(key, own) != own:
                raise InvalidArgumentError(f"{MODEL_FILE} of {wanted} states another {key}.", field="version")
        described = validate(ModelSettings, values)
        components = tuple(self._contain(component, folder, store, wanted) for component in described.components)
        changes: dict[str, Any] = {"components": components}
        if described.tokenizer:
            changes["tokenizer"] = str(find_inside(described.tokenizer, folder, store, wanted))
        return described.model_copy(update=changes)

    def _contain(self, component: ComponentSettings, folder: Path, store: Path, wanted: ModelId) -> ComponentSettings:
        """Return a component that reads the store alone, with its path made absolute.

        Raises:
            FailedPreconditionError: It does not.
        """
        if component.engine == "rules":
            check_rule(component.function, allowed=self._rule_modules)
        if component.engine != "transformers":
            return component
        path = find_inside(component.path, folder, store, wanted)
        check_contained(path, wanted)
        check_base(path, store, wanted)
        return component.model_copy(update={"path": str(path)})


def allowed_modules(settings: RewardSettings) -> frozenset[str]:
    """Return the modules whose functions may be rules of stored models: those that the configuration names anywhere."""
    used = {
        component.function.partition(":")[0]
        for model in settings.reward_models()
        for component in model.components
        if component.engine == "rules"
    }
    return frozenset(settings.rule_modules) | used


def check_contained(folder: Path, wanted: ModelId) -> None:
    """Refuse a folder with a link in it, or with more in it than a model has.

    Raises:
        FailedPreconditionError: OUTSIDE_STORE.
    """
    for count, path in enumerate(folder.rglob("*"), start=1):
        if count > MAX_FILES:
            raise _outside(wanted, f"it has more than {MAX_FILES} files")
        if path.is_symlink():
            raise _outside(wanted, f"{path.name} is a link")


def check_base(folder: Path, store: Path, wanted: ModelId) -> None:
    """Refuse an adapter whose base is not in the store.

    Raises:
        InvalidArgumentError: Its `tether_reward.json` is not valid.
        FailedPreconditionError: OUTSIDE_STORE.
    """
    from tether_services.reward.engines.transformers import read_scale

    base = read_scale(folder, field="version").base
    if base:
        check_contained(find_inside(base, folder, store, wanted), wanted)


def find_inside(path: str, folder: Path, store: Path, wanted: ModelId) -> Path:
    """Return the real folder that a relative path leads to from a version's own.

    Raises:
        FailedPreconditionError: OUTSIDE_STORE: it is not a folder of the store; names of a hub never are.
    """
    found = (folder / path).resolve()
    if not found.is_relative_to(store) or found == store or not found.is_dir():
        raise _outside(wanted, f"{path!r} is not a folder in it")
    return found


def check_rule(function: str, *, allowed: Collection[str]) -> None:
    """Refuse a rule of a module that the configuration does not allow, or that the module has only imported.

    Raises:
        FailedPreconditionError: RULE_NOT_ALLOWED. Nothing was imported for it.
        InvalidArgumentError: The module has no such function.
    """
    from tether_services.reward.engines.rules import import_rule

    module = function.partition(":")[0]
    if module not in allowed or getattr(import_rule(function, field="version"), "__module__", "") != module:
        raise FailedPreconditionError(
            f"{function[:80]!r} is not a function of an allowed module; the setting rule_modules names those.",
            field="version",
            reason="RULE_NOT_ALLOWED",
        )


def _parse(path: Path) -> dict[str, Any]:
    """Return the content of a `model.toml`.

    Raises:
        InvalidArgumentError: It is too large or not TOML.
    """
    try:
        with path.open("rb") as file:
            text = file.read(MAX_MODEL_FILE_BYTES + 1)
        if len(text) > MAX_MODEL_FILE_BYTES:
            raise InvalidArgumentError(f"{path} is larger than {MAX_MODEL_FILE_BYTES} bytes.", field="version")
        values: Mapping[str, Any] = tomllib.loads(text.decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        message = f"{path} cannot be read or is not TOML ({type(error).__name__})."  # nothing of it is quoted
        raise InvalidArgumentError(message, field="version") from error
    return dict(values)


def _outside(wanted: ModelId, why: str) -> FailedPreconditionError:
    return FailedPreconditionError(
        f"{wanted} reaches out of the store: {why}.", field="version", reason="OUTSIDE_STORE"
    )
