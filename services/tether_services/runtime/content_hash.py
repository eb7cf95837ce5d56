"""Identity of a base model and of its tokenizer by content, the same in every process that loads them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path

from tether.errors import InvalidArgumentError, NotFoundError

__all__ = ["hash_file", "hash_model_folder", "hash_tokenizer"]

TOKENIZER_FILES = (
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template*",
    "additional_chat_templates/*",
)
"""What the tokenizers of transformers are read from."""
CHUNK_BYTES = 1 << 20
"""Read at a time."""


def _ignore() -> None:
    """Stand for a caller that does not follow the progress."""


def hash_file(path: Path, *, on_chunk: Callable[[], None] = _ignore) -> str:
    """Return the sha256 of a file's content in lower-case hex.

    Args:
        path: The file.
        on_chunk: Called after each piece of it: a large file takes minutes.

    Raises:
        NotFoundError: There is no such file.
    """
    try:
        with path.open("rb") as file:
            digest = hashlib.sha256()
            while chunk := file.read(CHUNK_BYTES):
                digest.update(chunk)
                on_chunk()
            return digest.hexdigest()
    except (FileNotFoundError, IsADirectoryError) as error:
        raise NotFoundError(f"no file at {path}", field="path") from error


def hash_model_folder(folder: Path, *, on_chunk: Callable[[], None] = _ignore) -> str:
    """Return the sha256 that identifies a base model by its content, in lower-case hex.

    It covers config.json and every *.safetensors file directly in the folder: sha256 over one line "<name> <sha256 of
    the content>" for each, in order of name. Tokenizer, model card, folder name and file times do not count.

    Args:
        folder: The folder of the model.
        on_chunk: Called after each piece of a file.

    Raises:
        NotFoundError: The folder does not exist.
        InvalidArgumentError: It lacks config.json or has no safetensors file.
    """
    if not folder.is_dir():
        raise NotFoundError(f"no model folder at {folder}", field="model")
    config, weights = folder / "config.json", sorted(folder.glob("*.safetensors"))
    if not config.is_file() or not weights:
        message = f"{folder} is not a model folder: it needs config.json and at least one *.safetensors file"
        raise InvalidArgumentError(message, field="model")
    return _hash_files([config, *weights], on_chunk=on_chunk)


def hash_tokenizer(folder: Path) -> str:
    """Return the sha256 of a model folder's tokenizer, chat templates included, in the form of `hash_model_folder`."""
    found = {path for pattern in TOKENIZER_FILES for path in folder.glob(pattern) if path.is_file()}
    return _hash_files(found)


def _hash_files(paths: Iterable[Path], *, on_chunk: Callable[[], None] = _ignore) -> str:
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(f"{path.name} {hash_file(path, on_chunk=on_chunk)}\n".encode())
    return digest.hexdigest()
