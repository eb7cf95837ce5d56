"""What can be wrong with a row, by name, and how often it was."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

from tether_services.recipes.data.records import Place

__all__ = ["DropReason", "Dropped", "Malformed", "MalformedReason", "RowError", "Tally"]

log = logging.getLogger(__name__)

MalformedReason = Literal[
    "not_utf8",
    "nul_character",
    "lone_surrogate",
    "row_too_long",
    "bad_json",
    "not_an_object",
    "too_deep",
    "duplicate_key",
    "bad_csv",
    "missing_field",
    "wrong_type",
    "empty_prompt",
    "empty_answer",
    "empty_turn",
    "empty_text",
    "bad_role",
    "no_reply",
    "different_prompts",
    "too_few_answers",
    "lengths_differ",
    "bad_level",
    "bad_label",
    "bad_margin",
]
"""The row does not say what a row of its shape should say."""

DropReason = Literal[
    "identical_answers",
    "only_ties",
    "no_ranking",
    "unfinished",
    "duplicate",
    "conflicting_label",
    "in_validation",
]
"""The row is well formed and of no use for training."""

MAX_NAMED = 5
"""Malformed rows that are named one by one; all are counted."""


@dataclass(frozen=True, slots=True)
class Malformed:
    """A row that was left out because it is broken."""

    place: Place
    reason: MalformedReason
    detail: str = ""
    """What was found, without the words of the row: data may be offensive or private."""
    num_rows: int = 1
    """Lines lost with it; more than one where a broken CSV field swallowed the next ones."""

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}" + (f" ({self.detail})" if self.detail else "")


@dataclass(frozen=True, slots=True)
class Dropped:
    """A record that was left out although its row is well formed."""

    reason: DropReason


class RowError(Exception):
    """Raised while one row is read; the reader turns it into a `Malformed` and goes on."""

    def __init__(self, reason: MalformedReason, detail: str = "") -> None:
        """Build an error; see `Malformed` for the arguments."""
        super().__init__(reason, detail)
        self.reason: MalformedReason = reason
        self.detail = detail


@dataclass(slots=True)
class Tally:
    """Counts while rows are read."""

    num_rows: int = 0
    """Rows read, malformed ones included."""
    malformed: Counter[str] = field(default_factory=Counter)
    """Rows by reason."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Records by reason."""
    first_malformed: list[str] = field(default_factory=list)
    """Place and reason of the first malformed rows."""

    @property
    def malformed_share(self) -> float:
        """Malformed rows among all rows, 0 where nothing was read."""
        return self.malformed.total() / self.num_rows if self.num_rows else 0.0

    def add_malformed(self, row: Malformed) -> None:
        """Count a malformed row; the first ones are logged."""
        self.num_rows += row.num_rows
        self.malformed[row.reason] += row.num_rows
        if len(self.first_malformed) < MAX_NAMED:
            self.first_malformed.append(str(row))
            log.warning("malformed row %s", row)
