"""Prompts of a run: read from a file, held-out ones set apart, and which ones a step uses."""

from __future__ import annotations

import hashlib
import json
import random
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from tether.errors import FieldViolation, InvalidArgumentError
from tether_services.orchestrator.config import RunConfig

__all__ = [
    "Prompt",
    "PromptSet",
    "derive_seed",
    "encode_prompts",
    "hash_prompts",
    "read_prompts",
    "split_prompts",
    "step_prompts",
]

ItemT = TypeVar("ItemT")
MAX_FILE_BYTES = 256 * 1024 * 1024
"""Prompt files are read whole."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt in both forms."""

    text: str
    token_ids: tuple[int, ...]
    """As every service gets them, the beginning-of-text token included."""

    @property
    def sha256(self) -> str:
        """Hash of the token ids, in decimal with commas."""
        return hashlib.sha256(",".join(map(str, self.token_ids)).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class PromptSet:
    """The prompts of a run."""

    training: tuple[Prompt, ...]
    held_out: tuple[Prompt, ...]
    """Empty if the run is not evaluated."""
    num_too_long: int
    """Left out for having more than `max_prompt_tokens` tokens."""


def read_prompts(path: Path, *, field: str) -> list[str]:
    """Return the prompts of a .txt file (one a line, empty lines skipped) or a .jsonl file ({"prompt": ...} a line).

    Raises:
        InvalidArgumentError: The file cannot be read, has another ending, no prompt, or a bad line, which is named.
    """
    if path.suffix not in (".txt", ".jsonl"):
        raise InvalidArgumentError(f"{path} must end in .txt or .jsonl.", field=field)
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # a pipe would keep its reader waiting
            raise InvalidArgumentError(f"{path} is no regular file.", field=field)
        if status.st_size > MAX_FILE_BYTES:
            raise InvalidArgumentError(f"{path} is larger than {MAX_FILE_BYTES} bytes.", field=field)
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise InvalidArgumentError(f"Cannot read {path}: {error.strerror}.", field=field) from error
    except UnicodeDecodeError as error:
        number = error.object[: error.start].count(b"\n") + 1
        raise InvalidArgumentError(f"{path} line {number} is not UTF-8: {error.reason}.", field=field) from error
    except ValueError as error:  # a null character, which no path can have
        raise InvalidArgumentError(f"Cannot read {str(path)!r}: {error}.", field=field) from error
    numbered = [(number, line.rstrip("\r")) for number, line in enumerate(lines, start=1) if line.strip()]
    if path.suffix == ".jsonl":
        prompts = [_parse_line(line, field=field, where=f"{path} line {number}") for number, line in numbered]
    else:
        prompts = [line for _, line in numbered]
    if not prompts:
        raise InvalidArgumentError(f"{path} holds no prompt.", field=field)
    return prompts


def _parse_line(line: str, *, field: str, where: str) -> str:
    try:
        content = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InvalidArgumentError(f"{where} is not JSON: {error}.", field=field) from error
    prompt = content.get("prompt") if isinstance(content, dict) else None
    if not isinstance(prompt, str) or not prompt:
        raise InvalidArgumentError(f'{where} has no text under "prompt".', field=field)
    try:
        prompt.encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON can spell and no tokenizer takes
        raise InvalidArgumentError(f"{where} is not Unicode text: {error.reason}.", field=field) from error
    return prompt


def split_prompts(
    config: RunConfig, prompts: Sequence[str], held_out: Sequence[str] | None
) -> tuple[list[str], list[str]]:
    """Return (training, held-out) prompts; without a file of their own the held-out ones are the tail of the others.

    Raises:
        InvalidArgumentError: There are too few of one kind.
    """
    if not config.evaluation:
        return list(prompts), []
    if held_out is not None:
        _require(len(held_out), 2, field="evaluation_prompts")
        return list(prompts), list(held_out[: config.evaluation_count])
    if len(prompts) <= config.evaluation_count:
        message = (
            f"{len(prompts)} prompts leave none to train on after {config.evaluation_count} are held out;"
            " lower it, name evaluation_prompts, or set evaluation = false."
        )
        raise InvalidArgumentError(message, field="evaluation_count")
    return list(prompts[: -config.evaluation_count]), list(prompts[-config.evaluation_count :])


def _require(count: int, least: int, *, field: str) -> None:
    if count < least:
        message = f"{count} prompts are left; at least {least} are needed."
        raise InvalidArgumentError(message, violations=(FieldViolation(field, message),))


def encode_prompts(
    config: RunConfig, prompts: Sequence[str], held_out: Sequence[str] | None, encode: Callable[[str], Sequence[int]]
) -> PromptSet:
    """Return the prompts of a run in token ids, without those that are too long.

    Args:
        config: Says how many are held out and how long they may be.
        prompts: What `prompts` of the configuration names.
        held_out: What `evaluation_prompts` names; None if it is empty.
        encode: The policy's tokenizer, with its beginning-of-text token.

    Raises:
        InvalidArgumentError: There are too few prompts, or too few are short enough.
    """
    training, evaluation = split_prompts(config, prompts, held_out)
    kept = [_encode_short(texts, encode, config.max_prompt_tokens) for texts in (training, evaluation)]
    _require(len(kept[0]), 1, field="max_prompt_tokens")
    if config.evaluation:
        _require(len(kept[1]), 2, field="max_prompt_tokens")
    num_too_long = len(training) + len(evaluation) - len(kept[0]) - len(kept[1])
    return PromptSet(training=tuple(kept[0]), held_out=tuple(kept[1]), num_too_long=num_too_long)


def _encode_short(texts: Sequence[str], encode: Callable[[str], Sequence[int]], most: int) -> list[Prompt]:
    encoded = (Prompt(text, tuple(encode(text))) for text in texts)
    return [prompt for prompt in encoded if 1 <= len(prompt.token_ids) <= most]


def hash_prompts(prompts: PromptSet, pretraining: Sequence[str] = ()) -> str:
    """Return the SHA-256 of all that a run reads: training prompts, held-out ones and pretraining text, in order."""
    digest = hashlib.sha256()
    for kind in (prompts.training, prompts.held_out):
        for prompt in kind:
            digest.update(f"{prompt.sha256}\n".encode())
        digest.update(b"\n")
    for text in pretraining:
        digest.update(hashlib.sha256(text.encode()).digest())
    return digest.hexdigest()


def derive_seed(*parts: int | str) -> int:
    """Return a seed in [0, 2^63) that depends on every part, for example (run seed, step, prompt index).

    Source: D7. A hash, so that neighbouring steps share no stream and the result does not depend on who asks.
    """
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def step_prompts(prompts: Sequence[ItemT], *, step: int, count: int, seed: int, stream: str = "prompts") -> list[ItemT]:
    """Return the prompts of a step: consecutive ones of an endless sequence of shuffled passes over all prompts.

    A pure function of its arguments, so a resumed run goes on where it stopped; another `stream` has other orders.
    """
    orders: dict[int, list[int]] = {}
    chosen = []
    for position in range(step * count, (step + 1) * count):
        epoch, offset = divmod(position, len(prompts))
        if epoch not in orders:
            orders[epoch] = list(range(len(prompts)))
            random.Random(derive_seed(seed, stream, epoch)).shuffle(orders[epoch])
        chosen.append(prompts[orders[epoch][offset]])
    return chosen
