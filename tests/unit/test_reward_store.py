from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from tests.unit.tiny_reward import write_adapter, write_classifier, write_policy, write_scale
from tether.errors import FailedPreconditionError, InvalidArgumentError, NotFoundError
from tether_services.reward.config import RewardSettings
from tether_services.reward.names import ModelId
from tether_services.reward.store import ModelStore, allowed_modules

RULES = "tether_services.reward.rules"
WANTED = ModelId("m", "1")


def store(folder: Path, *modules: str) -> ModelStore:
    return ModelStore(str(folder), rule_modules=modules)


def describe(folder: Path, *components: dict[str, Any], **more: Any) -> Path:
    """Write a model.toml as m@1 into a store and return the folder of the version."""
    version = folder / "m" / "1"
    version.mkdir(parents=True, exist_ok=True)
    (version / "model.toml").write_text(tomli_w.dumps({"components": list(components), **more}), encoding="utf-8")
    return version


def rule(function: str) -> dict[str, Any]:
    return {"name": "r", "engine": "rules", "function": function}


def refused(found: ModelStore, reason: str) -> str:
    with pytest.raises(FailedPreconditionError) as caught:
        found.find(WANTED)
    assert caught.value.reason == reason
    return caught.value.message


def test_a_folder_of_a_model_becomes_a_component_of_it(tmp_path: Path) -> None:
    folder = write_classifier(tmp_path / "m" / "1")
    found = store(tmp_path).find(WANTED)
    assert (found.name, found.version, found.components[0].path) == ("m", "1", str(folder.resolve()))


def test_a_description_gives_components_with_paths_relative_to_its_folder(tmp_path: Path) -> None:
    write_policy(tmp_path / "bases" / "policy")
    version = describe(
        tmp_path,
        {"name": "a", "engine": "transformers", "path": "weights", "weight": 0.5},
        rule(f"{RULES}:valid_json"),
        tokenizer="../../bases/policy",
        cacheable=False,
    )
    write_classifier(version / "weights")
    found = store(tmp_path, RULES).find(WANTED)
    assert [component.engine for component in found.components] == ["transformers", "rules"]
    assert found.components[0].path == str((version / "weights").resolve())
    assert found.tokenizer == str((tmp_path / "bases" / "policy").resolve())
    assert not found.cacheable and found.label == "m@1"


@pytest.mark.parametrize("kind", ["version", "name", "file", "weights"])
def test_links_are_refused_wherever_they_are(tmp_path: Path, kind: str) -> None:
    folder, outside = tmp_path / "store", write_classifier(tmp_path / "outside")
    (folder / "m").mkdir(parents=True)
    if kind == "version":
        (folder / "m" / "1").symlink_to(outside)
    elif kind == "name":
        (tmp_path / "other").mkdir()
        outside.rename(tmp_path / "other" / "1")
        (folder / "m").rmdir()
        (folder / "m").symlink_to(tmp_path / "other")
    elif kind == "file":
        write_classifier(folder / "m" / "1")
        (folder / "m" / "1" / "extra.json").symlink_to(outside / "config.json")
    else:
        version = describe(folder, {"name": "a", "engine": "transformers", "path": "weights"})
        (version / "weights").symlink_to(outside)
    assert "link" in refused(store(folder), "OUTSIDE_STORE")


def test_the_store_itself_may_be_reached_by_a_link(tmp_path: Path) -> None:
    write_classifier(tmp_path / "real" / "m" / "1")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert store(tmp_path / "link").find(WANTED).components[0].path.endswith("/real/m/1")


@pytest.mark.parametrize("path", ["../../../outside", "/", "..", "../..", "org/name", "nowhere"])
def test_paths_of_a_description_stay_in_the_store(tmp_path: Path, path: str) -> None:
    folder = tmp_path / "store"
    write_classifier(tmp_path / "outside")
    part = {"name": "a", "engine": "transformers", "path": path}
    describe(folder, part)
    if path == "..":  # in the store, but no model: that is for the engine to say
        assert store(folder).find(WANTED)
        return
    refused(store(folder), "OUTSIDE_STORE")
    describe(folder, {"name": "f", "engine": "fake"}, tokenizer=path)
    refused(store(folder), "OUTSIDE_STORE")


@pytest.mark.parametrize("base", ["../../../policy", "org/name"])
def test_the_base_of_an_adapter_is_in_the_store_too(tmp_path: Path, base: str) -> None:
    folder = tmp_path / "store"
    policy = write_policy(tmp_path / "policy")
    (folder / "m").mkdir(parents=True)
    write_adapter(folder / "m" / "1", policy)
    write_scale(folder / "m" / "1", base=base)
    refused(store(folder), "OUTSIDE_STORE")
    write_policy(folder / "bases" / "policy")
    write_scale(folder / "m" / "1", base="../../bases/policy")
    assert store(folder).find(WANTED)


def test_rules_are_functions_of_allowed_modules_and_others_are_not_even_imported(tmp_path: Path) -> None:
    unknown = "tests.rpc.scoring_rules"
    sys.modules.pop(unknown, None)
    describe(tmp_path, rule(f"{unknown}:refuse_some"))
    refused(store(tmp_path, RULES), "RULE_NOT_ALLOWED")
    assert unknown not in sys.modules
    assert store(tmp_path, unknown).find(WANTED)
    describe(tmp_path, rule("os:system"))
    refused(store(tmp_path, RULES), "RULE_NOT_ALLOWED")
    describe(tmp_path, rule(f"{RULES}:Mapping"))  # what the module has only imported is not its own
    refused(store(tmp_path, RULES), "RULE_NOT_ALLOWED")


def test_the_configuration_allows_the_modules_that_it_names() -> None:
    part = rule("tests.rpc.reward_rules:number")
    settings = RewardSettings.model_validate({"models": [{"name": "m", "components": [part]}]})
    assert allowed_modules(settings) == {RULES, "tests.rpc.reward_rules"}
    assert allowed_modules(settings.model_copy(update={"rule_modules": ()})) == {"tests.rpc.reward_rules"}


def test_a_missing_version_and_a_missing_store_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        store(tmp_path).find(WANTED)
    refused(ModelStore("", rule_modules=()), "NO_MODEL_STORE")
    with pytest.raises(InvalidArgumentError):
        store(tmp_path).find(ModelId("..", "1"))


def test_a_description_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    version = describe(tmp_path, {"name": "f", "engine": "fake"})
    (version / "model.toml").write_bytes(b"#" * 100_000)
    with pytest.raises(InvalidArgumentError, match="larger than"):
        store(tmp_path).find(WANTED)


@pytest.mark.parametrize("content", [b"a = " + b"[" * 30_000, b"\xff\xfe", b"a = secret"])
def test_a_description_that_is_no_toml_is_refused_and_not_quoted(tmp_path: Path, content: bytes) -> None:
    (describe(tmp_path) / "model.toml").write_bytes(content)
    with pytest.raises(InvalidArgumentError, match="is not TOML") as caught:
        store(tmp_path).find(WANTED)
    assert "secret" not in caught.value.message
