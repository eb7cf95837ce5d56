"""The manifest that travels with the weights."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from tests.unit.recipe_inputs import pretrain_config
from tether_services.recipes.manifest import installed_version, portable_config, write_manifest


def test_the_manifest_names_inputs_by_content_and_keeps_figures(tmp_path: Path) -> None:
    config = pretrain_config(tmp_path)
    config.output.mkdir()
    path = write_manifest("pretrain", config, inputs=config.text_files, metrics={"loss": 1.5}, wall_seconds=2.04)
    content = json.loads(path.read_text())
    data = config.text_files[0].read_bytes()
    assert content["inputs"] == [
        {"name": "stories.txt", "sha256": hashlib.sha256(data).hexdigest(), "size_bytes": len(data)}
    ]
    assert (content["stage"], content["metrics"], content["wall_seconds"]) == ("pretrain", {"loss": 1.5}, 2.0)
    assert content["config"]["num_steps"] == 40


def test_the_manifest_says_nothing_about_where_it_was_made(tmp_path: Path) -> None:
    config = pretrain_config(tmp_path)
    config.output.mkdir()
    path = write_manifest("pretrain", config, inputs=config.text_files, metrics={}, wall_seconds=0.0)
    assert str(tmp_path) not in path.read_text()
    assert portable_config(config)["text_files"] == ["stories.txt"]


def test_a_figure_that_is_not_a_number_is_refused(tmp_path: Path) -> None:
    config = pretrain_config(tmp_path)
    config.output.mkdir()
    with pytest.raises(ValueError, match="JSON compliant"):
        write_manifest("pretrain", config, inputs=(), metrics={"loss": float("nan")}, wall_seconds=0.0)


def test_versions_are_those_of_the_installed_libraries() -> None:
    import torch

    assert installed_version("torch").split("+")[0] == torch.__version__.split("+")[0]
    assert installed_version("no-such-package-here") == "not installed"
