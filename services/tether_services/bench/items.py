"""The items of a load: synthetic and all different, or those of a file. Seeded: the same plan sends the same."""

from __future__ import annotations

import json
import random
from collections import deque
from pathlib import Path
from typing import Any, Final

from tether.errors import InvalidArgumentError
from tether_services.bench.plan import BenchItem, ItemPlan

RECENT_ITEMS: Final = 1024
"""Out of which repeats are drawn."""
NUMBER_TOKENS: Final = 7
"""Leading tokens of a synthetic item that number it: one for the caller, six for the item."""
LETTERS: Final = "abcdefghijklmnopqrstuvwxyz     "
"""What synthetic text is made of."""
MAX_FILE_ITEMS: Final = 1_000_000


class ItemSource:
    """The items of one caller, one after the other."""

    def __init__(self, plan: ItemPlan, *, seed: str, caller: int, vocab_size: int) -> None:
        """Begin with the first item.

        Args:
            plan: What to make.
            seed: Of contents, lengths and repeats.
            caller: Number of the caller, below 64: items of two callers never are the same.
            vocab_size: Token ids of the model; 0 where it reads none. Ids stay below 64 and this.
        """
        self.num_repeats = 0
        """Items given out that were given out before."""
        self._plan = plan
        self._random = random.Random(seed)
        self._caller = caller
        self._base = min(vocab_size or 64, 64)
        self._num_made = 0
        self._recent: deque[BenchItem] = deque(maxlen=RECENT_ITEMS)

    def next_call(self) -> list[BenchItem]:
        """Return the items of the next call."""
        return [self._next() for _ in range(self._plan.per_call)]

    def _next(self) -> BenchItem:
        share = self._plan.repeat_share
        if share and self._recent and self._random.random() < share:
            self.num_repeats += 1
            return self._random.choice(self._recent)
        item = self._given() if self._plan.given else self._make()
        self._num_made += 1
        if share:
            self._recent.append(item)
        return item

    def _given(self) -> BenchItem:
        if self._num_made >= len(self._plan.given):
            self.num_repeats += 1
        return self._plan.given[self._num_made % len(self._plan.given)]

    def _make(self) -> BenchItem:
        length = self._random.randint(self._plan.min_tokens, self._plan.max_tokens)
        cut = length // 2  # the number may reach into the response: the whole decides the score
        if self._plan.form == "text":
            number = f"{self._caller:02x}{self._num_made:05x}"
            text = number + "".join(self._random.choices(LETTERS, k=max(0, length - len(number))))
            return BenchItem(prompt=text[:cut], response=text[cut:])
        ids = self._number()
        ids += [byte % self._base for byte in self._random.randbytes(length - len(ids))]
        return BenchItem(prompt_token_ids=tuple(ids[:cut]), response_token_ids=tuple(ids[cut:]))

    def _number(self) -> list[int]:
        """Return the leading ids; in a vocabulary below 64 the random ones must do."""
        left, digits = self._num_made, [self._caller % self._base]
        for _ in range(NUMBER_TOKENS - 1):
            left, digit = divmod(left, self._base)
            digits.append(digit)
        return digits


def read_items(path: Path) -> tuple[BenchItem, ...]:
    """Return the items of a JSONL file: lines with prompt and response, or prompt_token_ids and response_token_ids.

    Raises:
        InvalidArgumentError: Names the first line that is no item; there is none, or too many.
    """
    items: list[BenchItem] = []
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                if len(items) == MAX_FILE_ITEMS:
                    raise InvalidArgumentError(
                        f"{path} has over {MAX_FILE_ITEMS} items.", field="items", reason="INVALID_CONFIG"
                    )
                items.append(_read_item(line, f"{path}:{number}"))
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgumentError(f"Cannot read {path}: {error}.", field="items", reason="INVALID_CONFIG") from error
    if not items:
        raise InvalidArgumentError(f"{path} has no items.", field="items", reason="INVALID_CONFIG")
    return tuple(items)


def _read_item(line: str, place: str) -> BenchItem:
    """Return one item. What it holds is not shown, as it may be private."""
    try:
        row: Any = json.loads(line)
        if "response_token_ids" in row:
            prompt, response = row.get("prompt_token_ids", []), row["response_token_ids"]
            if all(type(token) is int and 0 <= token < 2**31 for token in [*prompt, *response]):
                return BenchItem(prompt_token_ids=tuple(prompt), response_token_ids=tuple(response))
        elif isinstance(row["response"], str) and isinstance(row.get("prompt", ""), str):
            return BenchItem(prompt=row.get("prompt", ""), response=row["response"])
    except (ValueError, TypeError, KeyError, AttributeError):
        pass  # what follows says what a line should be
    raise InvalidArgumentError(
        f'{place} is no item: {{"prompt": TEXT, "response": TEXT}} or "prompt_token_ids" and "response_token_ids".',
        field="items",
        reason="INVALID_CONFIG",
    )
