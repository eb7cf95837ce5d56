"""A study as it is printed and kept: a table in markdown and the same figures in JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from tether_services.runtime.durable import write_text

__all__ = ["Column", "Study", "markdown_table", "write_study"]


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table."""

    heading: str
    key: str
    """Of the figure in a row."""
    form: str = "{}"
    """How it is written."""


@dataclass(frozen=True, slots=True)
class Study:
    """What a study found."""

    name: str
    title: str
    columns: Sequence[Column]
    rows: Sequence[Mapping[str, Any]]
    conclusions: Sequence[str]
    """Sentences with the figures that decide."""
    figure: Figure | None = None
    notes: Sequence[str] = field(default=())
    """What the columns mean."""


def markdown_table(columns: Sequence[Column], rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows as a markdown table; a figure that is None is a dash."""
    lines = [_line(column.heading for column in columns), _line("---" for _ in columns)]
    for row in rows:
        lines.append(_line("-" if row[c.key] is None else c.form.format(row[c.key]) for c in columns))
    return "\n".join(lines)


def _line(cells: Any) -> str:
    return "| " + " | ".join(cells) + " |"


def render(study: Study, command: str) -> str:
    """Return the study as markdown, with the command that printed it."""
    parts = [f"### {study.title}", f"`{command}`", markdown_table(study.columns, study.rows)]
    parts += ["\n".join(f"- {line}" for line in study.conclusions), "\n".join(study.notes)]
    return "\n\n".join(part for part in parts if part) + "\n"


def write_study(study: Study, folder: Path, *, command: str, figures: Path | None) -> str:
    """Write NAME.md, NAME.json and learning-NAME.svg, and return the markdown.

    Args:
        study: What to write.
        folder: Of the table and the figures in JSON.
        command: That printed it.
        figures: Folder of the plot; None: `folder`.
    """
    text = render(study, command)
    content = {"command": command, "rows": [dict(row) for row in study.rows], "conclusions": list(study.conclusions)}
    write_text(folder / f"{study.name}.md", text)
    write_text(folder / f"{study.name}.json", json.dumps(content, indent=1, allow_nan=False) + "\n")
    if study.figure is not None:
        target = figures or folder
        target.mkdir(parents=True, exist_ok=True)
        study.figure.savefig(
            target / f"learning-{study.name}.svg", format="svg", metadata={"Date": None, "Creator": None}
        )
    return text
