from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from tether.errors import InvalidArgumentError, NotFoundError
from tether_services.runtime.content_hash import CHUNK_BYTES, hash_file, hash_model_folder, hash_tokenizer

CONTENT = {"config.json": b"{}", "model-1.safetensors": b"one", "model-2.safetensors": b"two"}


def write(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def test_the_hash_of_a_file_is_its_sha256(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    assert hash_file(tmp_path / "file") == hashlib.sha256(b"abc").hexdigest()


def test_whoever_hashes_can_follow_the_progress(tmp_path: Path) -> None:
    pieces: list[int] = []
    folder = write(tmp_path / "model", CONTENT | {"model-1.safetensors": bytes(5 * CHUNK_BYTES // 2)})
    followed = hash_model_folder(folder, on_chunk=lambda: pieces.append(1))
    assert (followed, len(pieces)) == (hash_model_folder(folder), 5), "3 of the large file, 1 of each of the others"


def test_the_hash_of_a_folder_is_over_sorted_names_and_content_hashes(tmp_path: Path) -> None:
    lines = "".join(f"{name} {hashlib.sha256(CONTENT[name]).hexdigest()}\n" for name in sorted(CONTENT))
    assert hash_model_folder(write(tmp_path / "model", CONTENT)) == hashlib.sha256(lines.encode()).hexdigest()


def test_a_copy_elsewhere_has_the_same_hash_and_so_has_one_with_other_side_files(tmp_path: Path) -> None:
    first = hash_model_folder(write(tmp_path / "a", CONTENT))
    assert hash_model_folder(write(tmp_path / "b" / "c", dict(reversed(CONTENT.items())))) == first
    assert hash_model_folder(write(tmp_path / "d", CONTENT | {"README.md": b"x", "tokenizer.json": b"y"})) == first


@pytest.mark.parametrize(
    "changed",
    [
        {"config.json": b"{ }"},
        {"model-1.safetensors": b"two", "model-2.safetensors": b"one"},
        {"model-3.safetensors": b""},
    ],
)
def test_any_change_of_weights_or_configuration_changes_the_hash(tmp_path: Path, changed: dict[str, bytes]) -> None:
    before = hash_model_folder(write(tmp_path / "a", CONTENT))
    assert hash_model_folder(write(tmp_path / "b", CONTENT | changed)) != before


@pytest.mark.parametrize("kept", [["config.json"], ["model-1.safetensors"], []])
def test_a_folder_without_weights_or_configuration_is_refused(tmp_path: Path, kept: list[str]) -> None:
    folder = write(tmp_path / "model", {name: CONTENT[name] for name in kept})
    with pytest.raises(InvalidArgumentError, match=r"needs config\.json"):
        hash_model_folder(folder)


def test_what_is_not_there_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        hash_model_folder(tmp_path / "absent")
    with pytest.raises(NotFoundError):
        hash_file(tmp_path / "absent")
    with pytest.raises(NotFoundError):
        hash_file(tmp_path)


TOKENIZER = {"tokenizer.json": b"{}", "tokenizer_config.json": b"{1}", "vocab.txt": b"a", "spiece.model": b"\x00"}


def test_the_hash_of_a_tokenizer_covers_its_files_alone(tmp_path: Path) -> None:
    lines = "".join(f"{name} {hashlib.sha256(TOKENIZER[name]).hexdigest()}\n" for name in sorted(TOKENIZER))
    expected = hashlib.sha256(lines.encode()).hexdigest()
    assert hash_tokenizer(write(tmp_path / "a", TOKENIZER)) == expected
    assert hash_tokenizer(write(tmp_path / "b", CONTENT | TOKENIZER | {"README.md": b"x"})) == expected


@pytest.mark.parametrize("name", ["tokenizer.json", "merges.txt", "added_tokens.json", "chat_template.jinja"])
def test_any_file_of_a_tokenizer_changes_its_hash(name: str, tmp_path: Path) -> None:
    before = hash_tokenizer(write(tmp_path / "a", TOKENIZER))
    assert hash_tokenizer(write(tmp_path / "b", TOKENIZER | {name: b"other"})) != before
