"""What travels with the weights: the manifest and an adapter's own description."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import tether_services
from tests.unit.stage_inputs import sft_config, write_demonstrations
from tether_services.recipes.artifact import (
    describe_beginning,
    describe_parent,
    describe_sources,
    git_revision,
    installed_version,
    portable,
    relative_base,
    write_manifest,
)
from tether_services.recipes.config import DataConfig, SftConfig
from tether_services.recipes.sft import run_sft
from tether_services.runtime.content_hash import hash_model_folder, hash_tokenizer

SHORT = {"max_steps": 2, "eval_every": 2, "checkpoint_every": 2}


def with_broken_rows(config: SftConfig) -> SftConfig:
    """Return settings whose data has rows that the report will name, with a second file to measure on."""
    path = Path(config.data.sources[0])
    path.write_text(path.read_text() + '{"instruction": 1}\nnot json\n')
    other = write_demonstrations(path.parent / "other.jsonl", count=8, seed=7)
    data = DataConfig(sources=(str(path),), validation_sources=(str(other),), max_malformed_share=0.1)
    return config.model_copy(update={"data": data})


def test_a_stage_says_nothing_about_where_it_was_run(tmp_path: Path) -> None:
    config = with_broken_rows(sft_config(tmp_path, tmp_path / "out", training=SHORT))
    run_sft(config)
    found = [
        path.name for path in config.output.rglob("*") if path.is_file() and str(tmp_path).encode() in path.read_bytes()
    ]
    assert found == []
    manifest = json.loads((config.output / "manifest.json").read_text())
    assert sum(manifest["data_report"]["malformed"].values()) == 2
    assert manifest["data_report"]["first_malformed"][0].startswith("demonstrations.jsonl:91")
    assert (manifest["config"]["output"], manifest["config"]["base"]) == ("out", "base")


def test_data_and_parent_are_named_by_content(tmp_path: Path) -> None:
    config = with_broken_rows(sft_config(tmp_path, tmp_path / "out"))
    manifest = describe_beginning("sft", config, parent=Path(config.base))
    for entry, name in zip(manifest["data"], ("demonstrations.jsonl", "other.jsonl"), strict=True):
        content = (tmp_path / name).read_bytes()
        assert entry == {"name": name, "sha256": hashlib.sha256(content).hexdigest(), "size_bytes": len(content)}
    hashes = {"sha256": hash_model_folder(tmp_path / "base"), "tokenizer_sha256": hash_tokenizer(tmp_path / "base")}
    assert manifest["parent"] == {"name": "base", "stage": None} | hashes


def test_the_parent_of_a_stage_is_the_stage_before(tmp_path: Path) -> None:
    config = sft_config(tmp_path, tmp_path / "out")
    config.output.mkdir()
    shutil.copytree(config.base, config.output, dirs_exist_ok=True)
    write_manifest(config.output, describe_beginning("sft", config, parent=Path(config.base)), metrics={})
    assert describe_parent(config.output)["stage"] == "sft"
    assert describe_beginning("x", config, parent=None)["parent"] is None


def test_figures_versions_and_further_entries_are_kept(tmp_path: Path) -> None:
    config = sft_config(tmp_path, tmp_path / "out")
    config.output.mkdir()
    beginning = describe_beginning("sft", config, parent=None)
    path = write_manifest(config.output, beginning, metrics={"loss": 1.5}, wall_seconds=2.0)
    content = json.loads(path.read_text())
    assert (content["stage"], content["metrics"], content["wall_seconds"]) == ("sft", {"loss": 1.5}, 2.0)
    assert content["config"]["training"]["num_epochs"] == 2
    assert content["library_versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert installed_version("no-such-package-here") == "not installed"


def test_a_figure_that_is_not_a_number_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        write_manifest(tmp_path, {"stage": "sft"}, metrics={"loss": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_every_user_may_read_what_is_written(tmp_path: Path) -> None:
    private = tmp_path / "plots" / "a.svg"
    private.parent.mkdir()
    private.write_text("")
    private.chmod(0o600)
    path = write_manifest(tmp_path, {"stage": "sft"}, metrics={})
    assert [file.stat().st_mode & 0o444 for file in (private, path)] == [0o444, 0o444]


def test_the_git_revision_is_that_of_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(tether_services.__file__).parent
    head = subprocess.run(["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    expected = head.stdout.strip() or "unknown"
    assert re.sub("-dirty$", "", git_revision()) == expected
    monkeypatch.setenv("PATH", "")
    assert git_revision() == "unknown"


def test_folders_of_data_are_described_by_their_files_and_hub_names_by_name_and_revision(tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    for name in ("b.jsonl", "a.jsonl"):
        (tmp_path / "rows" / name).write_text(name)
    sources = [str(tmp_path / "rows"), "org/set:train", "no/such.jsonl"]
    config = sft_config(tmp_path, tmp_path / "out", data={"sources": sources})
    *files, hub, missing = describe_sources(config, revision_of={"org/set:train": "5" * 40}.__getitem__)
    assert [entry["name"] for entry in files] == ["a.jsonl", "b.jsonl"]
    assert hub == {"name": "org/set:train", "revision": "5" * 40}
    assert missing == {"name": "no/such.jsonl"}, "no hub is asked for a file"


def test_paths_are_reduced_to_their_ends_and_other_texts_are_not(tmp_path: Path) -> None:
    assert portable(tmp_path / "out") == "out"
    assert portable({str(tmp_path / "a.jsonl"): ("../b.csv", "org/name", 3, None)}) == {
        "a.jsonl": ["b.csv", "org/name", 3, None]
    }


def test_an_adapter_names_a_hub_model_by_name_and_a_folder_by_the_way_to_it(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    assert relative_base("org/name", tmp_path / "out" / "adapter") == "org/name"
    assert relative_base(str(tmp_path / "base"), tmp_path / "out" / "adapter") == "../../base"
    assert relative_base("/far/base", Path("/far/away/runs/out")) == "../../../base"


def test_a_base_that_shares_nothing_but_the_root_is_named_by_its_absolute_path(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/elsewhere/models/base")
    for name in ("/elsewhere/models/base", str(tmp_path / "link")):
        assert relative_base(name, tmp_path / "out") == "/elsewhere/models/base"
    assert relative_base(str(tmp_path / "base"), Path("/")) == str(tmp_path / "base")


def test_a_folder_of_data_with_a_split_is_hashed_file_by_file_and_named_without_its_place(tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    write_demonstrations(folder / "train.jsonl", count=3)
    config = sft_config(tmp_path, tmp_path / "out", data={"sources": [f"{folder}:train"]})
    (entry,) = describe_sources(config)
    assert entry["name"] == "train.jsonl" and len(entry["sha256"]) == 64
    assert portable(config)["data"]["sources"] == ["rows:train"]
    write_demonstrations(folder / "train.jsonl", count=4)
    assert describe_sources(config) != [entry]
