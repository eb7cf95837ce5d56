"""What generators read beside a trained model: above all, which tokens end a text."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from tether_services.runtime.durable import write_text

__all__ = ["write_generation_defaults"]

DEFAULTS_NAME = "generation_config.json"


def write_generation_defaults(folder: Path, *, base: Path, tokenizer: Any, end_ids: Iterable[int]) -> None:
    """Write generation_config.json: the base's own with every end token that the base, the tokenizer or the data have.

    A chat template may end a turn with another token than the tokenizer's: without it an answer would never stop. The
    file is written as it was read: the library refuses to write some settings that it reads.

    Args:
        folder: Of the trained model.
        base: Folder of the model that was trained.
        tokenizer: Of both.
        end_ids: Tokens that end the answers of the data.
    """
    path = base / DEFAULTS_NAME
    defaults: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    listed = defaults.get("eos_token_id")
    if listed is None:
        listed = AutoConfig.from_pretrained(base, local_files_only=True).get_text_config().eos_token_id
    known = listed if isinstance(listed, list) else [listed]
    ends = dict.fromkeys(end for end in (*known, tokenizer.eos_token_id, *sorted(end_ids)) if end is not None)
    for name in ("bos_token_id", "pad_token_id"):
        if defaults.get(name) is None:
            defaults[name] = getattr(tokenizer, name)
    defaults["eos_token_id"] = list(ends) if len(ends) > 1 else next(iter(ends))
    write_text(folder / DEFAULTS_NAME, json.dumps(defaults, indent=2, sort_keys=True) + "\n")
