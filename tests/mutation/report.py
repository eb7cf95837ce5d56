"""The table of edits and outcomes as a page of the documentation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import groupby

from tests.mutation.table import KINDS, ROOT, Edit
from tests.mutation.trial import Outcome

PAGE = ROOT / "docs" / "mutations.md"
_SURVIVED = "**survived**"
_HEAD = """# Wrong edits of the PPO mathematics

A test of a formula is worth what it would notice. `python -m tests.mutation` puts each of the {count} wrong edits below
into `services/tether_services/ppo/`, one at a time and in memory only, runs the pure tests (`tests/unit/test_ppo_*.py`)
against it, and fails unless a test notices every one. The public vectors are left out of these runs, so that the
outcome is the same where they are absent. An edit that changes no result goes first and must pass.

This page is written by `python -m tests.mutation --write`; the edits are in `tests/mutation/edits/`. Items D1 to D38
are those that the docstrings of `tether_services.ppo` name; S0 is about number formats and S8 about the generator's
distribution against the trainer's. `caught by` is the first test that fails, in the order of a run.

| kind | what is wrong | edits |
|---|---|---|
"""


def page(edits: Sequence[Edit], outcomes: Sequence[Outcome]) -> str:
    """Return the page, in Markdown."""
    counts = Counter(edit.kind for edit in edits)
    kinds = "".join(f"| {kind} | {meaning} | {counts[kind]} |\n" for kind, meaning in KINDS.items())
    pairs = list(zip(edits, outcomes, strict=True))
    sections = [_section(module, list(rows)) for module, rows in groupby(pairs, key=lambda pair: pair[0].module)]
    return _HEAD.format(count=len(edits)) + kinds + "".join(sections)


def _section(module: str, rows: Sequence[tuple[Edit, Outcome]]) -> str:
    head = (
        f"\n## {module}.py\n\n| id | item | kind | what is wrong, and the edit | caught by |\n|---|---|---|---|---|\n"
    )
    return head + "".join(f"{edit_cells(edit)} {_caught(outcome)} |\n" for edit, outcome in rows)


def edit_cells(edit: Edit) -> str:
    """Return the part of a row that does not depend on the outcome."""
    change = f"{_code(edit.find)} becomes {_code(edit.replacement)}"
    return f"| {edit.id} | {edit.item} | {edit.kind} | {edit.fault}: {change} |"


def _caught(outcome: Outcome) -> str:
    file, _, test = outcome.caught_by.partition("::")
    return f"`{file.removesuffix('.py')}` {_code(test)}" if file else _SURVIVED


def _code(text: str) -> str:
    """Return the text as code in a cell of a table: on one line, with its bars escaped."""
    return f"`{' '.join(text.split())}`".replace("|", "\\|")
