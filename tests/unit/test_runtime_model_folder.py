from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from tests.unit.tiny_reward import write_classifier, write_policy
from tether.errors import InvalidArgumentError
from tether_services.runtime.model_folder import find_model_folder, pick_device
from tether_services.runtime.pretrained import load_pretrained


def test_a_folder_is_found_as_an_absolute_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    assert find_model_folder("model", field="model") == tmp_path / "model"


@pytest.mark.parametrize("name", ["", "nowhere", "/no/such/folder", "../..x", "a/b/c", "https://example.com/model"])
def test_what_is_neither_folder_nor_hub_name_names_the_setting(name: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        find_model_folder(name, field="models[0].components[1].path")
    assert caught.value.violations[0].field == "models[0].components[1].path"


def test_a_hub_name_that_cannot_be_had_offline_is_a_typed_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InvalidArgumentError, match="hub could not give"):
        find_model_folder("tether-tests/does-not-exist", field="model")


def test_a_device_that_is_named_is_taken() -> None:
    assert pick_device("cuda:3") == "cuda:3"
    assert pick_device("auto") in ("cpu", "cuda")


def test_a_loaded_model_is_frozen_and_in_evaluation_mode(tmp_path: Path) -> None:
    folder = write_policy(tmp_path / "policy")
    model = load_pretrained(AutoModelForCausalLM, folder, dtype="float32", field="model")
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_weights_that_would_be_random_are_refused(tmp_path: Path) -> None:
    folder = write_classifier(tmp_path / "classifier")  # has no lm_head
    with pytest.raises(InvalidArgumentError, match=r"lacks weights.*lm_head"):
        load_pretrained(AutoModelForCausalLM, folder, dtype="float32", field="model")


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    folder = write_policy(tmp_path / "policy")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(InvalidArgumentError, match="cannot be loaded") as caught:
        load_pretrained(AutoModelForCausalLM, folder, dtype="float32", field="model")
    assert caught.value.violations[0].field == "model"


def test_a_truncated_file_is_a_typed_error(tmp_path: Path) -> None:
    folder = write_policy(tmp_path / "policy")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(InvalidArgumentError, match="cannot be loaded"):
        load_pretrained(AutoModelForCausalLM, folder, dtype="float32", field="model")
